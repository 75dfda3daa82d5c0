"""Wraps every request: its id, its line in the log, the errors of its handler, and a body that nobody read."""

import asyncio
import collections
import contextlib
import logging
import re
import secrets
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_jax.serve.answers import ClientLeftError
from llava_jax.serve.errors import ApiError

log = logging.getLogger(__name__)

UNREAD_SECONDS = 5.0
"""Maximum number of seconds for reading the body of a refused request. Without that a client may miss the answer."""
CLIENT_LEFT = 499
"""Status in the log of a request whose client has left before the response."""
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CHALLENGES = ("Bearer", 'Basic realm="llava_jax", charset="UTF-8"')
MESSAGES = {404: "There is nothing at this path.", 405: "This path does not accept this method."}


def error_response(error: ApiError) -> JSONResponse:
    """Returns the response of an error in OpenAI's form."""
    response = JSONResponse(error.body(), error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        for challenge in CHALLENGES:
            response.headers.append("www-authenticate", challenge)
    return response


def handle_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answers an ApiError of a handler."""
    return error_response(error)


def handle_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answers an unknown path or method."""
    response = error_response(ApiError(error.status_code, MESSAGES.get(error.status_code, "Invalid request.")))
    response.headers.update(error.headers or {})
    return response


HANDLERS = {ApiError: handle_api_error, HTTPException: handle_http_error}


class Exchange:
    """ASGI middleware around all routes.

    Args:
      requests: counts requests by route and status, for /metrics.
      header_bytes: maximum number of bytes of a request's target and headers.
      unread_bytes: maximum number of bytes that are read of a body that the handler did not read.

    It puts `id` and `started` (`time.monotonic()`) into the scope's state. A handler may add `tokens`, the numbers of
    tokens of prompt and answers, for the log.
    """

    def __init__(self, app: ASGIApp, requests: collections.Counter, header_bytes: int, unread_bytes: int):
        self.app, self.requests, self.header_bytes, self.unread_bytes = app, requests, header_bytes, unread_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"id": secrets.token_hex(12), "started": time.monotonic()}
        headers = dict(scope["headers"])
        is_read = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        status = None

        async def receive_body() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body")
            return message

        async def send_response(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["id"].encode()),
                                      (b"x-content-type-options", b"nosniff")]
                if not is_read:
                    message["headers"].append((b"connection", b"close"))
                    if b"expect" not in headers and status != 408:
                        await self._read(receive_body)
            await send(message)

        try:
            await (self._refusal(scope, headers) or self.app)(scope, receive_body, send_response)
        except (ClientLeftError, ClientDisconnect):
            status = CLIENT_LEFT
        except Exception:
            log.exception("request %s failed", state["id"])
            if status is not None:
                raise  # the server closes the connection
            await error_response(ApiError(500, "The server has failed; its log has the details under this request's "
                                          f"id, {state['id']}."))(scope, receive_body, send_response)
        finally:
            self._log(scope, headers, status or CLIENT_LEFT)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """Returns the response to headers that are too large, or that give a body two ends; otherwise None."""
        # h11 counts only headers that come in several pieces.
        size = sum(len(name + value) for name, value in scope["headers"])
        if size + len(scope["raw_path"] + scope["query_string"]) > self.header_bytes:
            error = ApiError(431, "The headers are too large.")
        elif b"content-length" in headers and b"transfer-encoding" in headers:  # proxies differ in which one they read
            error = ApiError(400, "A request must not have both content-length and transfer-encoding.")
        else:
            return None
        response = error_response(error)
        response.headers["connection"] = "close"
        return response

    async def _read(self, receive: Receive) -> None:
        """Reads the rest of a body, so that the response does not meet a connection that was reset."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNREAD_SECONDS):
                while size < self.unread_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def _log(self, scope: Scope, headers: dict[bytes, bytes], status: int) -> None:
        """Writes one line without anything that a client has sent, except for a short and safe id."""
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "other")
        self.requests[route, status] += 1
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        prompt, written = state.get("tokens", ("-", "-"))
        method = "-" if route == "other" or status == 405 else scope["method"]
        log.info("%s %s %s %d prompt %s answer %s %.0f ms%s", state["id"], method, route, status,
                 prompt, written, 1000 * (time.monotonic() - state["started"]),
                 f" client's id {given}" if SAFE_ID.fullmatch(given) else "")
