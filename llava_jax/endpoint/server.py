"""What the commands that ask a server share: options of how it is asked, and exit codes of what ended them."""

import asyncio
import dataclasses
import signal
import sys
from collections.abc import Sequence

from llava_jax.cli import printable
from llava_jax.endpoint.cancel import TERMINATED, CancelToken
from llava_jax.endpoint.client import Endpoint, read_key
from llava_jax.endpoint.errors import EndpointStopped
from llava_jax.errors import UserError

UNANSWERED, OVER_BUDGET, INTERRUPTED = 1, 3, 130  # exit codes beside TERMINATED


@dataclasses.dataclass(frozen=True)
class Server:
    """How a model's server is asked. `check` before use."""

    api_key_env: str = "OPENAI_API_KEY"
    """environment variable with the API key; local servers may want none"""
    concurrency: int = 50
    """requests at a time"""
    requests_per_minute: float | None = None
    """limit of the account, which is kept to"""
    tokens_per_minute: float | None = None
    """likewise, of prompts and answers together"""
    timeout: float = 600.0
    """seconds that an answer may take"""
    retries: int = 8
    """how often a request is sent again after errors of the server or the network"""

    def check(self) -> None:
        """Raises UserError, one line, for what cannot be meant."""
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")

    def open(self, model: str, base_url: str = "", cancel: CancelToken | None = None) -> Endpoint:
        """The model there; "" is OPENAI_BASE_URL or OpenAI itself. Raises what Endpoint raises."""
        key = read_key(self.api_key_env, required=self.api_key_env != Server.api_key_env)
        return Endpoint(
            model, base_url or None, key, timeout=self.timeout, retries=self.retries, cancel=cancel,
            requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute,
        )

    def look(self, model: str, base_url: str = "") -> None:
        """Finds out, before any work, whether the model can be asked. Raises UserError, one line, if not."""

        async def check() -> list[str]:
            async with self.open(model, base_url) as endpoint:
                return await endpoint.check()

        for warning in asyncio.run(check()):
            note(warning)


def note(line: str) -> None:
    """Tells on stderr what a server, a file or this command has to say beside its work."""
    print(f"note: {printable(line)}", file=sys.stderr)


def check_answered(asked: int, failures: Sequence[str]) -> None:
    """Raises EndpointStopped if of so many requests none was answered; `failures`: why, the first first."""
    if failures and len(failures) >= asked:
        raise EndpointStopped(f"none of {asked:,} requests was answered, the first for {failures[0]}")


def code_of(cancel: CancelToken) -> int:
    """The exit code of a command that a signal stopped."""
    return INTERRUPTED if cancel.signal == signal.SIGINT else TERMINATED
