"""Collects the answers of one request on the event loop, and writes them as JSON or as a stream of events."""

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from llava_jax.serve import protocol
from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import Finished, Job, Piece, TokenLogprob

MAX_PENDING_EVENTS = 2048
"""Number of pieces that may wait for a client that reads slowly. Its answers are then cancelled."""
HEARTBEAT_SECONDS = 15.0
"""Seconds without a piece after which a stream gets a comment, because balancers close silent connections."""
COLLECT_SECONDS, DELIVERY_SECONDS = 0.002, 0.01
"""Seconds from the first event to the delivery of all that have come, and between two deliveries.

A small model writes thousands of tokens per second. Each delivery costs a wake-up and every stream a write, on the
cores that also compute.
"""
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}

Event = Piece | Finished
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ClientLeftError(Exception):
    """Raised if the client has closed its connection. Nobody reads a response."""


class Mailbox:
    """Passes events from the scheduler's thread to the event loop. One wake-up delivers all that are waiting."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._waiting: collections.deque[tuple[Answers, int, Event]] = collections.deque()
        self._scheduled = False
        self._delivered = 0.0  # when, by the loop's clock

    def post(self, answers: "Answers", index: int, event: Event) -> None:
        """Adds an event of an answer, from any thread. The end of an answer is delivered at once."""
        self._waiting.append((answers, index, event))
        is_end = isinstance(event, Finished)
        if is_end or not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._deliver if is_end else self._schedule)

    def _schedule(self) -> None:
        due = max(self._loop.time() + COLLECT_SECONDS, self._delivered + DELIVERY_SECONDS)
        self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False  # before the loop, so that an event that comes during it is not left behind
        self._delivered = self._loop.time()
        while self._waiting:
            answers, index, event = self._waiting.popleft()
            answers.add(index, event)


class Answers:
    """The answers of one request: one for each of its `n` choices.

    Args:
      chat: the request.
      model: name of the model, as the response shows it.
      token_bytes: returns the bytes of a token's text.
      cancel: tells the scheduler that nobody waits for a job any more.
    """

    def __init__(self, chat: protocol.CompletionRequest, model: str, request_id: str,
                 token_bytes: Callable[[int], bytes], cancel: Callable[[Job], None]):
        self.chat = chat
        self.jobs: list[Job] = []
        self.finished: dict[int, Finished] = {}
        self.has_left = False  # the client
        self._envelope = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._token_bytes, self._cancel = token_bytes, cancel
        self._events: list[tuple[int, Event]] = []
        self._changed = asyncio.Event()

    def add(self, index: int, event: Event) -> None:
        """Adds the next event of a choice."""
        self._events.append((index, event))
        if isinstance(event, Finished):
            self.finished[index] = event
            if len(self.finished) == self.chat.n:
                self.jobs.clear()  # each has `emit`, which keeps these answers and the request
        if self.chat.stream or len(self.finished) == self.chat.n:
            self._changed.set()
        if self.chat.stream and len(self._events) > MAX_PENDING_EVENTS:
            self.cancel()

    def cancel(self) -> None:
        """Cancels the answers that are not finished."""
        for index, job in enumerate(self.jobs):
            if index not in self.finished:
                self._cancel(job)

    def leave(self) -> None:
        """Cancels the answers because the client has closed its connection."""
        self.has_left = True
        self.cancel()
        self._changed.set()

    def check_client(self) -> None:
        """Raises ClientLeftError if nobody waits any more."""
        if self.has_left:
            raise ClientLeftError

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's usage. All answers must be finished."""
        return protocol.usage([self.finished[index] for index in range(self.chat.n)])

    async def completion(self) -> dict[str, Any]:
        """Waits for all answers and returns the response. Raises ApiError if one failed, and ClientLeftError."""
        while len(self.finished) < self.chat.n:
            self.check_client()
            await self._changed.wait()
            self._changed.clear()
        self.check_client()
        texts, logprobs = collections.defaultdict(str), collections.defaultdict(list)
        for index, event in self._events:
            if isinstance(event, Piece):
                texts[index] += event.text
                logprobs[index] += event.logprobs
        choices = [{
            "index": index,
            "message": {"role": "assistant", "content": texts[index], "refusal": None},
            "logprobs": self._logprobs(logprobs[index]),
            "finish_reason": _finish_reason(self.finished[index]),
        } for index in range(self.chat.n)]
        return self._envelope | {"object": "chat.completion", "choices": choices, "usage": self.usage()}

    async def stream(self, send: Send) -> None:
        """Writes the response as server-sent events while the answers are written. Raises ClientLeftError."""
        usage = {"usage": None} if self.chat.include_usage else {}
        envelope = self._envelope | {"object": "chat.completion.chunk"} | usage
        before, after = _event(envelope | {"choices": [None]}).split(b"[null]")  # the same bytes for every piece

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return before + b"[" + _json(choice) + b"]" + after

        first = {"role": "assistant", "content": "", "refusal": None}
        chunks = [chunk(index, first) for index in range(self.chat.n)]
        try:
            await send(_body(b"".join(chunks)))
            while len(self.finished) < self.chat.n or self._events:
                chunks = [] if await self._wait(HEARTBEAT_SECONDS) else [b": waiting\n\n"]
                events, self._events = self._events, []
                for index, event in _joined(events):
                    if isinstance(event, Finished):
                        chunks.append(chunk(index, {}, reason=_finish_reason(event)))
                    elif event.text or event.logprobs:
                        chunks.append(chunk(index, {"content": event.text}, self._logprobs(event.logprobs)))
                await send(_body(b"".join(chunks)))
            if self.chat.include_usage:
                last = [_event(envelope | {"choices": [], "usage": self.usage()}), b"data: [DONE]\n\n"]
            else:
                last = [b"data: [DONE]\n\n"]
        except ApiError as error:
            last = [*chunks, _event(error.body())]
        await send(_body(b"".join(last), more=False))

    async def _wait(self, seconds: float) -> bool:
        """Returns whether events came within that time. Raises ClientLeftError."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self.check_client()
        changed = self._changed.is_set()
        self._changed.clear()
        return changed

    def _logprobs(self, logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        return None if self.chat.logprobs is None else protocol.logprobs_content(logprobs, self._token_bytes)


def _joined(events: list[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """Joins the pieces of each choice, which keep their order before its end."""
    if len(events) < 2:
        return events
    pieces, ends = collections.defaultdict(list), []
    for index, event in events:
        if isinstance(event, Finished):
            ends.append((index, event))
        else:
            pieces[index].append(event)
    return [(index, Piece("".join(piece.text for piece in parts),
                          tuple(logprob for piece in parts for logprob in piece.logprobs)))
            for index, parts in pieces.items()] + ends


def _finish_reason(finished: Finished) -> str:
    """Returns OpenAI's finish_reason. Raises ApiError for an answer that failed, or of which nothing was written."""
    if finished.reason == "deadline" and not finished.completion_tokens:
        raise ApiError(503, "The request's time ended before its first token.", code="deadline_exceeded", retry_after=5)
    if finished.reason == "cancelled":
        raise ApiError(503, "The answer was cancelled, because the server stops or its client reads too slowly.",
                       code="cancelled", retry_after=5)
    if finished.reason == "error":
        raise ApiError(500, "The model failed to answer this request.", code="internal_error")
    return FINISH_REASONS[finished.reason]


def _json(value: Any) -> bytes:
    return ENCODER.encode(value).encode()


def _event(value: Any) -> bytes:
    """Returns a value as one server-sent event."""
    return b"data: " + _json(value) + b"\n\n"


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
