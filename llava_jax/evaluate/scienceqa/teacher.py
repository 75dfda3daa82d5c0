"""Asks a language model that sees no image to solve ScienceQA, or to judge between two answers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Message, Response
from llava_jax.endpoint.server import check_answered
from llava_jax.evaluate.judge.chat_model import ChatJob, ChatModel, require_answers
from llava_jax.evaluate.scienceqa.problems import Problem, compose
from llava_jax.evaluate.scienceqa.task import FAILED, parse_statement
from llava_jax.files import write_json_lines

MAX_JUDGEMENTS = 2
"""Maximum number of requests for a judgement, until it names one letter."""

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


def solve_messages(problem: Problem, shots: Sequence[Problem]) -> tuple[Message, ...]:
    """Returns the problem without its image, after the solved problems `shots`."""
    messages = [{"role": "system", "content": SOLVE}]
    for shot in shots:
        question, answer = compose(shot, "QCM-LEA")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return (*messages, {"role": "user", "content": compose(problem, "QCM-A")[0]})


def judge_messages(problem: Problem, ours: str, teacher: str) -> tuple[Message, ...]:
    """Returns the problem and two answers: the first of a model that saw the image, the second of one that did not."""
    question = compose(problem, "QCM-A")[0]
    content = f"{question}\n\n[First student]\n{ours}\n\n[Second student]\n{teacher}"
    return {"role": "system", "content": JUDGE}, {"role": "user", "content": content}


@dataclass(frozen=True)
class ScienceQATeacher:
    """Asks one language model, and writes its answers to files. Answers in the log are not asked for again.

    Both methods return texts by problem. They raise Unfinished if the run was stopped, or if requests failed and
    `partial` is False.
    """

    model: ChatModel
    log: AnswerLog
    budget: Budget
    partial: bool

    def solve(self, problems: Mapping[str, Problem], shots: Sequence[Problem], path: str) -> dict[str, str]:
        """Asks for answers. A text without a letter counts too, because the model may need the image."""
        return self._ask({pid: solve_messages(problem, shots) for pid, problem in problems.items()}, 1, path)

    def judge(self, problems: Mapping[str, Problem], ours: Mapping[str, str], teacher: Mapping[str, str],
              path: str) -> dict[str, str]:
        """Asks for judgements, and once more if a judgement names no letter. The last one counts."""
        messages = {pid: judge_messages(problem, ours[pid], teacher[pid]) for pid, problem in problems.items()}
        return self._ask(messages, MAX_JUDGEMENTS, path)

    def _ask(self, messages: Mapping[str, tuple[Message, ...]], attempts: int, path: str) -> dict[str, str]:
        responses: dict[str, Response] = {}

        def accept(job: ChatJob, response: Response) -> bool:
            responses[job.key] = response
            return parse_statement(response.text) != FAILED

        jobs = [ChatJob(pid, asked, self.model.parameters) for pid, asked in messages.items()]
        failed = self.model.ask(jobs, self.log, self.budget, "questions", attempts, accept)
        failures = [f"question {pid}: {failure}" for pid, failure in failed.items()]
        if self.partial:
            check_answered(len(jobs), failures)
        else:
            require_answers(failures, len(jobs), "questions",
                            "the same command asks them again, --partial goes on without them")
        answered = [(job, responses[job.key]) for job in jobs if job.key in responses]
        write_json_lines(path, (
            {"question_id": job.key, "prompt": job.messages[-1]["content"], "text": response.text,
             "answer_id": job.request(0).key(self.model.model)[:22], "model_id": response.model,
             "metadata": {"fingerprint": response.fingerprint, "created": response.created}}
            for job, response in answered))
        return {job.key: response.text for job, response in answered}
