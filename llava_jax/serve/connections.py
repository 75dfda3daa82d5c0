"""Runs the HTTP server: bounds what a connection may cost, and ends gently on SIGTERM."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_jax.serve.errors import ApiError
from llava_jax.serve.exchange import error_response
from llava_jax.serve.limits import Limits

KEEP_ALIVE_SECONDS = 20
MAX_PIPELINED_BYTES = 2**16
"""Maximum number of bytes of further requests that a client may send before it has its answer."""
CLOSE_SECONDS = 5
"""Seconds for the last bytes of responses after the answers have ended."""


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, which by itself waits for ever for headers, and for a client that does not read.

    It also notices that a client has left while further requests of it are waiting, and answers invalid HTTP in
    OpenAI's form.
    """

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._send_timer: asyncio.TimerHandle | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._expect_headers()
        if len(self.connections) > 2 * self.limits.connections:
            transport.abort()
        elif len(self.connections) > self.limits.connections:
            self.app = error_response(ApiError(503, "The server has too many connections.", retry_after=1))
            self.app.headers["connection"] = "close"

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and self._is_idle():
            self._expect_headers()
        super().data_received(data)
        if self._is_idle():
            return
        self._header_timer = _cancel(self._header_timer)
        if not self.cycle.more_body:  # further bytes belong to further requests
            if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()  # otherwise the end of the connection is not noticed

    def connection_lost(self, error: Exception | None) -> None:
        self._header_timer, self._send_timer = _cancel(self._header_timer), _cancel(self._send_timer)
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._send_timer = _cancel(self._send_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP; uvicorn calls it while it handles h11's error."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # within a response
            self.transport.abort()
            return
        status = getattr(sys.exception(), "error_status_hint", 400)
        message = "The headers are too large." if status == 431 else "The request is not valid HTTP."
        response = error_response(ApiError(status, message))
        response.headers["connection"] = "close"
        for event in (h11.Response(status_code=status, headers=response.raw_headers),
                      h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _is_idle(self) -> bool:
        """Returns whether the connection waits for the headers of a request."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.receive_seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end answers in progress."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises OSError. Raises the process's limit of open files, which connections are."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    # Accepted connections inherit it. asyncio does not set it for them, and a stream's first piece came 40 ms late.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(app: Starlette, listener: socket.socket, limits: Limits, work: Callable[[], Awaitable[None]],
                drain: Callable[[], Awaitable[None]]) -> None:
    """Serves until SIGTERM or SIGINT, or until `work` ends. A second signal ends the process at once.

    Args:
      work: runs beside the server; it is cancelled at the end.
      drain: called at the first signal, while the server still answers: ends the answers in progress.
    """
    protocol = type("Protocol", (BoundedProtocol,), {"limits": limits})
    server = HttpServer(uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    serving, working, stopping = map(asyncio.create_task, (server.serve([listener]), work(), stop.wait()))
    await asyncio.wait((serving, working, stopping), return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        await drain()
    server.should_exit = True
    await serving
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
