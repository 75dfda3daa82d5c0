"""What a language model that sees no image is asked about ScienceQA: to solve it, and to judge between two answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.cli import printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.endpoint.server import UNANSWERED, check_answered
from llava_jax.evaluate.judge.chat_model import ChatModel, Unfinished
from llava_jax.evaluate.scienceqa.problems import Problem, compose
from llava_jax.evaluate.scienceqa.task import FAILED, read_statement
from llava_jax.files import atomic_write
from llava_jax.progress import Progress

JUDGEMENTS = 2  # how often the judge is asked, at most, until it names one letter

SOLVE = (
    "You solve multiple-choice questions on school science. Recall what one has to know, reason in a few sentences, "
    "and end with the words: The answer is X. There, X is the letter of your choice. Some questions refer to a picture "
    "that you cannot see; where the text alone decides nothing, say so instead."
)
JUDGE = (
    "You are shown a multiple-choice question on school science, and the answers of two students who disagree. The "
    "first has seen the picture that belongs to the question, if there is one; the second has only read the text. "
    "Either may be wrong. Weigh their reasons, work the question out yourself in a few sentences, and end with the "
    "words: The answer is X. There, X is the letter of your choice. Write these words once, and do not quote them from "
    "the students."
)
PROMPTS_HASH = hashlib.sha256((SOLVE + JUDGE).encode()).hexdigest()[:12]

Messages = tuple[dict[str, str], ...]


def solve_messages(problem: Problem, shots: Sequence[Problem]) -> Messages:
    """The problem without its image, after `shots` that are solved."""
    messages = [{"role": "system", "content": SOLVE}]
    for shot in shots:
        question, answer = compose(shot, "QCM-LEA")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return (*messages, {"role": "user", "content": compose(problem, "QCM-A")[0]})


def judge_messages(problem: Problem, ours: str, teacher: str) -> Messages:
    """The problem and two answers: the first of a model that saw the image, the second of one that did not."""
    question = compose(problem, "QCM-A")[0]
    content = f"{question}\n\n[First student]\n{ours}\n\n[Second student]\n{teacher}"
    return {"role": "system", "content": JUDGE}, {"role": "user", "content": content}


@dataclass(frozen=True)
class Asker:
    """Asks one language model, and writes its answers to files; what the log holds is not asked again.

    Both methods return texts by problem. They raise Unfinished, also where requests failed, unless `partial` goes on
    without these.
    """

    model: ChatModel
    log: AnswerLog
    budget: Budget
    partial: bool

    def solve(self, problems: Mapping[str, Problem], shots: Sequence[Problem], path: str) -> dict[str, str]:
        """Asks for answers. One without a letter is an answer: the model may have said that it needs the image."""
        return self._ask({pid: solve_messages(problem, shots) for pid, problem in problems.items()}, 1, path)

    def judge(self, problems: Mapping[str, Problem], ours: Mapping[str, str], teacher: Mapping[str, str],
              path: str) -> dict[str, str]:
        """Asks for judgements; once more where one names no letter, and then the last one stands."""
        asked = {pid: judge_messages(problem, ours[pid], teacher[pid]) for pid, problem in problems.items()}
        return self._ask(asked, JUDGEMENTS, path)

    def _ask(self, asked: Mapping[str, Messages], tries: int, path: str) -> dict[str, str]:
        replies: dict[str, Response] = {}
        failures: list[str] = []

        def record(job: _Job, attempt: int, answer: Response | RequestFailed) -> bool:
            if isinstance(answer, RequestFailed):
                failures.append(f"question {job.pid}: {answer}")
                return True
            replies[job.pid] = answer
            return attempt + 1 >= tries or read_statement(answer.text) != FAILED

        jobs = [_Job(pid, messages, self.model.parameters) for pid, messages in asked.items()]
        progress = Progress(len(jobs), unit="questions", note=self.budget.summary)
        self.model.ask(jobs, self.log, record, self.budget, progress)
        check_answered(len(jobs), failures)
        if failures and not self.partial:
            raise Unfinished(f"{len(failures):,} of {len(jobs):,} questions got no answer, the first is "
                             f"{printable(failures[0])}; the same command asks them again, --partial goes on without "
                             "them", UNANSWERED)
        with atomic_write(path) as file:
            for job in jobs:
                if job.pid in replies:
                    reply = replies[job.pid]
                    row = {"question_id": job.pid, "prompt": job.messages[-1]["content"], "text": reply.text,
                           "answer_id": job.request(0).key(self.model.model)[:22], "model_id": reply.model,
                           "metadata": {"fingerprint": reply.fingerprint, "created": reply.created}}
                    file.write(json.dumps(row).encode() + b"\n")
        return {pid: reply.text for pid, reply in replies.items()}


@dataclass(frozen=True)
class _Job:
    pid: str
    messages: Messages
    parameters: Mapping[str, Any]

    def request(self, attempt: int) -> ChatRequest:
        return ChatRequest(self.messages, self.parameters, attempt)
