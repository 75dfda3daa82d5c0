"""What a request needs is free as soon as it is answered, also without a garbage collection."""

import asyncio
import base64
import gc
import io
import json
import tracemalloc

import numpy as np
import pytest
import stand_ins
from PIL import Image

from llava_jax.images import ImageProcessor
from llava_jax.serve.app import make_app
from llava_jax.serve.limits import Limits
from llava_jax.serve.media import MediaLoader

MIB = 2**20
LIMITS = Limits(body_bytes=3 * MIB)
HEADERS = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]


def noise(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(MIB)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (640, 480), noise(seed)[: 3 * 640 * 480]).save(file, "PNG")
    return file.getvalue()


def about(content: bytes, **fields) -> bytes:
    """A request about an image."""
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return chat([{"type": "image_url", "image_url": {"url": url}}], **fields)


def chat(parts: list[dict], **fields) -> bytes:
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": parts}]} | fields).encode()


REQUESTS = {
    "good": lambda seed: about(picture(seed)),
    "streamed": lambda seed: about(picture(seed), stream=True),
    "bad image": lambda seed: about(noise(seed)),
    "too long": lambda seed: chat([{"type": "text", "text": noise(seed).hex()}]),
    "too large": lambda seed: 4 * noise(seed),
    "no JSON": noise,
    "no room": lambda seed: about(picture(seed)),
    "unknown model": lambda seed: chat([{"type": "text", "text": noise(seed).hex()}], model="other"),
}


async def ask(app, body: bytes) -> int:
    """Posts a body in two parts and returns the status."""
    parts, statuses = [body[: 2 * MIB], body[2 * MIB :]], []

    async def receive() -> dict:
        if not parts:
            await asyncio.Event().wait()
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict) -> None:
        statuses.append(message.get("status"))

    path = "/v1/chat/completions"
    await app({"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
               "headers": HEADERS, "http_version": "1.1", "root_path": ""}, receive, send)
    for _ in range(5):  # cancelled tasks end
        await asyncio.sleep(0)
    return statuses[0]


@pytest.mark.parametrize("kind", REQUESTS)
def test_no_request_waits_for_the_garbage_collection(kind):
    async def run() -> float:
        llava, scheduler = stand_ins.FakeLlava(), stand_ins.FakeScheduler()
        media = MediaLoader(LIMITS, ImageProcessor(28, "pad", patches=2), False)
        scheduler.full = kind == "no room"
        app = make_app(llava, scheduler, media, LIMITS, {"base": 0}, stand_ins.CONTEXT)

        async def request(seed: int) -> None:
            assert await ask(app, REQUESTS[kind](seed)) == {"good": 200, "streamed": 200, "too large": 413,
                                                            "no room": 429, "unknown model": 404}.get(kind, 400)
            for kept in (llava.chats, scheduler.jobs, scheduler.ended):  # by the stand-ins
                kept.clear()

        await request(0)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            await request(1)
            before = tracemalloc.get_traced_memory()[0]
            for seed in range(2, 10):
                await request(seed)
            return (tracemalloc.get_traced_memory()[0] - before) / 8
        finally:
            gc.enable()
            tracemalloc.stop()
            await media.close()

    assert asyncio.run(run()) < 0.5 * MIB
