"""Converts between OpenAI's JSON and dataclasses. Requests are checked field by field."""

import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import Finished, TokenLogprob
from llava_jax.serve.limits import Limits

MAX_VALUES = 200_000
"""Maximum number of commas and brackets of a request, because each small JSON value costs up to 64 bytes."""
MAX_TOP_LOGPROBS = 20
MIN_TOP_P = 1e-6
"""Value for `top_p` 0, which OpenAI allows: only the most likely token."""
MIN_LOGPROB = -9999.0
"""Reported instead of a smaller log-probability, because JSON has no infinity."""
INT64 = 2**63
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
USED = frozenset((
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "stream",
    "stream_options", "logprobs", "top_logprobs", "user"))
"""Fields that have an effect, and `user`, which has none at OpenAI either."""
REFUSED: dict[str, tuple] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "repetition_penalty": (1,), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],), "structured_outputs": (), "grammar": (),
    "json_schema": (), "prompt_embeds": (), "best_of": (1,), "use_beam_search": (False,), "top_k": (0, -1),
    "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],), "allowed_token_ids": ([],),
    "bad_words": ([],), "logits_processors": ([],), "prompt_logprobs": (0,), "echo": (False,),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "mm_processor_kwargs": ({},),
}
"""Fields that would change the answer and are not supported -> their values without an effect, besides null."""
REFUSED_PREFIX = "guided_"
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request.

    Attributes:
      messages: roles "system" (only the first), then "user" and "assistant" in turn, "user" the last. A content is a
        string, or a list of {"type": "text", "text": str} and {"type": "image"}.
      images: (URL, field) of every image part, in order.
      max_tokens: None if the request has none.
      logprobs: number of most likely tokens to report, or None for no log-probabilities.
      ignored: names of unknown fields.
    """

    model: str | None
    messages: list[dict[str, Any]]
    images: list[tuple[str, str]]
    max_tokens: int | None
    temperature: float
    top_p: float
    n: int
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    ignored: tuple[str, ...]


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request's body. Raises ApiError 400."""
    if sum(map(body.count, (b",", b"{", b"["))) > MAX_VALUES:
        raise ApiError(400, f"The body has more than {MAX_VALUES:,} commas and brackets.")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body is not a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are no JSON


def parse_chat(body: Mapping[str, Any], limits: Limits) -> CompletionRequest:
    """Returns the checked request of POST /v1/chat/completions. Raises ApiError 400 that names the field.

    `temperature` is 0 by default, as in `Llava.generate`; OpenAI's default is 1.
    """
    for name, value in body.items():
        neutral = REFUSED.get(name, () if name.startswith(REFUSED_PREFIX) else None)
        if neutral is not None and value is not None and not any(_same(value, other) for other in neutral):
            name = name if SAFE_NAME.fullmatch(name) else REFUSED_PREFIX
            raise ApiError(400, f"{name} is not supported by this server.", name, "unsupported_parameter")
    messages, images = _parse_messages(body.get("messages"), limits)
    max_tokens = _integer(body, "max_completion_tokens", 1)
    limit = _integer(body, "max_tokens", 1)
    seed = _integer(body, "seed", -INT64, INT64 - 1)
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object.", "stream_options")
    top_p = _number(body, "top_p", 1.0, 0, 1)
    return CompletionRequest(
        model=None if body.get("model") is None else _text(body["model"], "model"),
        messages=messages,
        images=images,
        max_tokens=limit if max_tokens is None else max_tokens,
        temperature=_number(body, "temperature", 0.0, 0, 2),
        top_p=max(top_p, MIN_TOP_P),
        n=_integer(body, "n", 1, limits.choices) or 1,
        stop=_parse_stop(body.get("stop"), limits),
        seed=secrets.randbits(31) if seed is None else seed,
        stream=stream,
        include_usage=stream and _flag(options or {}, "include_usage", "stream_options."),
        logprobs=_parse_logprobs(body),
        ignored=tuple(name for name in body if name not in USED and name not in REFUSED
                      and not name.startswith(REFUSED_PREFIX)),
    )


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _integer(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or high is not None and value > high:
        between = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ApiError(400, f"{name} must be an integer {between}.", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}.", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{prefix}{name} must be true or false.", prefix + name)
    return bool(value)


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{param} must be a string.", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} contains a lone surrogate, which is no character.", param) from None
    return value


def _parse_stop(stop: Any, limits: Limits) -> tuple[str, ...]:
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise ApiError(400, "stop must be a string or a list of strings.", "stop")
    if len(stop) > limits.stop_strings:
        raise ApiError(400, f"stop may have at most {limits.stop_strings} strings.", "stop")
    for i, text in enumerate(stop):
        if not 0 < len(_text(text, f"stop[{i}]")) <= limits.stop_characters:
            raise ApiError(400, f"stop[{i}] must have 1 to {limits.stop_characters} characters.", f"stop[{i}]")
    return tuple(stop)


def _parse_logprobs(body: Mapping[str, Any]) -> int | None:
    top = _integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if _flag(body, "logprobs"):
        return top or 0
    if top:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
    return None


def _parse_messages(messages: Any, limits: Limits) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Returns messages whose roles alternate, because adjacent ones of a role are joined by a newline, and images."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", "messages")
    if len(messages) > limits.messages:
        raise ApiError(400, f"messages may have at most {limits.messages} messages.", "messages")
    joined: list[dict[str, Any]] = []
    images: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        role, parts = _parse_message(message, param, images, limits)
        if role == "system" and joined and joined[-1]["role"] != "system":
            raise ApiError(400, f"{param}: system messages are only allowed before the first user message.", param)
        if role == "assistant" and (not joined or joined[-1]["role"] == "system"):
            raise ApiError(400, f"{param}: the first message besides system messages must be the user's.", param)
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += parts
        else:
            joined.append({"role": role, "content": parts})
    if joined[-1]["role"] == "assistant":
        raise ApiError(400, "The last message must be the user's; an assistant's message is not continued.", param)
    if joined[-1]["role"] == "system":
        raise ApiError(400, "messages must have a user message.", "messages")
    return joined, images


def _parse_message(message: Any, param: str, images: list[tuple[str, str]],
                   limits: Limits) -> tuple[str, list[dict[str, str]]]:
    """Returns the role and the parts of a message, and adds its images to `images`."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{param} must be an object with role and content.", param)
    role = ROLES.get(_text(message.get("role"), f"{param}.role"))
    if role is None:
        raise ApiError(400, f"{param}.role must be system, developer, user or assistant.", f"{param}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"{param}.{name} is not supported by this server.", f"{param}.{name}")
    content, where = message.get("content"), f"{param}.content"
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a string or a list of parts.", where)
    parts = [_parse_part(part, f"{where}[{j}]", role, images, limits) for j, part in enumerate(content)]
    parts = [part for part in parts if part.get("text") != ""]
    if role != "system" and not parts:
        raise ApiError(400, f"{where} is empty: a {role} message needs text{' or an image' * (role == 'user')}.", where)
    return role, parts


def _parse_part(part: Any, param: str, role: str, images: list[tuple[str, str]], limits: Limits) -> dict[str, str]:
    """Returns {"type": "text", "text": str} or {"type": "image"}, whose URL it adds to `images`."""
    if not isinstance(part, dict):
        raise ApiError(400, f"{param} must be an object with a type.", param)
    kind = _text(part.get("type"), f"{param}.type")
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"{param}.text")}
    if kind != "image_url":
        raise ApiError(400, f"{param}.type must be text or image_url.", f"{param}.type")
    if role != "user":
        raise ApiError(400, f"{param}: only user messages may have images.", param)
    if len(images) == limits.images:
        raise ApiError(400, f"At most {limits.images} image(s) may be provided in one request.", param)
    url = part.get("image_url")
    nested = isinstance(url, dict)  # some clients send the URL itself
    where = f"{param}.image_url.url" if nested else f"{param}.image_url"
    images.append((_text(url.get("url") if nested else url, where), where))
    return {"type": "image"}


def ignored_header(names: Sequence[str]) -> str:
    """Returns the value of the header that lists ignored fields. Names that are unsafe in a header are counted."""
    safe = [name for name in names if SAFE_NAME.fullmatch(name)][:16]
    return ", ".join([*safe, *([f"{len(names) - len(safe)} more"] if len(safe) < len(names) else [])])


def usage(answers: Sequence[Finished]) -> dict[str, Any]:
    """Returns OpenAI's usage of a request. Its choices share one prompt, which counts once."""
    prompt = max(answer.prompt_tokens for answer in answers)
    written = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens, "image_tokens": answers[0].image_tokens},
    }


def logprobs_content(logprobs: Iterable[TokenLogprob], token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """Returns OpenAI's `logprobs` of a choice. `token_bytes(id)` returns the bytes of a token's text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        value = MIN_LOGPROB if math.isnan(logprob) else max(MIN_LOGPROB, logprob)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": value, "bytes": list(data)}

    return {"content": [entry(item.token, item.logprob) | {"top_logprobs": [entry(*top) for top in item.top]}
                        for item in logprobs], "refusal": None}
