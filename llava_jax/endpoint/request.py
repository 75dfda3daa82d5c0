"""Requests to a chat API, their responses, and the key by which a log finds the response to a request."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from llava_jax.errors import UserError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": str, or a list of parts as the chat API has them}"""

BYTES_PER_TOKEN = 4
"""Number of bytes per token of English. Limits of rate and cost start with it, and learn from responses."""
BYTES_PER_IMAGE = 4096
"""Number of bytes that a part with an image counts as."""
TOKENS_PER_MESSAGE = 16
"""Maximum number of tokens that a chat format adds to a message."""
MAX_TOKENS = 10**7
"""Maximum number of tokens of a request. A server that counts more does not count tokens."""
MAX_BYTES_PER_TOKEN = 8
"""Maximum number of bytes per token, on average, in a count that is believed."""
MAX_TIME = 253402300799
"""Last second of the year 9999, since 1970."""

WRITTEN_FIELDS = ("content", "refusal", "reasoning_content", "reasoning")
"""Fields of a message that the model wrote."""
RESERVED_FIELDS = ("model", "messages", "stream", "n")
"""Fields of a body that a caller must not set."""


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """One question to a chat API.

    Attributes:
      messages: Conversation so far. Messages that many requests share come first, so that servers can cache them.
      parameters: Further fields of the body, such as {"max_completion_tokens": 1024}.
      attempt: 0, 1, ... for requests of equal content that want another answer.
    """

    messages: tuple[Message, ...]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attempt: int = 0

    def __post_init__(self) -> None:
        for name in RESERVED_FIELDS:
            if name in self.parameters:
                raise UserError(f"parameters: {name!r} cannot be set here")

    def key(self, model: str) -> str:
        """Returns the SHA-256 digest, in hex, of everything that the answer depends on."""
        content = {"model": model, "parameters": dict(self.parameters), "messages": self.messages}
        if self.attempt:
            content["attempt"] = self.attempt
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Number of bytes of the messages' text in UTF-8, with BYTES_PER_IMAGE for every image."""
        return sum(_count_bytes(message["content"]) for message in self.messages)

    @property
    def text_bytes(self) -> int:
        """Number of bytes of the messages' text alone."""
        return sum(_count_bytes(message["content"], 0) for message in self.messages)

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of the prompt: one for every byte, and the chat format's."""
        return self.bytes + TOKENS_PER_MESSAGE * (len(self.messages) + 1)

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens of the answer, if it is limited."""
        return self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))


@dataclasses.dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
      text: The answer; empty if a reasoning model reached its limit while thinking (finish_reason is "length" then).
      finish_reason: "stop", "length", "content_filter", ... as the server says.
      prompt_tokens, completion_tokens: Counts of the server. Hidden reasoning is part of the completion.
      cached_tokens: Number of prompt tokens that the server had cached.
      model, fingerprint: What answered, which is often a dated version of the model.
      created: Time in seconds since 1970.
      batch: Whether the answer came from a Batch API, at its price.
      estimated: Whether the server counts no tokens, or fewer than one per MAX_BYTES_PER_TOKEN. The counts are then
        one token per byte, which is more than any tokenizer makes.
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
    estimated: bool = False

    @classmethod
    def from_json(cls, fields: Any) -> "Response":
        """Reads a response from a log. Raises TypeError if fields are missing, unknown or of another type."""
        if not isinstance(fields, dict):
            raise TypeError("no object")
        response = cls(**fields)
        for field in dataclasses.fields(cls):
            value = getattr(response, field.name)
            kinds = (str, type(None)) if field.name == "fingerprint" else (field.type,)
            if type(value) not in kinds or isinstance(value, int) and value < 0:
                raise TypeError(f"{field.name} is {value!r:.40}")
        if response.created > MAX_TIME:
            raise TypeError(f"created is {response.created}")
        return response


def parse_response(body: Any, batch: bool = False, prompt: ChatRequest | None = None) -> Response:
    """Reads a Response from the body of a chat completion. Raises UserError if the body is none.

    Only the text is required, because it has been paid for. Tokens that a server does not count, or miscounts, are
    estimated if `prompt` is given, otherwise 0. A refusal in a field of its own is the text. An invalid date becomes
    now.
    """
    try:
        choice = body["choices"][0]
        text = _join_text(choice["message"].get("content")) or _join_text(choice["message"].get("refusal"))
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"no chat completion: {json.dumps(body, default=str):.200}") from None
    usage = _object(body.get("usage"))
    prompt_tokens, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    estimated = False
    if prompt is not None:
        messages = [_object(_object(choice).get("message")) for choice in body["choices"]]
        written = sum(_written_bytes(message.get(name)) for message in messages for name in WRITTEN_FIELDS)
        if prompt_tokens * MAX_BYTES_PER_TOKEN < prompt.text_bytes:
            prompt_tokens, estimated = prompt.max_prompt_tokens, True
        if completion * MAX_BYTES_PER_TOKEN < written:
            completion, estimated = written + TOKENS_PER_MESSAGE, True
    cached = _count(_object(usage.get("prompt_tokens_details")).get("cached_tokens"))
    fingerprint = body.get("system_fingerprint")
    return Response(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=prompt_tokens,
        cached_tokens=0 if estimated else min(cached, prompt_tokens),
        completion_tokens=completion,
        model=str(body.get("model") or ""),
        fingerprint=None if fingerprint is None else str(fingerprint),
        created=_count(body.get("created"), MAX_TIME) or int(time.time()),
        batch=batch,
        estimated=estimated,
    )


def _join_text(content: Any) -> str:
    """Returns a message's content as text, from a text or from a list of parts."""
    if isinstance(content, list):
        return "".join(_join_text(part.get("text")) for part in content)
    if not isinstance(content, str | None):
        raise TypeError("neither text nor parts")
    return content or ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, most: float = MAX_TOKENS) -> int:
    """Returns a server's number, or 0 if it is invalid."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and 0 <= value <= most else 0


def _count_bytes(content: str | list[dict[str, Any]], image: int = BYTES_PER_IMAGE) -> int:
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    return sum(_count_bytes(part["text"]) if part.get("type") == "text" else image for part in content)


def _written_bytes(content: Any) -> int:
    """Returns the number of bytes of text in a field of a message, of any type."""
    try:
        return _count_bytes(_join_text(content))
    except (TypeError, AttributeError):
        return 0
