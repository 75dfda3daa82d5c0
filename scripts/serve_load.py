"""Starts servers of OpenAI's API, and sends requests to them: what bench_serve.py and soak_serve.py share.

The client is plain asyncio, because on a machine of few cores the openai client would take a good part of the time that
is measured. It stores what arrives with its time, and reads it after the measurement.
"""

import asyncio
import bisect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

START_SECONDS = 900


class Server:
    """A server process. `name` and `url` tell it from others; the port is read from what it prints."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="serve-")
        self.process = subprocess.Popen(list(command), stdout=self.log, stderr=subprocess.STDOUT,
                                        env=os.environ | dict(env or {}))
        started = time.monotonic()
        self.port = int(self._wait(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", self.output())).group(1))
        self.model = json.loads(self._wait(lambda: self.get("/v1/models")).body)["data"][0]["id"]
        self.start_seconds = time.monotonic() - started

    def output(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def get(self, path: str) -> "Reply | None":
        """Returns the reply to a GET, or None if the server does not answer with 200."""
        try:
            reply = asyncio.run(_get(self.port, path))
        except OSError:
            return None
        return reply if reply.status == 200 else None

    def ready(self) -> None:
        """Waits until the server answers, with everything compiled."""
        self._wait(lambda: self.get("/ready"))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self, ready):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{self.output()[-2000:]}")
            if result := ready():
                return result
            time.sleep(0.2)
        raise SystemExit(f"{self.name} did not start within {START_SECONDS} s:\n{self.output()[-2000:]}")


def own_server(folder: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "llava_jax.serve", str(folder), "--port", "0", *options]
    server = Server("llava_jax", command)
    server.ready()
    return server


def transformers_server(folder: Path) -> Server:
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu",
               "--host", "127.0.0.1", "--port", "0"]
    return Server("transformers", command)


@dataclass
class Reply:
    """What a server answered.

    Attributes:
      status: HTTP status; 0 if the connection ended before it.
      body: JSON or text without chunk sizes.
      times: seconds from the request to each piece of text of a stream.
      text, usage, finish_reason: of the answer.
      error: OpenAI's error, or one that came within the stream.
    """

    status: int = 0
    body: bytes = b""
    headers: bytes = b""
    complete: bool = False
    seconds: float = 0.0
    times: Sequence[float] = ()
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: dict | None = None


class Connection(asyncio.Protocol):
    """A keep-alive connection for one request at a time."""

    def __init__(self):
        self.blocks: list[tuple[float, bytes]] = []
        self.done = asyncio.get_running_loop().create_future()
        self.lost = False

    @classmethod
    async def open(cls, port: int) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.blocks.append((time.perf_counter(), data))
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n" or self._has_length():
            self.finish()

    def connection_lost(self, error) -> None:
        self.lost = True
        self.finish()

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _has_length(self) -> bool:
        """Returns whether a response with a content length is complete."""
        if len(self.blocks) > 16:
            return False  # a stream; its end is the chunk of no bytes
        head, found, rest = b"".join(data for _, data in self.blocks).partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return bool(found and length) and len(rest) >= int(length.group(1))

    async def send(self, request: bytes, timeout: float = 600.0) -> Reply:
        """Sends a request and returns the reply, complete or not."""
        self.begin()
        self.transport.write(request)
        return await self.receive(timeout)

    def begin(self) -> None:
        self.blocks, self.done, self.started = [], asyncio.get_running_loop().create_future(), time.perf_counter()
        if self.lost:
            self.finish()

    async def receive(self, timeout: float = 600.0) -> Reply:
        await asyncio.wait([self.done], timeout=timeout)
        return parse(self.blocks, self.started)

    def close(self) -> None:
        self.transport.abort()


def parse(blocks: Sequence[tuple[float, bytes]], started: float) -> Reply:
    """Reads a response from its blocks and their times."""
    raw = b"".join(data for _, data in blocks)
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        return Reply(seconds=blocks[-1][0] - started if blocks else 0.0)
    reply = Reply(int(head.split(b" ", 2)[1]), headers=head, seconds=blocks[-1][0] - started)
    start = len(head) + 4
    if not re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        end = start + int(length.group(1)) if length else len(raw)
        reply.body, reply.complete = raw[start:end], len(raw) >= end
        _read_json(reply)
        return reply
    ends, end = [], 0
    for _, data in blocks:
        end += len(data)
        ends.append(end)
    pieces, texts, times = [], [], []
    while (line := raw.find(b"\r\n", start)) >= 0:
        size = int(raw[start:line], 16)
        start = line + 2 + size + 2
        if start > len(raw) or size == 0:
            reply.complete = size == 0
            break
        piece = raw[line + 2 : line + 2 + size]
        pieces.append(piece)
        if _read_events(reply, piece, texts):
            arrived = blocks[bisect.bisect_left(ends, start)][0] - started
            if arrived not in times[-1:]:  # events that arrive together are one piece
                times.append(arrived)
    reply.body, reply.text, reply.times = b"".join(pieces), "".join(texts), times
    if b"text/event-stream" not in head:
        _read_json(reply)
    return reply


def _read_json(reply: Reply) -> None:
    try:
        body = json.loads(reply.body)
    except ValueError:
        return
    if isinstance(body, dict):
        reply.error = body.get("error")
        for choice in body.get("choices", ()):
            reply.text, reply.finish_reason = choice["message"]["content"], choice["finish_reason"]
            reply.tokens = body["usage"]["completion_tokens"]


def _read_events(reply: Reply, piece: bytes, texts: list[str]) -> bool:
    """Adds the events of a piece to a reply; returns whether they have text. A piece has whole events."""
    has_text = False
    for event in piece.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        event = json.loads(event[6:])
        reply.error = event.get("error", reply.error)
        if event.get("usage"):
            reply.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
            if text := choice["delta"].get("content"):
                texts.append(text)
                has_text = True
    return has_text


async def _get(port: int, path: str) -> Reply:
    connection = await Connection.open(port)
    try:
        return await connection.send(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode(), 60)
    finally:
        connection.close()


def post(port: int, body: bytes | Mapping, path: str = "/v1/chat/completions", kind: str = "application/json",
         headers: str = "") -> bytes:
    """Returns the bytes of a POST."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {kind}\r\n{headers}"
            f"content-length: {len(body)}\r\n\r\n")
    return head.encode() + body


def image_part(data: bytes, kind: str = "jpeg") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{b64encode(data).decode()}"}}


def pictures(folder: Path | None, count: int = 64) -> list[bytes]:
    """Returns JPEG files of a folder, or of noise."""
    if folder is not None:
        if found := [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:count]]:
            return found
        raise SystemExit(f"{folder} has no .jpg files")
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((168, 168)).save(file, "jpeg")
        files.append(file.getvalue())
    return files


def marked(picture: bytes, number: int) -> bytes:
    """Returns a JPEG file with a comment, so that the same pixels have another digest and no cache knows them."""
    return picture[:2] + b"\xff\xfe\x00\x06" + number.to_bytes(4, "big") + picture[2:]
