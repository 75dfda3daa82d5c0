"""A language model at a server, as the commands of benchmarks ask it: options, and one call for many questions."""

import asyncio
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.run import AnswerJob, Ending, RecordAnswer, answer_all
from llava_jax.endpoint.server import OVER_BUDGET, Server, code_of, note
from llava_jax.errors import UserError
from llava_jax.progress import Progress


class Unfinished(Exception):
    """The run was stopped before all was asked; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ChatModel:
    """Any model behind a server that speaks OpenAI's chat API, and how it is asked."""

    model: str = ""
    """name of the model, as the server knows it; there is no default, for models come and go"""
    base_url: str = ""
    """address of the server's API, such as http://127.0.0.1:8000/v1; OPENAI_BASE_URL or OpenAI's own if empty"""
    max_tokens: int = 2048
    """of an answer, hidden reasoning included"""
    temperature: float | None = None
    """sent only if given: many models refuse it"""
    max_requests: int | None = None
    """requests that this command may start"""
    server: Annotated[Server, tyro.conf.arg(name="")] = field(default_factory=Server)

    def check(self) -> None:
        """Raises UserError, one line, for what cannot be meant."""
        if not self.model:
            raise UserError("name the model that is asked with --model NAME")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens is {self.max_tokens}: it must be at least 1")
        if self.max_requests is not None and self.max_requests < 0:
            raise UserError(f"--max-requests is {self.max_requests}: it cannot be negative")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be a number from 0")
        self.server.check()

    @property
    def parameters(self) -> dict[str, Any]:
        """Of a request."""
        heat = {} if self.temperature is None else {"temperature": self.temperature}
        return {"max_completion_tokens": self.max_tokens, **heat}

    def ask(self, jobs: Sequence[AnswerJob], log: AnswerLog, record: RecordAnswer, budget: Budget,
            progress: Progress) -> None:
        """`answer_all`, with what it found out told on stderr. Raises Unfinished where the user or a limit ended it."""
        cancel = CancelToken()
        with closing(progress):
            ending = asyncio.run(self._ask(jobs, log, record, budget, progress, cancel))
        if ending == "done":
            return
        if ending == "interrupted":
            raise Unfinished("stopped; the same command goes on", code_of(cancel))
        raise Unfinished(f"--max-requests {self.max_requests} are used up; the same command goes on", OVER_BUDGET)

    async def _ask(self, jobs: Sequence[AnswerJob], log: AnswerLog, record: RecordAnswer, budget: Budget,
                   progress: Progress, cancel: CancelToken) -> Ending:
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
