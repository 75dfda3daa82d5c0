"""Options and exit codes that all commands with a server share."""

import asyncio
import dataclasses
import signal
import sys
from collections.abc import Sequence

from llava_jax.cli import STOPPED, printable
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import Endpoint, read_key
from llava_jax.endpoint.errors import EndpointStopped
from llava_jax.errors import UserError

UNANSWERED, OVER_BUDGET, INTERRUPTED = 1, 3, 130
"""Exit codes, besides STOPPED of cli.py."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Options for the server of a model. Call `check` before use."""

    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key. Local servers may need none."""
    concurrency: int = 50
    """Number of concurrent requests."""
    requests_per_minute: float | None = None
    """Maximum number of requests a minute that the account allows; never exceeded."""
    tokens_per_minute: float | None = None
    """Maximum number of tokens a minute that the account allows, prompts and answers together."""
    timeout: float = 600.0
    """Number of seconds until a try without an answer fails."""
    retries: int = 8
    """Number of further tries after errors of the server or the network."""

    def check(self) -> None:
        """Raises UserError, one line, for invalid values."""
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")

    def open(self, model: str, base_url: str = "", cancel: CancelToken | None = None) -> Endpoint:
        """Returns the model's Endpoint. "" is OPENAI_BASE_URL or OpenAI itself. Raises UserError as Endpoint does."""
        key = read_key(self.api_key_env, required=self.api_key_env != Server.api_key_env)
        return Endpoint(
            model, base_url or None, key, timeout=self.timeout, retries=self.retries, cancel=cancel,
            requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute,
        )

    def check_model(self, model: str, base_url: str = "") -> None:
        """Checks before any work that the model answers. Raises UserError, one line, if it does not."""

        async def check() -> list[str]:
            async with self.open(model, base_url) as endpoint:
                return await endpoint.check()

        for warning in asyncio.run(check()):
            note(warning)


def note(line: str) -> None:
    """Prints a note of a server, a file or a command on stderr."""
    print(f"note: {printable(line)}", file=sys.stderr)


def check_answered(asked: int, failures: Sequence[str]) -> None:
    """Raises EndpointStopped if none of `asked` requests was answered. `failures` are the reasons, in order."""
    if failures and len(failures) >= asked:
        raise EndpointStopped(f"none of {asked:,} requests was answered, the first for {failures[0]}")


def code_of(cancel: CancelToken) -> int:
    """Returns the exit code of a command that a signal stopped."""
    return INTERRUPTED if cancel.signal == signal.SIGINT else STOPPED
