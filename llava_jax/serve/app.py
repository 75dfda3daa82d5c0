"""Answers HTTP requests: OpenAI's chat API, the chat page, and what operators ask."""

import asyncio
import base64
import binascii
import collections
import contextlib
import functools
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_jax.errors import UserError
from llava_jax.serve import metrics
from llava_jax.serve.answers import Answers, Mailbox
from llava_jax.serve.errors import ApiError
from llava_jax.serve.exchange import HANDLERS, Exchange
from llava_jax.serve.jobs import Job, PreparedImage
from llava_jax.serve.limits import Limits
from llava_jax.serve.protocol import CompletionRequest, ignored_header, parse_chat, parse_json
from llava_jax.text.encode import IMAGE_TOKEN_ID, PromptTooLong

if TYPE_CHECKING:
    from llava_jax import Llava
    from llava_jax.serve.media import MediaLoader
    from llava_jax.serve.scheduler import Scheduler

LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
              ".css": "text/css; charset=utf-8", ".json": "application/json", ".jpg": "image/jpeg", ".png": "image/png",
              ".svg": "image/svg+xml"}
PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
LONG_TEXT = 10_000
"""Number of characters from which another thread tokenizes. For a shorter text, its start would take longer."""
RETRY_SECONDS = 5
"""Retry-After of a server that is warming up or draining."""

Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Status:
    """Progress of the server's start, and whether it is stopping. `report` is the `report` of the scheduler."""

    done: int = 0
    total: int = 0
    stage: str = "loading"
    draining: bool = False

    def report(self, done: int, total: int, stage: str) -> None:
        self.done, self.total, self.stage = done, total, stage


class ByteBudget:
    """Counts the bytes of all bodies that are in memory."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that counts further bytes, until the block ends. It raises ApiError 429 over the limit."""
        held = 0

        def add(size: int) -> None:
            nonlocal held
            held += size
            self.held += size
            if self.held > self.limit:
                raise ApiError(429, "The server is receiving too many large requests; try again later.",
                               code="rate_limit_exceeded", retry_after=1)

        try:
            yield add
        finally:
            self.held -= held


class ChatServer:
    """Handlers of the routes, and what they share. `make_app` documents the arguments."""

    def __init__(self, llava: "Llava", scheduler: "Scheduler", media: "MediaLoader", limits: Limits,
                 models: Mapping[str, int], context: int, key: str | None, loopback_only: bool, status: Status):
        self._llava, self._scheduler, self._media, self._limits = llava, scheduler, media, limits
        self._models, self._context, self._status, self._created = dict(models), context, status, int(time.time())
        self._key, self._loopback_only = key and key.encode(), loopback_only
        self._bodies, self._preparing = ByteBudget(limits.total_body_bytes), 0
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._mailbox: Mailbox | None = None
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()

    def routes(self) -> list[Route]:
        """Returns all routes. Each checks the key itself, but /health."""
        gets = {"/ready": self.ready, "/metrics": self.metrics, "/version": self.version, "/v1/models": self.models,
                "/v1/models/{name:path}": self.model}
        gets |= {path: functools.partial(_send_file, *file) for path, file in page_files(PAGE).items()}
        return [Route("/health", self.health, methods=["GET"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                *(Route(path, self._guarded(handler), methods=["GET"]) for path, handler in gets.items())]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._check_access(request)
            return await handler(request)

        return guarded

    def _check_access(self, request: Request) -> None:
        """Raises ApiError 401 for a wrong key, and 403 for a foreign Host without one, which is DNS rebinding."""
        if self._key is not None and not hmac.compare_digest(_given_key(request), self._key):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")
        host = request.headers.get("host")
        if self._loopback_only and host is not None and not LOOPBACK_HOST.fullmatch(host):
            raise ApiError(403, "Without an API key this server answers only as localhost or 127.0.0.1.")

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """Answers 200 if new requests are answered, otherwise 503 with the progress."""
        if self._scheduler.ready and not self._status.draining:
            return JSONResponse({"status": "ready"})
        status = self._status
        body = {"status": "draining" if status.draining else "warming up", "done": status.done, "total": status.total,
                "stage": status.stage}
        return JSONResponse(body, 503, {"retry-after": str(RETRY_SECONDS)})

    async def metrics(self, request: Request) -> Response:
        text = metrics.render(self._scheduler.stats(), self.requests)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        import llava_jax

        return JSONResponse({"version": llava_jax.__version__})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._adapter(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, str | int]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "llava_jax",
                "max_model_len": self._context}

    def _adapter(self, name: str) -> int:
        if name not in self._models:
            raise ApiError(404, "There is no model of this name; GET /v1/models lists them.", "model",
                           "model_not_found")
        return self._models[name]

    async def chat(self, request: Request) -> Response:
        """Answers POST /v1/chat/completions, as JSON or as a stream."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The content type must be application/json.")
        self._check_accepting()
        with self._bodies.hold() as hold:
            chat = parse_chat(parse_json(await self._read_body(request, hold)), self._limits)
            model = chat.model or next(iter(self._models))
            adapter = self._adapter(model)
            answers = Answers(chat, model, request.state.id, self._llava.tokenizer.token_bytes, self._scheduler.cancel)
            # A task ends when the client leaves; it is cancelled with the response. Both cancel unfinished answers.
            watch = asyncio.create_task(_wait_for_disconnect(request.receive))
            watch.add_done_callback(lambda _: answers.leave())
            preparing = asyncio.create_task(self._prepare(chat))
            watch.add_done_callback(lambda _: preparing.cancel())
            try:
                prepared = await preparing
                answers.check_client()  # it may have left when the task was done already
                self._submit(request, answers, adapter, *prepared)
            except BaseException:
                watch.cancel()
                answers.check_client()  # it has left, and so cancelled the task
                raise
        headers = {"x-ignored-fields": ignored_header(chat.ignored)} if chat.ignored else {}
        if chat.stream:
            return _Stream(answers, watch, headers)
        try:
            completion = await answers.completion()
        finally:
            watch.cancel()
        _note_tokens(request.scope, answers)
        return JSONResponse(completion, headers=headers)

    def _check_accepting(self) -> None:
        if self._status.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=RETRY_SECONDS)
        if not self._scheduler.ready:
            raise ApiError(503, "The server is starting; GET /ready shows its progress.", code="warming_up",
                           retry_after=RETRY_SECONDS)
        if self._preparing >= self._limits.queue:
            raise ApiError(429, "Too many requests are waiting; try again later.", code="rate_limit_exceeded",
                           retry_after=1)

    async def _read_body(self, request: Request, hold: Callable[[int], None]) -> bytes:
        """Returns the body, whose bytes are counted while they arrive. Raises ApiError 413 and 408."""
        limit = self._limits.body_bytes
        too_large = ApiError(413, f"The body has more than {limit:,} bytes.", code="request_too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                async for part in request.stream():
                    body += part
                    hold(len(part))
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {self._limits.receive_seconds:g} seconds.") from None
        return bytes(body)

    async def _prepare(self, chat: CompletionRequest) -> tuple[list[PreparedImage], np.ndarray]:
        """Returns the images and the tokens of a request. Raises ApiError 400, and 503 if the request's time ends."""
        self._preparing += 1
        loads = [asyncio.ensure_future(self._media.load(url, param, len(chat.images))) for url, param in chat.images]
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                images = await asyncio.gather(*loads)
                encode = functools.partial(self._encode, chat, images)
                parts = (part for message in chat.messages for part in message["content"])
                if sum(len(part.get("text", "")) for part in parts) < LONG_TEXT:
                    return images, encode()
                return images, await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode)
        except TimeoutError:
            raise ApiError(503, "The request's time ended before its first token.", code="deadline_exceeded",
                           retry_after=RETRY_SECONDS) from None
        finally:
            self._preparing -= 1
            for load in loads:
                load.cancel()  # if one is refused, nobody waits for those that come after it

    def _submit(self, request: Request, answers: Answers, adapter: int, images: list[PreparedImage],
                tokens: np.ndarray) -> None:
        """Passes a request's answers to the scheduler. Raises ApiError 429 and 503."""
        self._mailbox = self._mailbox or Mailbox()
        chat, limits, room = answers.chat, self._limits, self._context - len(tokens)
        jobs = [
            Job(tokens=tokens, images=images, max_new_tokens=min(chat.max_tokens or limits.answer_tokens, room),
                temperature=chat.temperature, top_p=chat.top_p, seed=chat.seed + index, stop=chat.stop,
                deadline=request.state.started + limits.request_seconds,
                emit=functools.partial(self._mailbox.post, answers, index), adapter=adapter, logprobs=chat.logprobs)
            for index in range(chat.n)]
        self._scheduler.submit(*jobs)
        answers.jobs = jobs  # not if they are refused: each has `emit`, which keeps the answers, until the last end

    def _encode(self, chat: CompletionRequest, images: list[PreparedImage]) -> np.ndarray:
        """Returns the prompt's tokens. Raises ApiError 400 if they leave no room for an answer."""
        try:
            tokens = self._llava.encode_chat(chat.messages, [image.layout for image in images])
            count, visual = len(tokens), int((tokens == IMAGE_TOKEN_ID).sum())
        except PromptTooLong as error:
            count, visual = error.tokens, sum(len(image.layout.index) for image in images)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None
        if count >= self._context:
            raise ApiError(400, f"The prompt has {count} tokens, {visual} of them for images, and the context has "
                           f"{self._context}. No room is left for an answer.", "messages", "context_length_exceeded")
        return tokens


class _Stream:
    """Response that writes the answers as events while they come."""

    def __init__(self, answers: Answers, watch: asyncio.Task, headers: Mapping[str, str]):
        self._answers, self._watch = answers, watch
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no", **headers}
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._answers.stream(send)
        finally:
            self._watch.cancel()
            _note_tokens(scope, self._answers)


def make_app(llava: "Llava", scheduler: "Scheduler", media: "MediaLoader", limits: Limits, models: Mapping[str, int],
             context: int, key: str | None = None, loopback_only: bool = False,
             status: Status | None = None) -> Starlette:
    """Returns the ASGI application.

    Args:
      models: names under which the model is served, with the index of their LoRA adapter; the first is the default.
      context: maximum number of tokens of a prompt and its answer.
      key: API key that every route but /health asks for. None asks for none.
      loopback_only: refuse requests whose Host is not a loopback name.
      status: progress of the start.
    """
    server = ChatServer(llava, scheduler, media, limits, models, context, key, loopback_only, status or Status())
    exchange = Middleware(Exchange, requests=server.requests, header_bytes=limits.header_bytes,
                          unread_bytes=limits.body_bytes)
    app = Starlette(routes=server.routes(), middleware=[exchange], exception_handlers=HANDLERS)
    app.router.redirect_slashes = False  # the target would have the Host that the client sent
    return app


def page_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Returns path -> (content, type) of the page's files, which are served from memory."""
    files = {f"/{path.relative_to(folder).as_posix()}": (path.read_bytes(), PAGE_TYPES[path.suffix])
             for path in sorted(folder.rglob("*")) if path.suffix in PAGE_TYPES}
    return files | ({"/": files["/index.html"]} if "/index.html" in files else {})


async def _send_file(content: bytes, kind: str, request: Request) -> Response:
    return Response(content, headers={"content-type": kind, "cache-control": "no-cache",
                                      "referrer-policy": "no-referrer", "content-security-policy": PAGE_POLICY})


def _given_key(request: Request) -> bytes:
    """Returns the key of a request: Bearer, or the password of HTTP Basic, so that a browser can open the page."""
    scheme, _, value = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _note_tokens(scope: Scope, answers: Answers) -> None:
    """Leaves the numbers of tokens for the log, if all answers are finished."""
    if len(answers.finished) == answers.chat.n:
        usage = answers.usage()
        scope["state"]["tokens"] = usage["prompt_tokens"], usage["completion_tokens"]
