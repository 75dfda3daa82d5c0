"""Makes malformed requests, each with the statuses that are right for it. A seed chooses their details."""

import base64
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import image_data
from PIL import Image

CHAT = "/v1/chat/completions"
JSON = "application/json"


@dataclass(frozen=True)
class Malformed:
    """A request that is refused.

    Attributes:
      statuses: right statuses of the answer.
      param: field that the answer names; "" if any is right.
      raw: all bytes on the connection, if an HTTP client would not send them; the connection stays open behind them.
    """

    name: str
    body: bytes = b""
    statuses: tuple[int, ...] = (400,)
    param: str | None = ""
    method: str = "POST"
    target: str = CHAT
    headers: tuple[tuple[str, str], ...] = (("content-type", JSON),)
    raw: bytes = b""

    def on_the_wire(self) -> bytes:
        if self.raw:
            return self.raw
        fields = {"host": "localhost", "content-length": str(len(self.body)), "connection": "close"}
        fields |= dict(self.headers)
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{self.method} {self.target} HTTP/1.1\r\n{lines}\r\n".encode() + self.body


def malformed(seed: int, count: int) -> Iterator[Malformed]:
    """Yields requests. Every kind comes equally often."""
    for number in range(count):
        yield KINDS[number % len(KINDS)](random.Random(f"{seed} {number}"))


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """Returns a PNG whose header names this size."""
    pixels = zlib.compress(bytes((width + 1) * height if width * height < 2**20 else 100)) if pixels is None else pixels
    return image_data.png(width, height, pixels, colour=0)


def encoded(rng: random.Random, kind: str, size: int = 60, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size)).save(file, kind, **options)
    return file.getvalue()


def chat(rng: random.Random, name: str, param: str | None = "", statuses: tuple[int, ...] = (400,), **fields: Any
         ) -> Malformed:
    """A valid request but for these fields. What surrounds them is random."""
    body = {"model": None, "messages": [{"role": "user", "content": "What is it?"}]}
    others = {"stream": True, "max_tokens": 3, "temperature": 0.7, "seed": 1, "n": 2, "user": "u", "unknown": [1]}
    body |= {key: value for key, value in others.items() if rng.random() < 0.3}
    body |= fields
    keys = rng.sample(list(body), len(body))
    return Malformed(name, json.dumps({key: body[key] for key in keys}).encode(), statuses, param)


def part(rng: random.Random, name: str, bad: Any, param: str | None = "") -> Malformed:
    """A message with this part somewhere between good ones."""
    parts = [text("a"), image(data_url(png(rng.randint(1, 40), rng.randint(1, 40)))), text("<image>")]
    parts = rng.sample(parts, rng.randrange(4))
    position = rng.randint(0, len(parts))
    parts.insert(position, bad)
    before = [] if rng.random() < 0.5 else [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    where = param and param.replace("PART", f"messages[{len(before)}].content[{position}]")
    return chat(rng, name, where, messages=[*before, {"role": "user", "content": parts}])


WRONG = [True, False, "1", "", [], {}, [1], {"a": 1}, 0.5, -1, 1e300, -1e-9, "NaN", 10**40, 21, -(2**64)]
"""Values of which some are wrong for every field."""
NUMBERS = {
    "n": lambda value: type(value) is not int or not 1 <= value <= 4,
    "max_tokens": lambda value: type(value) is not int or value < 1,
    "max_completion_tokens": lambda value: type(value) is not int or value < 1,
    "temperature": lambda value: type(value) not in (int, float) or not 0 <= value <= 2,
    "top_p": lambda value: type(value) not in (int, float) or not 0 <= value <= 1,
    "seed": lambda value: type(value) is not int or not -(2**63) <= value < 2**63,
    "top_logprobs": lambda value: type(value) is not int or not 0 <= value <= 20,
    "stream": lambda value: not isinstance(value, bool),
    "logprobs": lambda value: not isinstance(value, bool),
}
UNSUPPORTED = {
    "tools": [[{"type": "function", "function": {"name": "f", "pattern": "(a+)+$"}}], "x"],
    "tool_choice": ["required", {}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, 1],
    "logit_bias": [{"50256": -100}, {"-1": 5}], "frequency_penalty": [0.1, -2, "a"], "presence_penalty": [1.5],
    "repetition_penalty": [1.2], "guided_regex": ["(" * 50], "guided_json": [{}], "guided_": [1],
    "chat_template": ["{% for i in range(10**9) %}{% endfor %}", ""], "chat_template_kwargs": [{"tokenize": True}],
    "stop_token_ids": [[-1], [10**9]], "prompt_embeds": ["gASVAAAA"], "top_k": [5], "min_p": [0.5], "echo": [True],
    "functions": [[{}]], "modalities": [["audio"]], "best_of": [10**6], "prompt_logprobs": [10**9],
    "mm_processor_kwargs": [{"size": 10**9}], "add_generation_prompt": [False], "logits_processors": [["os.system"]],
}
MESSAGES: list[tuple[Any, str | None]] = [
    (None, "messages"), ([], "messages"), ("hello", "messages"), ({}, "messages"), (7, "messages"), ([None],
    "messages[0]"),
    (["a"], "messages[0]"), ([[]], "messages[0]"), ([{}], "messages[0].role"), ([{"role": "user"}],
    "messages[0].content"),
    ([{"role": "USER", "content": "a"}], "messages[0].role"), ([{"role": 3, "content": "a"}], "messages[0].role"),
    ([{"role": "tool", "content": "a", "tool_call_id": "x"}], "messages[0].role"),
    ([{"role": "user", "content": 5}], "messages[0].content"), ([{"role": "user", "content": {}}],
    "messages[0].content"),
    ([{"role": "user", "content": ""}], "messages[0].content"), ([{"role": "user", "content": []}],
    "messages[0].content"),
    ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"), ([{"role": "system", "content": "a"}],
    "messages"),
    ([{"role": "assistant", "content": "a"}], "messages[0]"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[1]"),
    ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "messages[1]"),
    ([{"role": "user", "content": "a\ud800"}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [[]]}], "messages[0].content[0]"), ([{"role": "\u0000", "content": ""}],
    "messages[0].role"),
    ([{"role": "user", "content": "a"}] * 257, "messages"), ([{"role": "user", "content": [{"type": "text"}]}], ""),
    ([{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    "messages[0].content[0]"),
]
PARTS = [{}, {"type": None}, {"type": "image"}, {"type": "video_url", "video_url": {"url": "x"}},
{"type": "input_audio"},
         {"type": "image_embeds", "image_embeds": "AAAA"}, {"type": "text", "text": 5}, {"type": "text",
         "text": None},
         {"type": "text", "text": ["a"]}, {"type": ["text"]}, None, 5, "text", [], {"type": "image_url"},
         {"type": "image_url", "image_url": None}, {"type": "image_url", "image_url": {"url": None}},
         {"type": "image_url", "image_url": {"url": {}}}, {"type": "image_url", "image_url": {"uri": "data:,"}},
         {"type": "image_url", "image_url": ["data:,"]}, {"type": "text", "text": "a\udfff"}]
URLS = [
    "", "data:", "data:image/png;base64", "data:image/png,AAAA", "data:image/png;base64,",
    "data:image/png;base64,====",
    "data:image/png;base64,A", "data:image/png;base64,AA==AA==", "data:image/png;base64,@@@@",
    "data:image/png;base64,\u00e9",
    "data:image/png;base64,AA%3D%3D", "image.png", "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "AAAA",
    "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://2130706433/", "http://0x7f000001/",
    "https://127.0.0.1/", "https://localhost/", "https://[::ffff:127.0.0.1]/", "https://evil.example\\@localhost/",
    "https://user:password@example.org/", "https://example.org:8443/a.png", "https://example.org/a.png",
    "ftp://example.org/",
    "https://example.org\r\nHost: x/", "javascript:alert(1)", "gopher://127.0.0.1:6379/_FLUSHALL",
    "https://\u2488\u2488\u24ff/",
    "data:image/png;base64,\ud800", "blob:http://localhost/1", "https://nip.127.0.0.1.example/",
    "HTTPS://EXAMPLE.ORG/",
]
BODIES = [
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"{'messages': []}", b'{"messages": NaN}', b'{"temperature": Infinity}',
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "\xc3"}]}', b"[" * 100_000, b'{"a":' * 50_000, b"{}garbage",
    b"\x00" * 100,
    b'{"n": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b'{"messages": [' + b"[]," * 150_000 + b"[]]}",
    b"messages=hello",
    '{"messages": "caf\u00e9"}'.encode("utf-16"),
    b'{"messages": [' + b'{"role":"user","content":"a"},' * 300 + b"{}]}",
    b'--x\r\nContent-Disposition: form-data; name="messages"\r\n\r\nhello\r\n--x--\r\n', b'{"a": "\n"}',
    b'{"\\ud800": 1}',
]


def wrong_field(rng: random.Random) -> Malformed:
    name = rng.choice(list(NUMBERS))
    value = rng.choice([value for value in WRONG if NUMBERS[name](value)])
    return chat(rng, f"{name} {value!r:.30}", name, **{name: value})


def wrong_stop(rng: random.Random) -> Malformed:
    stop = rng.choice([[""], "", ["a"] * 5, "a" * 65, ["ok", "b" * 1000], [1], [None], {}, 5, True, ["a", ["b"]],
                       ["a"] * 10**5])
    return chat(rng, f"stop {stop!r:.30}", stop=stop)


def unsupported(rng: random.Random) -> Malformed:
    name = rng.choice(list(UNSUPPORTED))
    return chat(rng, name, name, **{name: rng.choice(UNSUPPORTED[name])})


def wrong_messages(rng: random.Random) -> Malformed:
    messages, param = rng.choice(MESSAGES)
    return chat(rng, f"messages {messages!r:.50}", param, messages=messages)


def wrong_part(rng: random.Random) -> Malformed:
    bad = rng.choice(PARTS)
    return part(rng, f"part {bad!r:.60}", bad)


def wrong_url(rng: random.Random) -> Malformed:
    url = rng.choice(URLS)
    return part(rng, f"URL {url!r}", image(url) if rng.random() < 0.7 else {"type": "image_url", "image_url": url})


def wrong_image(rng: random.Random) -> Malformed:
    jpeg, picture, webp = encoded(rng, "JPEG"), encoded(rng, "PNG"), encoded(rng, "WEBP", lossless=True)
    name, content = rng.choice([
        ("20000 x 20000", png(20_000, 20_000)), ("1 x 20000", png(1, 20_000)), ("20000 x 1", png(20_000, 1)),
        ("1 x 300", png(1, 300)), ("16385 x 200", png(16_385, 200)), ("0 x 0", png(0, 0)), ("2^31", png(2**31 - 1,
        1)),
        ("cut JPEG", jpeg[: rng.randint(1, len(jpeg) * 3 // 4)]), ("cut PNG", picture[: rng.randint(1,
        len(picture) * 3 // 4)]),
        ("cut WebP", webp[: rng.randint(1, len(webp) // 2)]), ("bytes", rng.randbytes(rng.randint(1, 5000))),
        ("text", b"hello" * 10), ("SVG", b"<svg onload='alert(1)'/>"), ("PDF", b"%PDF-1.7\n"), ("zip",
        b"PK\x03\x04" + bytes(99)),
        ("BMP", encoded(rng, "BMP")), ("TIFF", encoded(rng, "TIFF")), ("ICO", encoded(rng, "ICO")), ("PPM",
        encoded(rng, "PPM")),
        ("PNG without pixels", png(50, 50, b"")), ("PNG with bad pixels", png(50, 50, rng.randbytes(300))),
        ("bomb in PNG", png(50, 50, b"x" + zlib.compress(bytes(10**7)))), ("GIF head", b"GIF89a" + b"\xff" * 7),
        ("scans", (progressive := encoded(rng, "JPEG", progressive=True)).replace(b"\xff\xd9",
        b"\xff\xda" * 500 + b"\xff\xd9")),
    ])
    return part(rng, f"image: {name}", image(data_url(content)), "PART.image_url.url")


def many_images(rng: random.Random) -> Malformed:
    if rng.random() < 0.05:
        return part(rng, "21 MB", image("data:image/png;base64," + "A" * 28_100_000), "PART.image_url.url")
    parts = [image(data_url(png(3, 3)))] * rng.choice([9, 10, 100, 2000])
    return chat(rng, f"{len(parts)} images", "messages[0].content[8]", messages=[{"role": "user", "content": parts}])


def long_prompt(rng: random.Random) -> Malformed:
    words = rng.choice(["a ", "<image>", "</s> ", "가", "\u200b", "x"]) * rng.choice([20_000, 200_000])
    return chat(rng, "long prompt", "messages", messages=[{"role": "user", "content": words}])


def wrong_body(rng: random.Random) -> Malformed:
    body = rng.choice(BODIES)
    if rng.random() < 0.3:
        good = chat(rng, "").body
        body = good[: rng.randint(1, len(good) - 1)]
    return Malformed(f"body {body[:30]!r}", body)


def wrong_type(rng: random.Random) -> Malformed:
    kind = rng.choice(["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonx",
                       "text/json", "application/json+x", ",application/json"])
    return Malformed(f"type {kind}", chat(rng, "").body, (415,), None, headers=(("content-type", kind),))


def wrong_path(rng: random.Random) -> Malformed:
    method, target, status = rng.choice([
        ("GET", CHAT, 405), ("PUT", CHAT, 405), ("DELETE", "/v1/models", 405), ("OPTIONS", CHAT, 405), ("POST",
        "/health", 405),
        ("POST", "/", 405), ("POST", CHAT + "/", 404), ("POST", "/v1/completions", 404), ("GET", "/v1/models/x", 404),
        ("GET", "/docs", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/examples/..%2f..%2fapp.py", 404),
        ("POST", "/tokenize", 404), ("GET", "/v1//models", 404), ("GET", "/metrics/", 404), ("PATCH", "/metrics",
        405),
        ("GET", "/v1/models/" + "a" * 5000, 404), ("GET", "/openapi.json", 404), ("TRACE", "/", 405)])
    return Malformed(f"{method} {target:.40}", method=method, target=target, statuses=(status,), headers=())


def unknown_model(rng: random.Random) -> Malformed:
    if rng.random() < 0.5:
        return chat(rng, "model type", "model", model=rng.choice([5, [], {}, True, "\ud800"]))
    name = rng.choice(["gpt-4o", "../model", "x" * 10_000, "\u0000", "MODEL"])
    return chat(rng, "model", "model", (404,), model=name)


def raw(name: str, start: str, body: bytes = b"", statuses: tuple[int, ...] = (400,), host: str = "localhost"
        ) -> Malformed:
    request, _, headers = start.partition("\n")
    lines = "".join(f"{line}\r\n" for line in headers.splitlines())
    return Malformed(name, statuses=statuses, raw=f"{request} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode() + body)


def wrong_http(rng: random.Random) -> Malformed:
    """What only a raw connection can send."""
    post, kind = f"POST {CHAT}", f"Content-Type: {JSON}\n"
    chunk = b"%x\r\n" % 2**20 + b"[" * 2**20 + b"\r\n"
    return rng.choice([
        lambda: raw("10,000 headers", "GET /health\n" + "X-Y: z\n" * 10_000, statuses=(431,)),
        lambda: raw("long header", f"GET /health\nX: {'y' * 100_000}", statuses=(431,)),
        lambda: raw("long target", f"GET /{'y' * 100_000}", statuses=(431,)),
        lambda: raw("headers under the limit of HTTP", "GET /health\n" + f"X: {'y' * 5000}\n" * 4, statuses=(431,)),
        lambda: raw("length over the limit", f"{post}\n{kind}Content-Length: 99999999999", statuses=(413,)),
        lambda: raw("chunks over the limit", f"{post}\n{kind}Transfer-Encoding: chunked", chunk * 33, (413,)),
        lambda: raw("slow body", f"{post}\n{kind}Content-Length: 100", b'{"messages"', (408,)),
        lambda: raw("slow chunks", f"{post}\n{kind}Transfer-Encoding: chunked", b"5\r\n{", (408,)),
        lambda: raw("negative length", f"{post}\n{kind}Content-Length: -1"),
        lambda: raw("two lengths", f"{post}\n{kind}Content-Length: 1\nContent-Length: 2", b"{}"),
        lambda: raw("no number", f"{post}\n{kind}Content-Length: 0x10", b"{}"),
        lambda: raw("bad chunk", f"{post}\n{kind}Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n"),
        lambda: raw("bad header", "GET /health\nno colon"), lambda: raw("folded name", "GET /health\nX Y: z"),
        lambda: raw("NUL", "GET /health\nX: a\0b"), lambda: raw("two hosts", "GET /version\nHost: evil.example"),
        lambda: raw("foreign host", "GET /v1/models\nConnection: close", statuses=(403,), host="evil.example"),
        lambda: raw("host with a path", "GET /v1/models\nConnection: close", statuses=(403,), host="evil.example/?"),
        lambda: raw("host of a port", "GET /metrics\nConnection: close", statuses=(403,), host="localhost:80:80"),
        lambda: raw("foreign URL", "GET http://evil.example/v1/models\nConnection: close", statuses=(404,)),
        lambda: Malformed("TLS", raw=b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + rng.randbytes(500) + b"\r\n\r\n"),
        lambda: Malformed("HTTP/2", raw=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", statuses=(400, 404)),
        lambda: Malformed("no host", raw=b"GET /version HTTP/1.1\r\n\r\n"),
        lambda: Malformed("no HTTP", raw=rng.randbytes(200).replace(b"\n", b"x") + b"\r\n\r\n"),
    ])()


KINDS: list[Callable[[random.Random], Malformed]] = [
    wrong_field, wrong_stop, unsupported, wrong_messages, wrong_part, wrong_url, wrong_image, wrong_image,
    wrong_image,
    wrong_url, many_images, long_prompt, wrong_body, wrong_type, wrong_path, unknown_model, wrong_http, wrong_field,
    wrong_messages, wrong_http,
]
