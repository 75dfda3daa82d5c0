"""What is asked of a chat API, what comes back, and the key by which a log knows one from the other."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from llava_jax.errors import UserError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": str, or a list of parts as the chat API has them}"""

BYTES_PER_TOKEN = 4  # of English; only limits of rate and cost are reckoned with it, and both learn from replies
BYTES_PER_IMAGE = 4096  # that a part with an image counts as

LATEST = 253402300799  # the last second of the year 9999

OWN = ("model", "messages", "stream", "n")  # fields of a body that are not the caller's to set


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a chat API.

    Attributes:
      messages: the conversation so far; what many requests share goes first, so that servers can cache it.
      parameters: further fields of the body, such as {"max_completion_tokens": 1024}. A temperature is only sent if
        it stands here.
      attempt: 0, 1, ... tells requests of equal content apart when one more answer is wanted.
    """

    messages: tuple[Message, ...]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attempt: int = 0

    def __post_init__(self) -> None:
        for name in OWN:
            if name in self.parameters:
                raise UserError(f"parameters: {name!r} cannot be set here")

    def key(self, model: str) -> str:
        """SHA-256, in hexadecimal digits, of all that the answer depends on: equal requests have equal keys."""
        content = {"model": model, "parameters": dict(self.parameters), "messages": self.messages}
        if self.attempt:
            content["attempt"] = self.attempt
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Length of the messages' text in UTF-8, with BYTES_PER_IMAGE for each image."""
        return sum(_bytes(message["content"]) for message in self.messages)

    @property
    def longest(self) -> int | None:
        """How many tokens the answer may have, if that is limited."""
        return self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
      text: empty if a reasoning model thought until its limit (finish_reason is "length" then).
      finish_reason: "stop", "length", "content_filter", ... as the server says.
      prompt_tokens, completion_tokens: as billed; thoughts are part of the completion.
      cached_tokens: those of the prompt that the server had cached.
      model, fingerprint: what answered, which is often a dated version of what was asked.
      created: when, in seconds since 1970.
      batch: whether it came from a Batch API, at that price.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    model: str
    fingerprint: str | None
    created: int
    batch: bool = False


def read_reply(body: Any, batch: bool = False) -> Reply:
    """A Reply from the body of a chat completion. Raises UserError if it is none.

    Only the text must be there, for it has been paid. Tokens that a server does not count, or miscounts, are 0; a
    refusal that stands in its own field is the text; a date that is none is now.
    """
    try:
        choice = body["choices"][0]
        text = _text(choice["message"].get("content")) or _text(choice["message"].get("refusal"))
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"no chat completion: {json.dumps(body, default=str):.200}") from None
    usage = _object(body.get("usage"))
    prompt, fingerprint = _count(usage.get("prompt_tokens")), body.get("system_fingerprint")
    cached = _count(_object(usage.get("prompt_tokens_details")).get("cached_tokens"))
    return Reply(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=prompt,
        cached_tokens=min(cached, prompt),
        completion_tokens=_count(usage.get("completion_tokens")),
        model=str(body.get("model") or ""),
        fingerprint=None if fingerprint is None else str(fingerprint),
        created=_count(body.get("created"), LATEST) or int(time.time()),
        batch=batch,
    )


def _text(content: Any) -> str:
    """Of a message's content: a text, or a list of parts, of which those count that have one."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content)
    if not isinstance(content, str | None):
        raise TypeError("neither text nor parts")
    return content or ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, most: float = 1e12) -> int:
    """A number that a server tells beside the text; 0 for what can be none."""
    return int(value) if isinstance(value, int | float) and 0 <= value <= most else 0


def _bytes(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    return sum(_bytes(part["text"]) if part.get("type") == "text" else BYTES_PER_IMAGE for part in content)
