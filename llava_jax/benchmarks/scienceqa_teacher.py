"""What a language model that sees no image is asked about ScienceQA: to solve it, and to judge between two answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.atomic import replacing
from llava_jax.benchmarks.scienceqa import FAILED, read_statement
from llava_jax.benchmarks.scienceqa_data import Problem, compose
from llava_jax.endpoint.client import Endpoint
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.progress import Progress
from llava_jax.endpoint.request import Reply, Request
from llava_jax.endpoint.run import answer_all

INTERRUPTED, LIMITED = 130, 3  # exit codes
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


class Unfinished(Exception):
    """The run was stopped before all was asked; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Asker:
    """Asks one language model, and writes its answers to files; what the log holds is not asked again.

    Both methods return texts by problem. They raise Unfinished, and ValueError, one line, where requests failed, unless
    `partial` goes on without these.
    """

    endpoint: Endpoint
    log: AnswerLog
    settings: Mapping[str, Any]  # of `answer_all`
    max_tokens: int
    partial: bool

    async def solve(self, problems: Mapping[str, Problem], shots: Sequence[Problem], path: str) -> dict[str, str]:
        """Asks for answers. One without a letter is an answer: the model may have said that it needs the image."""
        return await self._ask({pid: solve_messages(problem, shots) for pid, problem in problems.items()}, 1, path)

    async def judge(self, problems: Mapping[str, Problem], ours: Mapping[str, str], teacher: Mapping[str, str],
                    path: str) -> dict[str, str]:
        """Asks for judgements; once more where one names no letter, and then the last one stands."""
        asked = {pid: judge_messages(problem, ours[pid], teacher[pid]) for pid, problem in problems.items()}
        return await self._ask(asked, JUDGEMENTS, path)

    async def _ask(self, asked: Mapping[str, Messages], tries: int, path: str) -> dict[str, str]:
        replies: dict[str, Reply] = {}
        failures: list[str] = []

        def settle(job: _Job, attempt: int, answer: Reply | RequestFailed) -> bool:
            if isinstance(answer, RequestFailed):
                failures.append(f"question {job.pid}: {answer}")
                return True
            replies[job.pid] = answer
            return attempt + 1 >= tries or read_statement(answer.text) != FAILED

        jobs = [_Job(pid, messages, self.max_tokens) for pid, messages in asked.items()]
        progress = Progress(len(jobs), unit="questions")
        ending = await answer_all(jobs, self.endpoint, self.log, settle, progress=progress, **self.settings)
        progress.close()
        if ending != "done":
            raise Unfinished(f"stopped ({ending}): {len(replies):,} of {len(jobs):,} questions are answered, and the "
                             "same command goes on", INTERRUPTED if ending == "interrupted" else LIMITED)
        if failures and not self.partial:
            raise ValueError(f"{len(failures):,} of {len(jobs):,} questions got no answer, the first is {failures[0]}; "
                             "the same command asks them again, --partial goes on without them")
        with replacing(path) as file:
            for job in jobs:
                if job.pid in replies:
                    reply = replies[job.pid]
                    row = {"question_id": job.pid, "prompt": job.messages[-1]["content"], "text": reply.text,
                           "answer_id": job.request(0).key(self.endpoint.model)[:22], "model_id": reply.model,
                           "metadata": {"fingerprint": reply.fingerprint, "created": reply.created}}
                    file.write(json.dumps(row).encode() + b"\n")
        return {pid: reply.text for pid, reply in replies.items()}


@dataclass(frozen=True)
class _Job:
    pid: str
    messages: Messages
    limit: int

    def request(self, attempt: int) -> Request:
        return Request(self.messages, {"max_completion_tokens": self.limit}, attempt)
