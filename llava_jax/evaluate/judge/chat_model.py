"""Asks a language model behind OpenAI's chat API many questions: options of the model, jobs and their answers."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from llava_jax.cli import printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Message, Response
from llava_jax.endpoint.run import Ending, answer_all
from llava_jax.endpoint.server import OVER_BUDGET, UNANSWERED, Server, check_answered, code_of, note
from llava_jax.errors import UserError
from llava_jax.progress import Progress


class Unfinished(Exception):
    """Raised if the run stopped before all questions were asked. `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ChatJob:
    """One question to a chat model.

    Requests of equal content differ in their attempt, so `first_attempt` separates several runs.
    """

    key: Hashable
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    first_attempt: int = 0

    def request(self, attempt: int) -> ChatRequest:
        return ChatRequest(self.messages, self.parameters, self.first_attempt + attempt)


@dataclass(frozen=True)
class ChatModel:
    """Any model behind a server with OpenAI's chat API, and the parameters of its requests."""

    model: str = ""
    """Name of the model on the server. There is no default, because models come and go."""
    base_url: str = ""
    """Address of the server's API, such as http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL, or OpenAI's own."""
    max_new_tokens: int = 2048
    """Maximum number of tokens of an answer, hidden reasoning included."""
    temperature: float | None = None
    """Sampling temperature; sent only if given, because many models refuse it."""
    max_requests: int | None = None
    """Maximum number of requests of this command."""
    server: Annotated[Server, tyro.conf.arg(name="")] = field(default_factory=Server)

    def check(self) -> None:
        """Raises UserError for an invalid option."""
        if not self.model:
            raise UserError("name the model that is asked with --model NAME")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}: it must be at least 1")
        if self.max_requests is not None and self.max_requests < 0:
            raise UserError(f"--max-requests is {self.max_requests}: it cannot be negative")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be a number from 0")
        self.server.check()

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of a request."""
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"max_completion_tokens": self.max_new_tokens, **temperature}

    def ask(self, jobs: Sequence[ChatJob], log: AnswerLog, budget: Budget, unit: str, attempts: int,
            accept: Callable[[ChatJob, Response], bool], rejects: Counter[str] | None = None
            ) -> dict[Hashable, RequestFailed]:
        """Asks the jobs without an answer in the log. Returns the failures by key of their job.

        A response that `accept` does not accept is asked for again, up to `attempts` times. Progress shows `rejects`.
        Raises Unfinished if the user or a limit stopped the run.
        """
        failures: dict[Hashable, RequestFailed] = {}
        rejects = Counter() if rejects is None else rejects

        def record(job: ChatJob, attempt: int, response: Response | RequestFailed) -> bool:
            if isinstance(response, RequestFailed):
                failures[job.key] = response
                rejects["request_failed"] += 1
                return True
            return accept(job, response) or attempt + 1 >= attempts

        cancel = CancelToken()
        progress = Progress(len(jobs), unit=unit, note=lambda: budget.summary(rejects))
        with closing(progress):
            ending = asyncio.run(self._ask(jobs, log, record, budget, progress, cancel))
        if ending == "interrupted":
            raise Unfinished("stopped; the same command goes on", code_of(cancel))
        if ending != "done":
            raise Unfinished(f"--max-requests {self.max_requests} are used up; the same command goes on", OVER_BUDGET)
        return failures

    async def _ask(self, jobs: Sequence[ChatJob], log: AnswerLog, record: Any, budget: Budget, progress: Progress,
                   cancel: CancelToken) -> Ending:
        async with self.server.open(self.model, self.base_url, cancel) as endpoint:
            for line in await endpoint.check():
                note(line)
            with cancel.handle_signals():
                try:
                    return await answer_all(jobs, endpoint, log, record, concurrency=self.server.concurrency,
                                            budget=budget, cancel=cancel, progress=progress)
                finally:
                    for line in endpoint.notes:
                        note(line)


def require_answers(failures: Sequence[str], num_asked: int, unit: str, how_to_continue: str) -> None:
    """Raises Unfinished if requests got no answer, EndpointStopped if none of them did."""
    check_answered(num_asked, failures)
    if failures:
        raise Unfinished(f"{len(failures):,} of {num_asked:,} {unit} got no answer, the first is "
                         f"{printable(failures[0])}; {how_to_continue}", UNANSWERED)
