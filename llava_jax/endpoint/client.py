"""A server that speaks OpenAI's chat API, asked politely: one place for its limits, its errors and its whims."""

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
CONNECT_SECONDS = 10.0
MOST_ANSWERED = 2**24  # bytes, decompressed, of one answer or one line of a file of them; no answer is as long
LONGEST_RETRY_AFTER = 3600.0  # seconds; a server that asks for more ends the run
PATIENCE = 900.0  # seconds of "too many requests" without one answer to anybody, after which a request gives up
FIRST_COMPLETION = 500  # tokens that an answer is taken to have before there is one
CROWDED = 3  # refusals in a row with a Retry-After: from there on it holds for all requests, not for each alone
LEARNING = 0.02  # the weight of one more answer in what is expected of the next
LIMITS = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}  # two names of one thing
PASSING = (408, 409, 425, 429)  # refusals that may end by themselves, beside all from 500 on
REFUSED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|extra[ _](inputs?|fields?|forbidden)"
    r"|not permitted|not allowed|does not accept",
    re.IGNORECASE,
)


class InvalidResponseError(ValueError):
    """An answer that is none; `came` is its length in bytes."""

    def __init__(self, message: str, came: int):
        super().__init__(message)
        self.came = came


class Endpoint:
    """One model behind an OpenAI-compatible API.

    Args:
      model: its name there.
      base_url: such as "http://127.0.0.1:8000/v1"; None is OPENAI_BASE_URL or OpenAI itself.
      api_key: None for servers that want none; see `read_key`.
      timeout: seconds that one try may take.
      retries: how often a request is sent again after errors of the server or the network, with back-off. Being told
        that there are too many requests does not count: such requests wait as long as others get answers.
      requests_per_minute, tokens_per_minute: the account's limits, which are kept to; None is no limit. Tokens are
        reckoned before (as many per byte, and as many in the answer, as replies had so far) and corrected after.
      stop: when asked to stop, requests that wait for their turn or for another try raise NotSentError.
      transport: of httpx2, for tests.

    Attributes:
      notes: what was found out about the server on the way, one line each: parameters that it refuses.
      secret: hides the API key; all that the server says has gone through it, but the lines of files.

    Raises UserError without the openai package, UserError for a missing or odd key and an odd base_url.
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
            timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS),
            http_client=_client_that_hides(self.secret)(**({"transport": transport} if transport else {})),
        )
        if api_key is None and self.client.base_url.host == OPENAI:
            raise UserError("OpenAI wants an API key: set OPENAI_API_KEY, or name its variable by --api-key-env")
        self._key, self._timeout, self._retries = api_key, timeout, retries
        self._limit = RateLimit(requests_per_minute, tokens_per_minute)
        self._renamed: dict[str, str | None] = {}  # parameters that the server refuses -> what it takes instead
        self._tokens_per_byte, self._completion = 1 / BYTES_PER_TOKEN, float(FIRST_COMPLETION)
        self._answers = self._refusals = 0
        self._last_answer = -float("inf")  # by the loop's clock

    async def check(self) -> list[str]:
        """Looks, before any work and without paying, whether the model can be asked; returns warnings, one line each.

        Raises UserError with one line: nothing answers at the address, the key is missing or refused, the quota is
        used up, there is no chat API, or it has no such model (names near ones).
        """
        import openai

        warnings, names = [], list[str]()
        try:
            models = await self.call(self._models, retries=2)
            names = [str(model.get("id")) for model in models]
            warnings = [line for model in models if model.get("id") == self.model and (line := _shutdown(model))]
        except openai.APIStatusError:
            pass  # a server without /models: what it says to a chat tells more
        except RequestFailed as error:
            raise UserError(f"{self._address}: {error.detail}") from None
        if names and self.model not in names:
            near = difflib.get_close_matches(self.model, names, 3, 0.4) or sorted(names)[:10]
            raise UserError(f"{self._address} has no model {self.model!r}; it has {', '.join(near)}")
        await self._probe()
        return warnings

    async def ask(self, request: ChatRequest, lost: Callable[[int], bool] = lambda came: True) -> Response:
        """The answer to a request, after as many tries as it takes.

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
        """What is sent for a request, without the parameters that the server was seen to refuse."""
        parameters = dict(request.parameters)
        for name, new in self._renamed.items():
            if name in parameters:
                value = parameters.pop(name)
                parameters |= {new: value} if new else {}
        return {"model": self.model, "messages": list(request.messages), **parameters}

    def adapt(self, body: Collection[str], status: int, error: object) -> bool:
        """Whether a refusal is one of a field of the body, so that asking again without it is worthwhile.

        `error` is the answer's "error" object, or whatever came instead. Raises EndpointStopped if the limit of tokens
        is refused under both its names.
        """
        name = _refused_parameter(body, status, error)
        if name is None:
            return False
        if name in self._renamed:  # found out by another request while this one was on its way
            return True
        new = LIMITS.get(name)
        if name in LIMITS and new in self._renamed:
            raise EndpointStopped(f"{self._address}: refuses both {name} and {new}: {self._say(error)}")
        self._renamed[name] = new
        self.notes.append(f"{self.model} refuses {name}: {f'sent as {new}' if new else 'left out'} from here on")
        return True

    def failure(self, status: int, error: object) -> RequestFailed:
        """The RequestFailed that a refusal amounts to. Raises EndpointStopped if all requests would get it."""
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
        lost: Callable[[int], bool] = lambda came: True,
    ) -> T:
        """What `send()` returns, in its turn and after as many tries as it takes; `lost` as in `ask`.

        `send` raises the openai client's errors, or ValueError for an answer that makes no sense. Those that may pass
        are waited for; a refusal that stays is raised as openai.APIStatusError, except for those of key and quota
        (EndpointStopped). RequestFailed("no_answer") when the tries are used up.
        """
        import openai

        retries = self._retries if retries is None else retries
        clock = asyncio.get_running_loop().time
        begun, failures, crowded = clock(), 0, 0
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
                if error.status_code not in PASSING and error.status_code < 500:
                    raise
                trouble = f"{error.status_code}: {self._say(error.body)}"
                wait = retry_after(error.response.headers, time.time())
                if wait is not None and wait > LONGEST_RETRY_AFTER:
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
                room = _is_unreached(error) or lost(getattr(error, "came", 0))
            if failures > retries or crowded and clock() - max(begun, self._last_answer) > PATIENCE:
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
        # All of it goes as extra_body: some fields only this server knows, and of messages the client would look at the
        # type of every field, which takes it longer than all else.
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
        """Sends a chat without messages, which a chat API refuses, and nobody pays for."""
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
        """Tokens, prompt and answer, that a request will have, if it is like those before."""
        completion = self._completion if request.longest is None else min(self._completion, request.longest)
        return request.bytes * self._tokens_per_byte + completion

    def _learn(self, request: ChatRequest, reply: Response) -> None:
        self._answers += 1
        share = max(1 / self._answers, LEARNING)
        self._tokens_per_byte += share * (reply.prompt_tokens / max(1, request.bytes) - self._tokens_per_byte)
        self._completion += share * (reply.completion_tokens - self._completion)

    def _trouble(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) or type(error).__name__ == "APITimeoutError":
            return f"no answer within {self._timeout:g} s"
        cause = error.__cause__
        return self._say(f"{error}{f' ({cause})' if cause and str(cause) else ''}")

    def _say(self, error: object) -> str:
        """What a server says, on one line, without the key, however short that is."""
        words = _words(error, self.secret)
        return words.replace(self._key, "***") if self._key else words

    @property
    def _address(self) -> str:
        return without_password(str(self.client.base_url)).rstrip("/")


def read_key(variable: str = "OPENAI_API_KEY", required: bool = False) -> str | None:
    """The API key from an environment variable, or None. Raises UserError if it cannot be one, or is `required`."""
    key = os.environ.get(variable, "").strip()
    if required and not key:
        raise UserError(f"the environment variable {variable} is not set: it shall hold the API key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds no API key, but a blank or an odd letter")
    return key or None


def without_password(address: str) -> str:
    """An address as it may be shown: http://user:password@host without what is before the host."""
    return re.sub(r"(?<=//)[^/@]*@", "", address)


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:  # a port or an IPv6 address that is none
        return False


def _refused_parameter(body: Collection[str], status: int, error: object) -> str | None:
    """Which of a body's parameters a refusal is about, if it is the parameter as such and not its value."""
    names = [name for name in body if name not in ("model", "messages")]
    words, code, named = _words(error), _field(error, "code"), _field(error, "param")
    if status not in (400, 422) or not (str(code).startswith("unsupported_") or REFUSED.search(words)):
        return None
    if named is not None:
        return named if named in names else None
    # The one that is named first: "max_tokens is not supported, use max_completion_tokens".
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
    """What a server says, on one line: the message of an error object, or the text of a page."""
    message = _field(error, "message") or _field(error, "detail") or error or "no reason given"
    return secret.hide(" ".join(re.sub(r"<[^>]*>", " ", str(message)).split()))[:300]


def _is_unreached(error: Exception) -> bool:
    """Whether a connection failed before anything was sent, so that nobody bills it."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


def check_length(body: bytes) -> None:
    """Raises InvalidResponseError for more bytes than an answer can have, because a server may send without end."""
    if len(body) > MOST_ANSWERED:
        raise InvalidResponseError(f"an answer of more than {MOST_ANSWERED:,} bytes", len(body))


def _client_that_hides(secret: Secret) -> type:
    """The openai package's HTTP client, all of whose answers have the key hidden: text, JSON and headers."""
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
