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

TOKENS_PER_MESSAGE = 16  # that a chat format puts around a message, at most
MOST_TOKENS = 10**7  # of a request; a server that counts more does not count tokens
MOST_BYTES = 8  # of text that a token has on average, as far as a server's count is believed

WRITTEN = ("content", "refusal", "reasoning_content", "reasoning")  # fields of a message that the model wrote

OWN = ("model", "messages", "stream", "n")  # fields of a body that are not the caller's to set


@dataclasses.dataclass(frozen=True)
class ChatRequest:
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
    def most_tokens(self) -> int:
        """More tokens than the prompt can have: one for every byte, and the format's."""
        return self.bytes + TOKENS_PER_MESSAGE * (len(self.messages) + 1)

    @property
    def text_bytes(self) -> int:
        """Length of the messages' text alone."""
        return sum(_bytes(message["content"], 0) for message in self.messages)

    @property
    def longest(self) -> int | None:
        """How many tokens the answer may have, if that is limited."""
        return self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))


@dataclasses.dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
      text: empty if a reasoning model thought until its limit (finish_reason is "length" then).
      finish_reason: "stop", "length", "content_filter", ... as the server says.
      prompt_tokens, completion_tokens: as the server counts them; thoughts are part of the completion.
      cached_tokens: those of the prompt that the server had cached.
      model, fingerprint: what answered, which is often a dated version of what was asked.
      created: when, in seconds since 1970.
      batch: whether it came from a Batch API, at that price.
      estimated: whether the server counts no tokens, or fewer than one for MOST_BYTES of text. They are then one for
        every byte, which is more than any tokenizer makes.
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
        """A reply as a log keeps it. Raises TypeError for fields that are missing, unknown or of another type."""
        if not isinstance(fields, dict):
            raise TypeError("no object")
        reply = cls(**fields)
        for field in dataclasses.fields(cls):
            value = fields.get(field.name, field.default)
            if type(value) not in FIELD_TYPES[field.name] or isinstance(value, int) and value < 0:
                raise TypeError(f"{field.name} is {value!r:.40}")
        if reply.created > LATEST:
            raise TypeError(f"created is {reply.created}")
        return reply


FIELD_TYPES = {"text": (str,), "finish_reason": (str,), "prompt_tokens": (int,), "cached_tokens": (int,),
               "completion_tokens": (int,), "model": (str,), "fingerprint": (str, type(None)), "created": (int,),
               "batch": (bool,), "estimated": (bool,)}  # fmt: skip


def parse_response(body: Any, batch: bool = False, prompt: ChatRequest | None = None) -> Response:
    """A Response from the body of a chat completion. Raises UserError if it is none.

    Only the text must be there, for it has been paid. Tokens that a server does not count, or miscounts, are estimated
    if it is the answer to `prompt`, else 0; a refusal that stands in its own field is the text; a date that is none is
    now.
    """
    try:
        choice = body["choices"][0]
        text = _text(choice["message"].get("content")) or _text(choice["message"].get("refusal"))
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"no chat completion: {json.dumps(body, default=str):.200}") from None
    usage = _object(body.get("usage"))
    prompted, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    estimated = False
    if prompt is not None:
        messages = [_object(_object(choice).get("message")) for choice in body["choices"]]
        written = sum(_length(message.get(name)) for message in messages for name in WRITTEN)
        if not _is_plausible(prompted, prompt.text_bytes):
            prompted, estimated = prompt.most_tokens, True
        if not _is_plausible(completion, written):
            completion, estimated = written + TOKENS_PER_MESSAGE, True
    cached = _count(_object(usage.get("prompt_tokens_details")).get("cached_tokens"))
    fingerprint = body.get("system_fingerprint")
    return Response(
        text=text,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=prompted,
        cached_tokens=0 if estimated else min(cached, prompted),
        completion_tokens=completion,
        model=str(body.get("model") or ""),
        fingerprint=None if fingerprint is None else str(fingerprint),
        created=_count(body.get("created"), LATEST) or int(time.time()),
        batch=batch,
        estimated=estimated,
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


def _count(value: Any, most: float = MOST_TOKENS) -> int:
    """A number that a server tells beside the text; 0 for what can be none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and 0 <= value <= most else 0


def _is_plausible(tokens: int, text_bytes: int) -> bool:
    """Whether a server that counts so many tokens of so much text can be believed not to count too few."""
    return tokens * MOST_BYTES >= text_bytes


def _bytes(content: str | list[dict[str, Any]], image: int = BYTES_PER_IMAGE) -> int:
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    return sum(_bytes(part["text"]) if part.get("type") == "text" else image for part in content)


def _length(content: Any) -> int:
    """Bytes of text in a field of a message, whatever else is in it."""
    try:
        return _bytes(_text(content))
    except (TypeError, AttributeError):
        return 0
