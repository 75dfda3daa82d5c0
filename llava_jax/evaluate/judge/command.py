"""A judge compares a model's answers on LLaVA-Bench with reference answers (Visual Instruction Tuning, 5.1).

The judge is any language model. It gets the image in words, the question and both answers, and gives each answer a
score. The requests depend on files and options alone, and every reply is kept under a hash of its request. All
results can therefore be made from the log again, and nothing is paid twice.
"""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from llava_jax.cli import Flag, one_line, printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.client import without_password
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Response
from llava_jax.endpoint.server import UNANSWERED, check_answered, note
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatJob, ChatModel, Unfinished
from llava_jax.evaluate.judge.report import JudgeReport, write_report
from llava_jax.evaluate.judge.reviews import TOO_MANY_FAILED, Unscored, parse_as_published, parse_scores
from llava_jax.evaluate.judge.rules import JudgeRules
from llava_jax.evaluate.runner import answer_file
from llava_jax.evaluate.tasks.base import get_task
from llava_jax.evaluate.tasks.llava_bench import JudgeCase, LlavaBench
from llava_jax.files import make_folder

LOG = "judged.jsonl"
ATTEMPTS_PER_RUN = 1000
"""Difference of the first attempts of two runs, which makes requests of equal content different."""


@dataclass(frozen=True, kw_only=True)
class Judgement(ChatJob):
    """The request of one judgement. Its key is (run, swapped, number of the question), with numbers from 1."""

    case: JudgeCase
    line: Mapping[str, Any]  # the candidate's answer
    compat: bool

    def review(self, response: Response) -> dict[str, Any]:
        """Returns a line of a file of reviews. `tuple` is the reference's score and the candidate's in either order.

        Raises Unscored for a reply without scores. If `compat`, both scores are -1 instead, as in LLaVA's scripts.
        """
        scores = (parse_as_published(response.text) if self.compat
                  else list(parse_scores(response.text, response.finish_reason)))
        reference, (_, swapped, number) = self.case.reference, self.key
        review = {"id": number, "question_id": self.case.question.id,
                  "answer1_id": reference.get("answer_id", reference["question_id"]),
                  "answer2_id": self.line.get("answer_id", self.line["question_id"]),
                  "category": self.case.category, "content": response.text,
                  "tuple": scores[::-1] if swapped else scores}
        return review | ({"swapped": True} if swapped else {})


@dataclass(frozen=True)
class JudgeAnswers:
    """Asks a language model to judge answers on LLaVA-Bench against reference answers.

    The score is the mean of the answers' scores over the mean of the reference's, in percent. A judgement without two
    scores from 1 to 10 is asked for again, then left out and counted. OUT gets judge.json and judge.md (figures,
    failures, model and prompts of the judge), reviews/reviews_N.jsonl (the format of LLaVA's scripts, which `evaluate
    reviews` reads), failed.jsonl, and judged.jsonl with every reply. The same command asks only for missing replies.

    Exit codes: 0; 1, some requests got no answer; 2, an error of the user in one line, or no request was answered;
    3, --max-requests are used up; 4, more than --max-failed of the judgements failed; 130 after Ctrl-C and 75 after
    SIGTERM. After 1, 3, 75 and 130 the same command continues."""

    bench: tyro.conf.Positional[Literal["llava-bench-coco", "llava-bench-wild"]]
    """Set of questions: llava-bench-coco (also for the output of make-bench) or llava-bench-wild."""
    answers: str
    """File of the answers to judge, JSON lines, as evaluate writes them."""
    data: str
    """Folder of the benchmark, or its question file."""
    out: str
    """Folder for the results."""
    model: Annotated[ChatModel, tyro.conf.arg(name="")]
    reference: str = ""
    """File of reference answers, instead of the benchmark's."""
    context: str = ""
    """File of the images in words, instead of the benchmark's."""
    rules: str = ""
    """Path of LLaVA's rule.json, instead of the project's prompts."""
    swap: Flag = False
    """Whether to judge in the other order as well, the reference second, and report the difference."""
    runs: int = 1
    """Number of runs of the judge; several give mean and standard deviation."""
    attempts: int = 3
    """Maximum number of requests for a judgement, if replies have no scores."""
    compat: Flag = False
    """Whether to score as LLaVA's scripts do. They ask once, read the first line alone, count a reply without scores as
    -1 for both, and round means. With --temperature 0.2 and --rules FILE the requests are equal too."""
    partial: Flag = False
    """Whether to judge the existing answers, instead of refusing an incomplete file."""
    max_failed: float = 0.05
    """Maximum share of failed judgements; above it the exit code is 4."""

    def run(self) -> int:
        self._check()
        task, rules = get_task(self.bench)(), JudgeRules.load(self.rules)
        paths = task.paths(self.data, self.reference, self.context) | {"answers": self.answers}
        if self.rules:
            paths["rules"] = self.rules
        jobs = self._jobs(task, paths, rules)
        make_folder(self.out)
        with AnswerLog(os.path.join(self.out, LOG)) as log:
            try:
                failures = self._ask(jobs, log)
            except Unfinished as unfinished:
                print(one_line(unfinished), file=sys.stderr)
                return unfinished.code
            answered = sum(job.request(0).key(self.model.model) in log for job in jobs)
            check_answered(answered + len(failures), list(map(str, failures.values())))
            report = self._report(jobs, log, failures)
        judge = {"model": self.model.model, "base_url": without_password(self.model.base_url),
                 "parameters": self.model.parameters, "prompts": rules.hash}
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "model"}
        print(printable(write_report(report, self.out, paths, judge, options)))
        if failures:
            note(f"{len(failures):,} requests got no answer ({next(iter(failures.values()))}); the same command asks "
                 "them again")
        if len(report.failed) > self.max_failed * len(jobs):
            print(f"more than --max-failed {self.max_failed:g} of the judgements failed", file=sys.stderr)
            return TOO_MANY_FAILED
        return UNANSWERED if failures else 0

    def _check(self) -> None:
        self.model.check()
        for name, maximum in (("runs", ATTEMPTS_PER_RUN), ("attempts", ATTEMPTS_PER_RUN - 1)):
            if not 1 <= getattr(self, name) <= maximum:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be from 1 to {maximum}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"--max-failed is {self.max_failed:g}: it is a share, from 0 to 1")

    def _jobs(self, task: LlavaBench, paths: Mapping[str, str], rules: JudgeRules) -> list[Judgement]:
        """Returns the judgements run by run, in the order of the questions."""
        cases = task.cases(paths)
        questions = [case.question for case in cases]
        lines, notes = answer_file.read(self.answers, self.partial)
        if not self.partial:
            answer_file.check(self.answers, task.title, questions, lines, ordered=False)
        line_of = {line["question_id"]: line for line in lines}
        answered = [(number, case) for number, case in enumerate(cases, 1) if case.question.id in line_of]
        if not answered:
            raise UserError(f"{self.answers}: none of its answers is to a question of {paths['questions']}")
        if lost := len(cases) - len(answered):
            notes.append(f"{lost:,} of {len(cases):,} questions have no answer, and are left out")
        for text in [*task.size_notes(questions), *notes]:
            note(text)
        if unknown := {case.category for _, case in answered} - set(rules.rules):
            raise UserError(f"{self.rules}: has no rule for {min(unknown)!r}; it has {', '.join(rules.rules)}")
        return [Judgement(key=(run, swapped, number), case=case, line=(line := line_of[case.question.id]),
                          messages=rules.messages(case, line["text"], swapped), parameters=self.model.parameters,
                          first_attempt=(run - 1) * ATTEMPTS_PER_RUN, compat=self.compat)
                for run in range(1, self.runs + 1) for swapped in ((False, True) if self.swap else (False,))
                for number, case in answered]

    def _ask(self, jobs: Sequence[Judgement], log: AnswerLog) -> dict[Hashable, RequestFailed]:
        """Completes the log. Returns the requests that failed."""
        rejects = Counter()

        def accept(job: Judgement, response: Response) -> bool:
            try:
                job.review(response)
            except Unscored as error:
                rejects[error.reason] += 1
                return False
            return True

        budget = Budget(max_requests=self.model.max_requests)
        return self.model.ask(jobs, log, budget, "judgements", self.attempts, accept, rejects)

    def _report(self, jobs: Sequence[Judgement], log: AnswerLog, failures: Mapping[Hashable, RequestFailed]
                ) -> JudgeReport:
        """Makes the report from the log. Each judgement has a review, a failure, or both if its scores are -1."""
        report = JudgeReport(self.compat)
        for job in jobs:
            review, failure = None, {}
            for attempt in range(self.attempts):
                key = job.request(attempt).key(self.model.model)
                if key not in log:
                    failure = {"reason": "request_failed", "detail": str(failures[job.key])}
                    break
                report.count(log[key])
                try:
                    review, failure = job.review(log[key]), {}
                    break
                except Unscored as error:
                    failure = {"reason": error.reason, "detail": str(error), "content": log[key].text}
            if review and review["tuple"] == [-1, -1]:
                failure = {"reason": "unreadable", "detail": "counts as -1", "content": review["content"]}
            run, swapped, _ = job.key
            report.add(run, swapped, review, failure and {
                "run": run, "swapped": swapped, "question_id": job.case.question.id, "category": job.case.category,
                **failure})
        return report
