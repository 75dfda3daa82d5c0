"""What is asked of a chat API, what comes back, and the key by which a log knows one from the other."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": str, or a list of parts as the chat API has them}"""

BYTES_PER_TOKEN = 4  # of English; only limits of rate and cost are reckoned with it, and both learn from replies
BYTES_PER_IMAGE = 4096  # that a part with an image counts as

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
                raise ValueError(f"parameters: {name!r} cannot be set here")

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
    """A Reply from the body of a chat completion. Raises ValueError if it is none.

    Servers that count no tokens get zeros; a refusal that stands in its own field is the text.
    """
    if not isinstance(body, dict) or not body.get("choices"):
        raise ValueError(f"no chat completion: {json.dumps(body, default=str):.200}")
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        return Reply(
            text=choice["message"].get("content") or choice["message"].get("refusal") or "",
            finish_reason=choice.get("finish_reason") or "stop",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            model=str(body.get("model") or ""),
            fingerprint=body.get("system_fingerprint"),
            created=int(body.get("created") or 0),
            batch=batch,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no chat completion ({error!r}): {json.dumps(body):.200}") from None


def _bytes(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    return sum(_bytes(part["text"]) if part.get("type") == "text" else BYTES_PER_IMAGE for part in content)
