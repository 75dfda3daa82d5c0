"""Client of a server with OpenAI's chat API: rate limits, retries, errors, and parameters that the server refuses."""

import asyncio
import datetime
import difflib
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar

from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.errors import BudgetExceededError, EndpointStopped, RequestFailed
from llava_jax.endpoint.limits import RateLimit, backoff, retry_after
from llava_jax.endpoint.request import BYTES_PER_TOKEN, ChatRequest, Response, parse_response
from llava_jax.endpoint.secret import Secret
from llava_jax.errors import UserError

T = TypeVar("T")

NO_SECRET = Secret(None)
OPENAI = "api.openai.com"
CONNECT_TIMEOUT = 10.0
MAX_ANSWER_BYTES = 2**24
"""Maximum number of bytes, decompressed, of one answer or of one line in a file of answers."""
MAX_RETRY_AFTER = 3600.0
"""Maximum number of seconds that a server may ask to wait. A longer wait ends the run."""
RATE_LIMIT_PATIENCE = 900.0
"""Seconds of "too many requests" without an answer to any request, after which a request fails."""
FIRST_COMPLETION = 500
"""Number of tokens that an answer is expected to have before the first answer."""
CROWDED = 3
"""Number of consecutive refusals with a Retry-After after which all requests wait."""
LEARNING_RATE = 0.02
"""Weight of a new answer in the expected number of tokens."""
LIMITS = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}
"""Two names of the same parameter."""
TRANSIENT_CODES = (408, 409, 425, 429)
"""HTTP codes of refusals that may pass, besides all codes from 500 on."""
REFUSED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|extra[ _](inputs?|fields?|forbidden)"
    r"|not permitted|not allowed|does not accept",
    re.IGNORECASE,
)


class InvalidResponseError(ValueError):
    """Raised if an answer is invalid. `received_bytes` is its length."""

    def __init__(self, message: str, received_bytes: int):
        super().__init__(message)
        self.received_bytes = received_bytes


class Endpoint:
    """One model behind an OpenAI-compatible API.

    Args:
      model: Name of the model on the server.
      base_url: Address such as "http://127.0.0.1:8000/v1"; None is OPENAI_BASE_URL or OpenAI itself.
      api_key: API key, or None for servers that need none; see `read_key`.
      timeout: Seconds that one try may take.
      retries: Number of further tries after errors of the server or the network, with back-off. "Too many requests"
        does not count: such requests wait as long as other requests get answers.
      requests_per_minute, tokens_per_minute: Limits of the account; None is no limit. Tokens are estimated before a
        request, from the answers so far, and corrected after it.
      cancel: Requests that wait, for their turn or for another try, raise NotSentError if it is requested.
      transport: HTTP transport, for tests.

    Attributes:
      notes: Parameters that the server refuses, one line each.
      secret: Hides the API key in everything that the server says, except in lines of files.

    Raises UserError if the openai package or the key is missing, or if the key or the address is invalid.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        retries: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        cancel: CancelToken | None = None,
        transport: Any = None,
    ):
        try:
            import openai
        except ImportError:
            raise UserError("the openai package is missing: pip install 'llava_jax[teacher]'") from None
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if address and not _is_address(address):
            name = "--base-url" if base_url else "OPENAI_BASE_URL"
            raise UserError(f"{name} {without_password(address)}: not the address of an API, such as http://127.0.0.1:8000/v1")
        self.model, self.cancel, self.notes, self.secret = model, cancel or CancelToken(), list[str](), Secret(api_key)
        self.client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=CONNECT_TIMEOUT),
            http_client=_client_that_hides(self.secret)(**({"transport": transport} if transport else {})),
        )
        if api_key is None and self.client.base_url.host == OPENAI:
            raise UserError("OpenAI wants an API key: set OPENAI_API_KEY, or name its variable by --api-key-env")
        self._key, self._timeout, self._retries = api_key, timeout, retries
        self._limit = RateLimit(requests_per_minute, tokens_per_minute)
        self._renamed: dict[str, str | None] = {}  # refused parameter -> accepted name
        self._tokens_per_byte, self._completion = 1 / BYTES_PER_TOKEN, float(FIRST_COMPLETION)
        self._answers = self._refusals = 0
        self._last_answer = -float("inf")  # by the loop's clock

    async def check(self) -> list[str]:
        """Checks that the model can be asked, without cost. Returns warnings, one line each.

        Raises UserError, one line, if nothing answers at the address, the key is missing or refused, the quota is used
        up, there is no chat API, or the server has no such model (the message names similar ones).
        """
        import openai

        warnings, names = [], list[str]()
        try:
            models = await self.call(self._models, retries=2)
            names = [str(model.get("id")) for model in models]
            warnings = [line for model in models if model.get("id") == self.model and (line := _shutdown(model))]
        except openai.APIStatusError:
            pass  # a server without /models: its answer to a chat says more
        except RequestFailed as error:
            raise UserError(f"{self._address}: {error.detail}") from None
        if names and self.model not in names:
            near = difflib.get_close_matches(self.model, names, 3, 0.4) or sorted(names)[:10]
            raise UserError(f"{self._address} has no model {self.model!r}; it has {', '.join(near)}")
        await self._probe()
        return warnings

    async def ask(self, request: ChatRequest, lost: Callable[[int], bool] = lambda received: True) -> Response:
        """Returns the answer to a request, after as many tries as necessary.

        `lost(bytes)` is called for each try that a server may bill although it brought no answer. It returns whether
        another try is allowed. A parameter that the server refuses is renamed or dropped for all requests, and
        `notes` says so. A limit of tokens is never dropped.

        Raises:
          RequestFailed: This request gets no answer.
          EndpointStopped: No request would get an answer.
          BudgetExceededError: `lost` forbids another try.
          NotSentError: The run was cancelled while this request waited.
        """
        import openai

        expected = self._expected(request)
        try:
            json.dumps(self.body(request), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestFailed("bad_request", "its text has half of a surrogate pair, which is no character") from None
        while True:
            body = self.body(request)
            try:
                answer = await self.call(lambda body=body: self._complete(request, body), expected, lost=lost)
            except openai.APIStatusError as error:
                if not self.adapt(body, error.status_code, error.body):
                    raise self.failure(error.status_code, error.body) from None
                continue
            self._limit.correct(expected, answer.prompt_tokens + answer.completion_tokens)
            self._learn(request, answer)
            return answer

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Returns the body of a request, without parameters that the server has refused before."""
        parameters = dict(request.parameters)
        for name, new in self._renamed.items():
            if name in parameters:
                value = parameters.pop(name)
                parameters |= {new: value} if new else {}
        return {"model": self.model, "messages": list(request.messages), **parameters}

    def adapt(self, body: Collection[str], status: int, error: object) -> bool:
        """Drops or renames the parameter that a refusal is about. Returns whether to ask again.

        `error` is the "error" object of the answer, or other content. Raises EndpointStopped if the server refuses the
        limit of tokens under both names.
        """
        name = _refused_parameter(body, status, error)
        if name is None:
            return False
        if name in self._renamed:  # another request has found out meanwhile
            return True
        new = LIMITS.get(name)
        if name in LIMITS and new in self._renamed:
            raise EndpointStopped(f"{self._address}: refuses both {name} and {new}: {self._say(error)}")
        self._renamed[name] = new
        self.notes.append(f"{self.model} refuses {name}: {f'sent as {new}' if new else 'left out'} from here on")
        return True

    def failure(self, status: int, error: object) -> RequestFailed:
        """Returns the RequestFailed for a refusal. Raises EndpointStopped if the server would refuse all requests."""
        words, code = self._say(error), str(_field(error, "code"))
        if status == 401 or status == 403:
            want = "refuses the API key" if self._key else "wants an API key: set OPENAI_API_KEY or --api-key-env"
            raise EndpointStopped(f"{self._address}: {want}: {words}")
        if "insufficient_quota" in (code, _field(error, "type")) or status == 402:
            raise EndpointStopped(f"{self._address}: the account's quota is used up: {words}")
        if status in (404, 405):
            raise EndpointStopped(f"{self._address}: cannot be asked for {self.model!r} any more: {words}")
        if code == "context_length_exceeded" or "context length" in words:
            return RequestFailed("context_length", words)
        if "content_filter" in code or "content_policy" in code:
            return RequestFailed("content_filter", words)
        return RequestFailed("bad_request", f"{status}: {words}")

    async def call(
        self,
        send: Callable[[], Awaitable[T]],
        tokens: float = 0,
        retries: int | None = None,
        lost: Callable[[int], bool] = lambda received: True,
    ) -> T:
        """Returns what `send()` returns, within the rate limits and after as many tries as necessary.

        `send` raises the openai client's errors, or ValueError for an invalid answer. Transient errors are tried again.

        Raises:
          openai.APIStatusError: The server refuses the request.
          EndpointStopped: The server refuses the key, or the quota is used up.
          RequestFailed: All tries are used up ("no_answer").
          BudgetExceededError, NotSentError: As in `ask`.
        """
        import openai

        retries = self._retries if retries is None else retries
        clock = asyncio.get_running_loop().time
        start, failures, crowded = clock(), 0, 0
        while True:
            await self._limit.wait(tokens, self.cancel)
            wait = None
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await send()
                self._last_answer, self._refusals = clock(), 0
                return answer
            except openai.APIStatusError as error:
                if error.status_code in (401, 402, 403) or _field(error.body, "code") == "insufficient_quota":
                    raise self.failure(error.status_code, error.body) from None  # which stops the run
                if error.status_code not in TRANSIENT_CODES and error.status_code < 500:
                    raise
                trouble = f"{error.status_code}: {self._say(error.body)}"
                wait = retry_after(error.response.headers, time.time())
                if wait is not None and wait > MAX_RETRY_AFTER:
                    hours = f"{wait / 3600:.1f} hours"
                    raise EndpointStopped(f"{self._address}: asks to wait {hours} ({trouble}); go on then") from None
                if wait is not None:
                    self._refusals += 1
                if wait is not None and self._refusals >= CROWDED:
                    self._limit.pause(wait)
                if error.status_code == 429:
                    crowded += 1
                else:
                    failures += 1
                room = error.status_code != 408 and error.status_code < 500 or lost(0)
            except (openai.APIConnectionError, TimeoutError, ValueError) as error:
                failures += 1
                trouble = self._trouble(error)
                room = _is_unreached(error) or lost(getattr(error, "received_bytes", 0))
            if failures > retries or crowded and clock() - max(start, self._last_answer) > RATE_LIMIT_PATIENCE:
                raise RequestFailed("no_answer", f"after {failures + crowded} tries: {trouble}")
            if not room:
                raise BudgetExceededError
            await self.cancel.sleep(backoff(max(failures, crowded), random.random()) if wait is None else wait)

    async def close(self) -> None:
        await self.client.close()

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _complete(self, request: ChatRequest, body: dict[str, Any]) -> Response:
        # extra_body, because some fields only this server knows, and because the client's type checks of messages take
        # longer than everything else.
        create = self.client.chat.completions.with_raw_response.create
        raw = await create(model=body["model"], messages=[], extra_body=body)
        response = raw.http_response
        try:
            return parse_response(response.json(), prompt=request)
        except (UserError, RecursionError) as error:
            raise InvalidResponseError(str(error), len(response.content)) from None
        except ValueError:
            text = response.text[:2000]
            words = f"no JSON: {_words(text)}" if text.strip() else "an empty answer"
            raise InvalidResponseError(words, len(response.content)) from None

    async def _models(self) -> list[dict[str, Any]]:
        raw = await self.client.models.with_raw_response.list()
        try:
            return [model for model in raw.http_response.json()["data"] if isinstance(model, dict)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    async def _probe(self) -> None:
        """Sends a chat without messages, which a chat API refuses without cost."""
        import openai

        async def send() -> bool:
            raw = await self.client.chat.completions.with_raw_response.create(model=self.model, messages=[])
            try:
                return isinstance(raw.http_response.json(), dict)
            except (ValueError, RecursionError):
                return False

        hint = "" if self._address.endswith("/v1") else " (do its addresses begin with /v1?)"
        try:
            chat = await self.call(send, retries=2)
        except RequestFailed:
            return  # some servers fail at it instead of refusing it: they are there
        except openai.APIStatusError as error:
            words = self._say(error.body)
            if error.status_code == 404 and "model" in f"{_field(error.body, 'code')} {words}":
                raise UserError(f"{self._address} has no model {self.model!r}: {words}") from None
            chat = error.status_code not in (404, 405, 501) and isinstance(error.body, dict)
        if not chat:
            raise UserError(f"{self._address}: no chat API answers there{hint}")

    def _expected(self, request: ChatRequest) -> float:
        """Returns the expected number of tokens of a request, prompt and answer."""
        completion = self._completion if request.max_tokens is None else min(self._completion, request.max_tokens)
        return request.bytes * self._tokens_per_byte + completion

    def _learn(self, request: ChatRequest, response: Response) -> None:
        self._answers += 1
        share = max(1 / self._answers, LEARNING_RATE)
        self._tokens_per_byte += share * (response.prompt_tokens / max(1, request.bytes) - self._tokens_per_byte)
        self._completion += share * (response.completion_tokens - self._completion)

    def _trouble(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) or type(error).__name__ == "APITimeoutError":
            return f"no answer within {self._timeout:g} s"
        cause = error.__cause__
        return self._say(f"{error}{f' ({cause})' if cause and str(cause) else ''}")

    def _say(self, error: object) -> str:
        """Returns the server's words on one line, without the key, however short it is."""
        words = _words(error, self.secret)
        return words.replace(self._key, "***") if self._key else words

    @property
    def _address(self) -> str:
        return without_password(str(self.client.base_url)).rstrip("/")


def read_key(variable: str = "OPENAI_API_KEY", required: bool = False) -> str | None:
    """Reads the API key from an environment variable. Raises UserError if it is invalid, or missing and `required`."""
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise UserError(f"the environment variable {variable} is not set: it shall hold the API key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds no API key, but a blank or an odd letter")
    return key or None


def without_password(address: str) -> str:
    """Returns an address without user name and password."""
    return re.sub(r"(?<=//)[^/@]*@", "", address)


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:  # a port or an IPv6 address that is none
        return False


def _refused_parameter(body: Collection[str], status: int, error: object) -> str | None:
    """Returns the parameter that a refusal is about, if the server refuses the parameter and not its value."""
    names = [name for name in body if name not in ("model", "messages")]
    words, code, named = _words(error), _field(error, "code"), _field(error, "param")
    if status not in (400, 422) or not (str(code).startswith("unsupported_") or REFUSED.search(words)):
        return None
    if named is not None:
        return named if named in names else None
    # The first one in the message: "max_tokens is not supported, use max_completion_tokens".
    found = {name: match.start() for name in names if (match := re.search(rf"\b{re.escape(name)}\b", words))}
    return min(found, key=found.get, default=None)


def _shutdown(model: Mapping[str, Any]) -> str | None:
    date = model.get("shutdown_date")
    if not date:
        return None
    past = str(date) <= datetime.date.today().isoformat()
    return f"{model['id']} {'was to shut down' if past else 'shuts down'} on {date}: a later run cannot go on with it"


def _field(error: object, name: str) -> Any:
    return error.get(name) if isinstance(error, dict) else None


def _words(error: object, secret: Secret = NO_SECRET) -> str:
    """Returns the server's words on one line: the message of an error object, or the text of a page."""
    message = _field(error, "message") or _field(error, "detail") or error or "no reason given"
    return secret.hide(" ".join(re.sub(r"<[^>]*>", " ", str(message)).split()))[:300]


def _is_unreached(error: Exception) -> bool:
    """Whether a connection failed before the request was sent, which costs nothing."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


def check_length(body: bytes) -> None:
    """Raises InvalidResponseError for more bytes than an answer can have, because a server may send without end."""
    if len(body) > MAX_ANSWER_BYTES:
        raise InvalidResponseError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes", len(body))


def _client_that_hides(secret: Secret) -> type:
    """Returns a class of the openai package's HTTP client that hides the key in text, JSON and headers of answers."""
    import openai

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            response = await super().send(request, stream=True, **options)
            if stream:
                return response
            body = b""
            try:
                async for piece in response.aiter_bytes():
                    body += piece
                    check_length(body)
            finally:
                await response.aclose()
            body = secret.hide_body(body)
            decoded = ("content-encoding", "content-length", "transfer-encoding")
            headers = [(name, secret.hide(value)) for name, value in response.headers.multi_items()
                       if name.lower() not in decoded]
            return type(response)(response.status_code, headers=headers, content=body, request=response.request)

    return Client
