"""A judge compares a model's answers on LLaVA-Bench with those of a reference (Visual Instruction Tuning, 5.1).

The judge is any language model: it is given the image in words, the question and both answers, and gives each a score.
What it is asked follows from the files and options alone, and every reply is kept under a hash of what was asked, so
that everything can be made from the log again and nothing is paid twice.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from llava_jax.cli import one_line, printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.client import without_password
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Message, Response
from llava_jax.endpoint.server import UNANSWERED, check_answered, note
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatModel, Unfinished
from llava_jax.evaluate.judge.report import Report, write_report
from llava_jax.evaluate.judge.reviews import TOO_MANY_FAILED, Unscored, parse_as_published, parse_scores
from llava_jax.evaluate.runner import answer_file
from llava_jax.evaluate.tasks.base import get_task
from llava_jax.evaluate.tasks.llava_bench import JudgeCase, LlavaBench
from llava_jax.files import make_folder, read_json
from llava_jax.progress import Progress

LOG = "judged.jsonl"
PROMPTS = os.path.join(os.path.dirname(__file__), "prompts")
PUBLISHED_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""What LLaVA's scripts say first; their rule.json holds the rest."""
RUN = 1000  # attempts between two runs: requests of equal content are told apart by their attempt


class JudgeRule(NamedTuple):
    role: str  # what the two are called
    prompt: str


@dataclass(frozen=True)
class JudgeRules:
    """What the judge is told: first, and by category after question and answers."""

    system: str
    rules: Mapping[str, JudgeRule]

    @classmethod
    def load(cls, path: str = "") -> "JudgeRules":
        """The project's own, or those of a rule.json as LLaVA has it: {category: {"role", "prompt"}}.

        Raises UserError, one line.
        """
        if not path:
            system, coco, wild = (_read(f"judge_{name}.txt") for name in ("system", "coco", "wild"))
            texts = {"": coco, "llava_bench_": wild}
            return cls(system, {prefix + category: JudgeRule("Assistant", text) for prefix, text in texts.items()
                                for category in ("conv", "detail", "complex")})
        table, rules = read_json(path, (dict, list)), {}
        if not isinstance(table, dict):
            raise UserError(f"{path}: not a table of rules, {{category: {{\"role\": ..., \"prompt\": ...}}}}")
        for category, rule in table.items():
            if not isinstance(rule, dict) or not all(isinstance(rule.get(name), str) for name in JudgeRule._fields):
                raise UserError(f"{path}: the rule of {category!r} needs the texts role and prompt")
            rules[category] = JudgeRule(rule["role"], rule["prompt"])
        return cls(PUBLISHED_SYSTEM, rules)

    def messages(self, case: JudgeCase, candidate: str, swapped: bool = False) -> tuple[Message, ...]:
        """The layout of LLaVA's scripts: the reference comes first, or second if `swapped`. KeyError for a category
        without a rule."""
        role, prompt = self.rules[case.category]
        first, second = (candidate, case.reference["text"]) if swapped else (case.reference["text"], candidate)
        content = (f"[Context]\n{case.context}\n\n[Question]\n{case.question.text}\n\n"
                   f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
                   f"[System]\n{prompt}\n\n")
        return {"role": "system", "content": self.system}, {"role": "user", "content": content}

    @property
    def hash(self) -> str:
        """sha256, in hex, of all that the judge is told but question, image and answers."""
        content = [self.system, sorted((category, *rule) for category, rule in self.rules.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One judgement: of a question, in one run, in one order."""

    id: int  # place among the questions, from 1
    run: int  # from 1
    swapped: bool
    case: JudgeCase
    line: Mapping[str, Any]  # the candidate's answer
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    compat: bool

    def request(self, attempt: int) -> ChatRequest:
        return ChatRequest(self.messages, self.parameters, (self.run - 1) * RUN + attempt)

    def review(self, reply: Response) -> dict[str, Any]:
        """A line of a file of reviews; `tuple` is the reference's score and the candidate's in either order. Raises
        Unscored, unless `compat`: then a reply without scores has -1 for both, as LLaVA's scripts write it."""
        scores = parse_as_published(reply.text) if self.compat else list(parse_scores(reply.text, reply.finish_reason))
        reference = self.case.reference
        review = {"id": self.id, "question_id": self.case.question.id,
                  "answer1_id": reference.get("answer_id", reference["question_id"]),
                  "answer2_id": self.line.get("answer_id", self.line["question_id"]),
                  "category": self.case.category, "content": reply.text,
                  "tuple": scores[::-1] if self.swapped else scores}
        return review | ({"swapped": True} if self.swapped else {})


@dataclass(frozen=True)
class JudgeAnswers:
    """Have answers on LLaVA-Bench judged by a language model, beside those of a reference.

    The score is the mean of the answers' scores over the mean of the reference's, in percent. A judgement without two
    scores from 1 to 10 is asked for again, then left out and counted. OUT gets judge.json and judge.md (figures,
    failures, who judged by which prompts), reviews/reviews_N.jsonl (as LLaVA's scripts write them; `evaluate reviews`
    reads them), failed.jsonl, and judged.jsonl, which keeps every reply: the same command asks only what is missing.

    Exit codes: 0; 1, some requests got no answer; 2, a mistake, in one line, or no request at all was answered; 3,
    --max-requests; 4, more than --max-failed of the judgements failed; 130 after Ctrl-C and 75 after SIGTERM. After 1,
    3, 75 and 130 the same command goes on."""

    bench: tyro.conf.Positional[Literal["llava-bench-coco", "llava-bench-wild"]]
    """which set; llava-bench-coco also for what make-bench has made"""
    answers: str
    """the answers to be judged, JSON lines, as evaluate writes them"""
    data: str
    """folder of the benchmark, or its question file"""
    out: str
    """folder for the results"""
    model: Annotated[ChatModel, tyro.conf.arg(name="")]
    reference: str = ""
    """answers to measure by, in place of the benchmark's"""
    context: str = ""
    """images in words, in place of the benchmark's file"""
    rules: str = ""
    """a rule.json as LLaVA has it, in place of the project's prompts"""
    swap: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """judge in the other order as well, the reference second, and tell the difference"""
    runs: int = 1
    """judge so often, and give mean and standard deviation"""
    attempts: int = 3
    """how often a judgement is asked for, at most, when the reply has no scores"""
    compat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """as LLaVA's scripts: scores are read from the first line alone, asked for once, a reply without them counts as -1
    for both, and means are rounded; --temperature 0.2 and --rules FILE make the requests the same too"""
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """judge the answers that are there, instead of refusing a file that misses some"""
    max_failed: float = 0.05
    """share of failed judgements above which the exit code is 4"""

    def run(self) -> int:
        self._check()
        bench, rules = get_task(self.bench)(), JudgeRules.load(self.rules)
        paths = bench.paths(self.data, self.reference, self.context) | {"answers": self.answers}
        if self.rules:
            paths["rules"] = self.rules
        jobs = self._jobs(bench, paths, rules)
        make_folder(self.out)
        failures: dict[tuple, str] = {}
        with AnswerLog(os.path.join(self.out, LOG)) as log:
            try:
                self._ask(jobs, log, failures)
            except Unfinished as unfinished:
                print(one_line(unfinished), file=sys.stderr)
                return unfinished.code
            answered = sum(job.request(0).key(self.model.model) in log for job in jobs)
            check_answered(answered + len(failures), list(failures.values()))
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
        for name, value, most in (("runs", self.runs, RUN), ("attempts", self.attempts, RUN - 1)):
            if not 1 <= value <= most:
                raise UserError(f"--{name} is {value}: it must be from 1 to {most}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"--max-failed is {self.max_failed:g}: it is a share, from 0 to 1")

    def _jobs(self, bench: LlavaBench, paths: Mapping[str, str], rules: JudgeRules) -> list[Job]:
        """Run by run, in the order of the questions."""
        cases = bench.cases(paths)
        questions = [case.question for case in cases]
        lines, notes = answer_file.read(self.answers, self.partial)
        if not self.partial:
            answer_file.check(self.answers, bench.title, questions, lines, ordered=False)
        given = {line["question_id"]: line for line in lines}
        asked = [(number, case) for number, case in enumerate(cases, 1) if case.question.id in given]
        if not asked:
            raise UserError(f"{self.answers}: none of its answers is to a question of {paths['questions']}")
        if len(asked) < len(cases):
            notes.append(f"{len(cases) - len(asked):,} of {len(cases):,} questions have no answer, and are left out")
        for line in [*bench.size_notes(questions), *notes]:
            note(line)
        if lost := {case.category for _, case in asked} - set(rules.rules):
            raise UserError(f"{self.rules}: has no rule for {min(lost)!r}; it has {', '.join(rules.rules)}")
        return [Job(number, run, swapped, case, line := given[case.question.id],
                    rules.messages(case, line["text"], swapped), self.model.parameters, self.compat)
                for run in range(1, self.runs + 1) for swapped in ((False, True) if self.swap else (False,))
                for number, case in asked]

    def _ask(self, jobs: Sequence[Job], log: AnswerLog, failures: dict[tuple, str]) -> None:
        """Fills the log, and `failures` with the jobs whose request failed."""
        rejects = Counter()

        def record(job: Job, attempt: int, answer: Response | RequestFailed) -> bool:
            if isinstance(answer, RequestFailed):
                failures[_name(job)] = str(answer)
                rejects["request_failed"] += 1
                return True
            try:
                job.review(answer)
            except Unscored as error:
                rejects[error.reason] += 1
                return attempt + 1 >= self.attempts
            return True

        budget = Budget(max_requests=self.model.max_requests)
        progress = Progress(len(jobs), unit="judgements", note=lambda: budget.summary(rejects))
        self.model.ask(jobs, log, record, budget, progress)

    def _report(self, jobs: Sequence[Job], log: AnswerLog, failures: Mapping[tuple, str]) -> Report:
        """From the log: every job has a review or, unless it counts as -1, a failure."""
        report = Report(self.compat)
        for job in jobs:
            review, failure = None, {}
            for attempt in range(self.attempts):
                key = job.request(attempt).key(self.model.model)
                if key not in log:
                    failure = {"reason": "request_failed", "detail": failures[_name(job)]}
                    break
                report.count(log[key])
                try:
                    review = job.review(log[key])
                    break
                except Unscored as error:
                    failure = {"reason": error.reason, "detail": str(error), "content": log[key].text}
            if review and review["tuple"] == [-1, -1]:
                failure = {"reason": "unreadable", "detail": "counts as -1", "content": review["content"]}
            elif review:
                failure = {}
            report.add(job.run, job.swapped, review, failure and {
                "run": job.run, "swapped": job.swapped, "question_id": job.case.question.id,
                "category": job.case.category, **failure})
        return report


def _name(job: Job) -> tuple:
    return job.run, job.swapped, job.id


def _read(name: str) -> str:
    with open(os.path.join(PROMPTS, name), encoding="utf-8") as file:
        return file.read().strip()
