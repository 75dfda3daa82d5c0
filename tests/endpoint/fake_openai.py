"""A fake of OpenAI's API in its wire format: chat completions, models, files and batches, with faults on demand.

    fake = FakeOpenAI(answer=lambda messages: "hello", faults=lambda number: "500" if number % 5 == 0 else None)
    with fake.serve() as url: ...              # on a loopback port, in a thread
    Endpoint("teacher", transport=fake.transport())   # the same without sockets, in the caller's event loop
    python tests/endpoint/fake_openai.py --port 0     # as a process, which prints its URL

GET /fake/counts tells from outside what was served.

`paid` counts completions by the content of their requests (SHA-256 of model, messages and all parameters): what a
server would bill, also if the connection is cut before the answer arrives.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import itertools
import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

NEVER = 1e6  # seconds
STATUS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
          422: "Unprocessable Entity", 429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway",
          503: "Service Unavailable"}

TIMES = [f"{state}_at" for state in "in_progress finalizing completed failed expired cancelling cancelled".split()]

Answer = Callable[[list[dict[str, Any]]], str]


@dataclasses.dataclass
class Response:
    """Of HTTP; `cut` closes the connection in the middle of it."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: bool = False


def error(status: int, message: str, code: str | None = None, param: str | None = None, **headers: str) -> Response:
    """An error as OpenAI words it."""
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return _json(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclasses.dataclass
class FakeOpenAI:
    """The server's state and manners.

    Attributes:
      answer: the text for a request's messages; by default it repeats their digest.
      models: what GET /v1/models lists: fields of each beside its id. None: there is no such page.
      key: the only one that is taken, if not None.
      faults: called with the number of a chat request (0, 1, ...), names a fault or none:
        "429" (Retry-After in seconds), "429-ms", "429-date", "429-bare", "429-hours", "500", "502" (a page of HTML),
        "slow", "never", "cut" (in the middle of a paid answer), "drop" (before anything), "length", "empty", "filter",
        "nonsense" (200, no completion), "error200" (200, an error object), "quota", "context".
      refuses: parameters that the model does not take.
      refusal: the words, in one of three styles: "openai", "pydantic" (422, a list of details), "plain".
      requests_per_minute: enforced over every window of 60 s.
      latency: seconds that an answer takes; `slow` those that a slow one takes.
      chat: False for a server that has no chat API.
      batch_polls: how often a batch must be looked at before it ends.
      batch_end: "completed", "expired", "cancelled", or "failed" with `batch_error` as its code.
      batch_share: how much of an expired or cancelled batch is answered.
    """

    answer: Answer | None = None
    models: dict[str, dict[str, Any]] | None = dataclasses.field(default_factory=lambda: {"teacher": {}})
    key: str | None = None
    faults: Callable[[int], str | None] = lambda number: None
    refuses: tuple[str, ...] = ()
    refusal: str = "openai"
    requests_per_minute: float | None = None
    latency: float = 0.0
    slow: float = 1.0
    chat: bool = True
    batch_polls: int = 1
    batch_end: Callable[[int], str] = lambda number: "completed"
    batch_error: str = "invalid_model"
    batch_share: float = 0.5
    batch_faults: Callable[[int], str | None] = lambda number: None

    def __post_init__(self) -> None:
        self.paid: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []  # of paid requests
        self.times: list[float] = []  # of chat requests that passed the rate limit
        self.recent = deque[float]()
        self.files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks: Counter[str] = Counter()
        self.numbers, self.line_numbers = itertools.count(), itertools.count()
        self.ids = itertools.count(1)

    async def respond(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Response | None:
        """The response to a request; None closes the connection without one. Header names are in small letters."""
        path, _, query = path.partition("?")
        if path == "/fake/counts":
            return _json({"paid": self.paid, "refused": self.refused, "batches": len(self.batches)})
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return error(401, f"Incorrect API key provided: {headers.get('authorization', '')[7:]}.", "invalid_api_key")
        if path == "/v1/models" and method == "GET" and self.models is not None:
            data = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "fake"} | fields
                    for name, fields in self.models.items()]
            return _json({"object": "list", "data": data})
        if path == "/v1/chat/completions" and method == "POST" and self.chat:
            return await self._chat(json.loads(body))
        if path.startswith("/v1/files"):
            return self._files(method, path.split("/")[3:], headers, body)
        if path.startswith("/v1/batches"):
            return self._batches(method, path.split("/")[3:], query, body)
        return error(404, f"Invalid URL ({method} {path})")

    async def _chat(self, body: dict[str, Any]) -> Response | None:
        refusal = self._invalid(body)
        if refusal is not None:
            return refusal
        number = next(self.numbers)
        fault = self.faults(number)
        now = asyncio.get_running_loop().time()
        if self.requests_per_minute is not None:
            while self.recent and self.recent[0] <= now - 60:
                self.recent.popleft()
            if len(self.recent) >= self.requests_per_minute:
                self.refused["rate"] += 1
                wait = f"{(self.recent[0] + 60 - now) * 1000:.0f}"
                return error(429, "Rate limit reached", "rate_limit_exceeded", retry_after_ms=wait)
            self.recent.append(now)
        self.times.append(now)
        if fault is not None:
            self.refused[fault] += 1
        match fault:
            case "429":
                return error(429, "Rate limit reached for requests", "rate_limit_exceeded", retry_after="2")
            case "429-ms":
                return error(429, "Rate limit reached for requests", "rate_limit_exceeded", retry_after_ms="1500")
            case "429-date":
                return error(429, "Rate limit reached", "rate_limit_exceeded",
                             retry_after=email.utils.formatdate(time.time() + 3, usegmt=True))
            case "429-hours":
                return error(429, "Daily limit reached", "rate_limit_exceeded", retry_after="7200")
            case "429-bare":
                return error(429, "Rate limit reached for requests", "rate_limit_exceeded")
            case "quota":
                return error(429, "You exceeded your current quota, please check your plan", "insufficient_quota")
            case "context":
                return TOO_LONG
            case "500":
                return BROKEN
            case "502":
                page = b"<html><head><title>502</title></head><body><h1>Bad Gateway</h1></body></html>"
                return Response(502, page, "text/html")
            case "nonsense":
                return _json({"status": "ok"})
            case "error200":
                return _json({"error": {"message": "Provider returned error", "code": 502}})
            case "drop":
                return None
            case "slow":
                await asyncio.sleep(self.slow)
            case "never":
                await asyncio.sleep(NEVER)
            case _:
                await asyncio.sleep(self.latency)
        response = _json(self.complete(body, fault))
        response.cut = fault == "cut"
        return response

    def complete(self, body: dict[str, Any], fault: str | None = None) -> dict[str, Any]:
        """A completion, counted as paid; a token is four characters."""
        self.paid[content(body)] += 1
        self.bodies.append(body)
        prompt = json.dumps(body["messages"], ensure_ascii=False)
        text = self.answer(body["messages"]) if self.answer else f"answer to {content(body)}"
        reason = "stop"
        if fault == "length":
            text, reason = text[: len(text) // 2], "length"
        elif fault == "filter":
            text, reason = None, "content_filter"
        elif fault == "empty":
            text = ""
        completion, prompted = -(-len(text or "") // 4), -(-len(prompt) // 4)
        return {
            "id": f"chatcmpl-{next(self.ids)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": f"{body['model']}-2026-06-01",
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": reason,
            }],
            "usage": {
                "prompt_tokens": prompted,
                "completion_tokens": completion,
                "total_tokens": prompted + completion,
                "prompt_tokens_details": {"cached_tokens": prompted // 2, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0,
                                              "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
            },
            "service_tier": "default",
            "system_fingerprint": "fp_fake",
        }

    def _invalid(self, body: dict[str, Any]) -> Response | None:
        if self.models is not None and body.get("model") not in self.models:
            return error(404, f"The model `{body.get('model')}` does not exist or you do not have access to it.",
                         "model_not_found", "model")
        for name in self.refuses:
            if name in body:
                self.refused[name] += 1
                return self._refuse(name)
        if not body.get("messages"):
            return error(400, "Invalid 'messages': empty array.", "empty_array", "messages")
        return None

    def _refuse(self, name: str) -> Response:
        if self.refusal == "pydantic":
            return _json({"detail": [{"type": "extra_forbidden", "loc": ["body", name],
                                      "msg": "Extra inputs are not permitted"}]}, 422)
        if self.refusal == "plain":
            return _json({"error": {"message": f"Unrecognized request argument supplied: {name}"}}, 400)
        if name == "temperature":
            return error(400, "Unsupported value: 'temperature' does not support 0.2 with this model. "
                              "Only the default (1) value is supported.", "unsupported_value", name)
        hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
        return error(400, f"Unsupported parameter: '{name}' is not supported with this model.{hint}",
                     "unsupported_parameter", name)

    def _files(self, method: str, rest: list[str], headers: dict[str, str], body: bytes) -> Response:
        if method == "POST" and not rest:
            fields = _multipart(headers["content-type"], body)
            name, data = fields["file"]
            return _json(self._store(name, data, fields["purpose"][1].decode()))
        if method == "GET" and rest and rest[0] in self.files:
            described, data = self.files[rest[0]]
            return Response(200, data, "application/octet-stream") if rest[1:] == ["content"] else _json(described)
        return error(404, f"No such File object: {'/'.join(rest)}", None, "id")

    def _store(self, name: str, data: bytes, purpose: str) -> dict[str, Any]:
        number = f"file-{next(self.ids)}"
        described = {"id": number, "object": "file", "bytes": len(data), "created_at": int(time.time()),
                     "expires_at": None, "filename": name, "purpose": purpose, "status": "processed",
                     "status_details": None}
        self.files[number] = described, data
        return described

    def _batches(self, method: str, rest: list[str], query: str, body: bytes) -> Response:
        if method == "POST" and not rest:
            asked = json.loads(body)
            if asked["input_file_id"] not in self.files:
                return error(404, "No such File object", None, "input_file_id")
            number = f"batch_{next(self.ids)}"
            now = int(time.time())
            self.batches[number] = {
                "id": number, "object": "batch", "endpoint": asked["endpoint"], "errors": None,
                "input_file_id": asked["input_file_id"], "completion_window": asked["completion_window"],
                "status": "validating", "output_file_id": None, "error_file_id": None, "created_at": now,
                "expires_at": now + 86400, "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": asked.get("metadata"),
            } | dict.fromkeys(TIMES)
            return _json(self.batches[number])
        if method == "GET" and not rest:
            fields = dict(part.split("=") for part in query.split("&") if part)
            newest = list(reversed(self.batches.values()))
            ids = [batch["id"] for batch in newest]
            start = ids.index(fields["after"]) + 1 if "after" in fields else 0
            page = newest[start : start + int(fields.get("limit", 20))]
            return _json({"object": "list", "data": page, "first_id": page[0]["id"] if page else None,
                          "last_id": page[-1]["id"] if page else None, "has_more": start + len(page) < len(newest)})
        if method == "GET" and rest[0] in self.batches:
            batch = self.batches[rest[0]]
            self.looks[rest[0]] += 1
            if batch["status"] in ("validating", "in_progress"):
                batch["status"] = "in_progress"
                if self.looks[rest[0]] > self.batch_polls:
                    self._end(batch)
            return _json(batch)
        return error(404, f"No batch found with id '{'/'.join(rest)}'.")

    def _end(self, batch: dict[str, Any]) -> None:
        """Answers a batch's requests, last first, since the order of outputs is not that of the inputs."""
        end = self.batch_end(list(self.batches).index(batch["id"]))
        batch["status"], batch[f"{end}_at"] = end, int(time.time())
        if end == "failed":
            batch["errors"] = {"object": "list", "data": [
                {"code": self.batch_error, "message": "The batch cannot be run.", "param": None, "line": 1}]}
            return
        lines = self.files[batch["input_file_id"]][1].splitlines()
        asked = [json.loads(line) for line in lines][::-1]
        answered = len(asked) if end == "completed" else int(len(asked) * self.batch_share)
        outputs, errors = [], []
        for i, line in enumerate(asked):
            row = {"id": f"batch_req_{next(self.ids)}", "custom_id": line["custom_id"], "response": None, "error": None}
            if i >= answered:
                row["error"] = {"code": f"batch_{end}", "message": "This request was not executed in time."}
                errors.append(row)
                continue
            refusal, status = self._invalid(line["body"]), 200
            fault = None if refusal else self.batch_faults(next(self.line_numbers))
            if fault == "500":
                refusal = BROKEN
            elif fault == "context":
                refusal = TOO_LONG
            if refusal is not None:
                status, body = refusal.status, json.loads(refusal.body)
            else:
                body = self.complete(line["body"], fault)
            row["response"] = {"status_code": status, "request_id": f"req_{next(self.ids)}", "body": body}
            (errors if refusal else outputs).append(row)
        batch["request_counts"] = {"total": len(asked), "completed": len(outputs), "failed": len(errors)}
        for rows, field in ((outputs, "output_file_id"), (errors, "error_file_id")):
            if rows:
                data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
                batch[field] = self._store(f"{batch['id']}_{field[:6]}.jsonl", data, "batch_output")["id"]

    def transport(self) -> Any:
        """An httpx2 transport that answers in the caller's event loop."""
        import httpx2

        async def handle(request: Any) -> Any:
            body = await request.aread()
            headers = {name.lower(): value for name, value in request.headers.items()}
            path = request.url.raw_path.decode()
            response = await self.respond(request.method, path, headers, body)
            if response is None or response.cut:
                raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
            headers = {"content-type": response.kind} | response.headers
            return httpx2.Response(response.status, headers=headers, content=response.body)

        return httpx2.MockTransport(handle)

    @contextlib.contextmanager
    def serve(self, port: int = 0) -> Iterator[str]:
        """Serves in a thread; gives the URL to be used as base_url."""
        started, state = threading.Event(), dict[str, Any]()

        async def main() -> None:
            state["loop"], state["end"] = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self.connection, "127.0.0.1", port, limit=1 << 20, backlog=512)
            state["port"] = server.sockets[0].getsockname()[1]
            started.set()
            await state["end"].wait()
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        started.wait()
        try:
            yield f"http://127.0.0.1:{state['port']}/v1"
        finally:
            state["loop"].call_soon_threadsafe(state["end"].set)
            thread.join()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, one after another, kept alive."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = dict(re.split(r":\s*", line, maxsplit=1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in headers.items()}
                body = await _read_body(reader, headers)
                response = await self.respond(method, path, headers, body)
                if response is None:
                    break
                fields = {"content-type": response.kind, "content-length": len(response.body)} | response.headers
                lines = [f"HTTP/1.1 {response.status} {STATUS.get(response.status, 'X')}"]
                lines += [f"{name}: {value}" for name, value in fields.items()]
                data = "\r\n".join([*lines, "", ""]).encode() + response.body
                writer.write(data[: len(data) - len(response.body) // 2] if response.cut else data)
                await writer.drain()
                if response.cut:
                    break
        writer.close()


def content(body: dict[str, Any]) -> str:
    """The digest of a request's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(body).encode(), headers=dict(headers or {}))


BROKEN = error(500, "The server had an error while processing your request.")
TOO_LONG = error(400, "This model's maximum context length is 8192 tokens.", "context_length_exceeded", "messages")


def _multipart(kind: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Fields of a form: name -> (file name, content)."""
    boundary = re.search(r"boundary=([^;]+)", kind)[1].encode()
    fields = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        name, file = (re.search(rb'\b%s="([^"]*)"' % word, head) for word in (b"name", b"filename"))
        fields[name[1].decode()] = (file[1].decode() if file else "", data.removesuffix(b"\r\n"))
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault-share", type=float, default=0.0, help="of the requests; a fifth is 0.2")
    parser.add_argument("--faults", default="429-ms,500,502,slow,length,drop", help="taken in turn")
    parser.add_argument("--requests-per-minute", type=float)
    parser.add_argument("--latency", type=float, default=0.0)
    args = parser.parse_args()
    faults = functools.partial(share_of_faults, args.fault_share, args.faults.split(","))
    fake = FakeOpenAI(faults=faults, requests_per_minute=args.requests_per_minute, latency=args.latency)
    with fake.serve(args.port) as url:
        print(url, flush=True)
        threading.Event().wait()


def share_of_faults(share: float, names: list[str], number: int) -> str | None:
    """A fault in turn on a share of the requests, evenly spread and the same in every run."""
    before, now = int(number * share), int((number + 1) * share)
    return names[before % len(names)] if now > before else None


if __name__ == "__main__":
    main()
