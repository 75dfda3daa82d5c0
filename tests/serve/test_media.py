"""Images of a request: what is opened equals the project's own reading, and the rest is refused in one line."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_data import png, png_chunk
from malformed import data_url
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.images import ImageProcessor
from llava_jax.serve import media
from llava_jax.serve.errors import ApiError
from llava_jax.serve.limits import Limits
from llava_jax.serve.media import MediaLoader

LIMITS = Limits(image_bytes=300_000, image_pixels=4_000_000, image_side=10_000, image_aspect=100, decode_processes=1)
SMALL = ImageProcessor(size=28, patches=2)
ANYRES = ImageProcessor(size=28, patches=2, mode="anyres", pinpoints=((56, 56), (28, 84), (84, 28)), several="pad")
HOST = "images.example.org"


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels.view(np.uint16)[..., 0].copy())
    return Image.fromarray(pixels, "CMYK" if mode == "CMYK" else "RGBA").convert(mode)


def refusal(loader: MediaLoader, url: str, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(loader.load(url, "the.field", **options))
    assert (caught.value.status, caught.value.param) == (400, "the.field") and "\n" not in caught.value.message
    return caught.value


@contextlib.contextmanager
def opened(limits: Limits = LIMITS, processor: ImageProcessor = SMALL, exif: bool = False):
    loader = MediaLoader(limits, processor, exif)
    try:
        yield loader
    finally:
        asyncio.run(loader.close())
        assert not any(process.is_alive() for process in loader._processes)


@pytest.fixture(scope="module")
def loader():
    with opened() as made:
        yield made


@pytest.fixture(scope="module")
def anyres():
    with opened(processor=ANYRES, exif=True) as made:
        yield made


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x112] = orientation
    return made


def png_with(chunk: bytes = b"", size: tuple[int, int] = (4, 4)) -> bytes:
    return png(*size, zlib.compress(b"\0" * 13 * 4), chunks=chunk)


BOMB = zlib.compress(bytes(80_000_000), 9)

IMAGES = {
    "JPEG": encoded(picture(), "JPEG"), "JPEG in CMYK": encoded(picture(mode="CMYK"), "JPEG"),
    "grey JPEG": encoded(picture(mode="L"), "JPEG"), "progressive": encoded(picture(), "JPEG", progressive=True),
    "rotated": encoded(picture(), "JPEG", exif=exif(6)), "WebP": encoded(picture(mode="RGBA"), "WEBP"),
    "lossless WebP": encoded(picture(), "WEBP", lossless=True),
    **{f"PNG in {mode}": encoded(picture(mode=mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "transparent colour": encoded(picture(mode="P"), transparency=3),
    "1 x 1": encoded(picture(1, 1)), "1 x 80": encoded(picture(1, 80)), "80 x 1": encoded(picture(80, 1)),
    "junk behind": encoded(picture(), "JPEG") + b"<script>" * 1000,
    "moving GIF": encoded(picture(mode="P"), "GIF", save_all=True, append_images=[picture(seed=1, mode="P")] * 20),
    "moving WebP": encoded(picture(), "WEBP", lossless=True, save_all=True, append_images=[picture(seed=1)] * 3),
    "moving PNG": encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)] * 3),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_becomes_what_the_project_makes_of_it(name, loader, anyres):
    """`anyres` rotates as EXIF says, and pads several images of a conversation."""
    content = IMAGES[name]
    for rotates, loading, processor, images in ((False, loader, SMALL, 1), (True, anyres, ANYRES, 1),
                                                (True, anyres, ANYRES.for_images(2), 2)):
        image = open_image(content, rotates)
        loaded = asyncio.run(loading.load(data_url(content), "x", images=images))
        assert loaded.digest == hashlib.sha256(content).digest()
        np.testing.assert_array_equal(loaded.tiles, processor(image))
        np.testing.assert_array_equal(loaded.layout.index, processor.layout(*image.size).index)
    if name.startswith("moving"):
        first = picture(mode="P" if "GIF" in name else "RGB").convert("RGB")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(first))


@pytest.mark.parametrize("name, content, code, says", [
    ("BMP", encoded(picture(), "BMP"), "invalid_image_format", "JPEG, PNG, WebP or GIF"),
    ("TIFF", encoded(picture(), "TIFF"), "invalid_image_format", "JPEG"),
    ("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image_format", "JPEG"),
    ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image_format", "JPEG"),
    ("text", b"hello", "invalid_image_format", "JPEG"), ("zeros", bytes(500), "invalid_image_format", "JPEG"),
    ("cut JPEG", IMAGES["JPEG"][:-200], "image_parse_error", "damaged"),
    ("cut PNG", IMAGES["PNG in RGB"][:-300], "image_parse_error", "damaged"),
    ("cut WebP", IMAGES["lossless WebP"][:-500], None, ""), ("cut GIF", IMAGES["moving GIF"][:900], None, ""),
    ("header alone", IMAGES["JPEG"][:30], None, ""),
    ("bad checksum", IMAGES["PNG in RGB"][:60] + b"x" + IMAGES["PNG in RGB"][61:], "image_parse_error", "damaged"),
    ("20000 x 20000", png_with(size=(20_000, 20_000)), "image_too_large", "4,000,000 pixels"),
    ("2 x 10001", png_with(size=(200, 10_001)), "image_too_large", "10,000 pixels a side"),
    ("1 x 101", encoded(picture(1, 101)), "invalid_image", "100 to 1"),
    ("101 x 1", encoded(picture(101, 1)), "invalid_image", "100 to 1"),
    ("large WebP", b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + bytes(40), "image_too_large", ""),
    ("text bomb", png_with(png_chunk(b"zTXt", b"a\0\0" + BOMB)), "image_parse_error", "damaged"),
    ("profile bomb", png_with(png_chunk(b"iCCP", b"a\0\0" + BOMB), size=(9, 9)), "image_parse_error", "damaged"),
    ("many scans", IMAGES["progressive"].replace(b"\xff\xd9", b"\xff\xda" * 200), "image_parse_error", "damaged"),
    ("no bytes", b"", "empty_image", "empty"), ("many bytes", bytes(300_001), "image_too_large", "300,000 bytes"),
])
def test_other_files_are_refused(name, content, code, says, loader):
    error = refusal(loader, data_url(content))
    assert code in (None, error.code) and says in error.message


def test_an_image_that_no_pinpoint_suits(anyres):
    assert "too elongated for this model" in refusal(anyres, data_url(encoded(picture(1, 100)))).message


def test_base64_may_be_wrapped_url_safe_and_unpadded(loader):
    content = next(made for made in (encoded(picture(seed=seed), "JPEG") for seed in range(100))
                   if b"+" in base64.b64encode(made) and b"/" in base64.b64encode(made) and len(made) % 3 == 1)
    text = base64.b64encode(content).decode()
    safe = base64.urlsafe_b64encode(content).decode()
    for url in (f"data:image/jpeg;base64,{text}", f"data:;base64,{text.rstrip('=')}", f"DATA:text/html;BASE64,{safe}",
                f"data:image/webp;charset=x;base64,{safe.rstrip('=')}",
                "data:image/png;base64," + base64.encodebytes(content).decode().replace("\n", " \r\n\t")):
        assert asyncio.run(loader.load(url, "x")).digest == hashlib.sha256(content).digest(), url[:40]


@pytest.mark.parametrize("url, code", [
    ("", "invalid_image_url"), ("data:", "invalid_image_url"), ("data:image/png;base64", "invalid_image_url"),
    ("data:image/png,%89PNG", "invalid_image_url"), (f"data:{'x' * 1000};base64,aaaa", "invalid_image_url"),
    ("AAAA", "invalid_image_url"), (" data:image/png;base64,AAAA", "invalid_image_url"),
    ("data:image/png;base64,", "empty_image"), ("data:image/png;base64,====", "invalid_base64_image"),
    *((f"data:image/png;base64,{text}", "invalid_base64_image") for text in (
        "A", "AAAAA", "AA=", "AAA==", "AAAA=", "AA==AA==", "AA===", "A!AA", "AAAA\x00", "AAA\u00e9", "AAA\ud800",
        "%3D%3D", "\uff21AAA", "AAAA#x", "data:image/png;base64,AAAA")),
])
def test_bad_data_urls_are_refused(url, code, loader):
    assert refusal(loader, url).code == code


def test_base64_is_measured_before_it_is_decoded(loader, monkeypatch):
    monkeypatch.setattr(media.binascii, "a2b_base64", lambda *_, **__: pytest.fail("decoded"))
    assert refusal(loader, "data:;base64," + "A" * 500_000).code == "image_too_large"


def test_long_base64_is_decoded_in_pieces(monkeypatch):
    content = bytes(range(256)) * 10
    monkeypatch.setattr(media, "BASE64_PIECE", 64)
    for cut in range(4):
        text = base64.b64encode(content[cut:]).decode()
        assert media.read_base64(text, 0, 10_000)[0] == content[cut:]
        with pytest.raises(media.Refused, match="base64"):
            media.read_base64(text[:63] + "=" + text[64:], 0, 10_000)


URLS = ["http://{}/a.png", "ftp://{}/a.png", "file:///etc/passwd", "//{}/a.png", "https:{}/a.png", "https:/{}/a.png",
        "https:///{}/a.png", "HTTPS://{}/a.png", "https://user@{}/a.png", "https://user:pw@{}/a.png", "https://{}:80/",
        "https://{}:8443/", "https://{}:/", "https://{}:0443/", "https://{}./a.png", "https://{}%00.evil.example/",
        "https://evil.example\\@{}/", "https://{}\\@evil.example/", "https://evil.example#@{}/", "https://{}#x",
        "https://{}@evil.example/", "https://evil.example/?{}", "https://x.{}/", "https://{}.evil.example/",
        "https://{}\t/", "https://{}/\r\nHost: evil", "https://{}/a b", " https://{}/", "https://{}/ ", "https://{}\n",
        "https://{}/\u00e9", "https://images.example.org\u3002/", "https://\uff49mages.example.org/",
        "https://IMAGES.example.org/", "https://127.0.0.1/", "https://2130706433/", "https://0x7f.1/", "https://0177.1/",
        "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[fe80::1%25eth0]/", "https://169.254.169.254/",
        "https://localhost/", "https://{}/" + "a" * 3000, "https://xn--mages-qua.example.org/", "https://", "https:"]


@pytest.fixture
def no_network(monkeypatch):
    """Looking up a name or connecting fails the test."""
    def fail(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(asyncio, "open_connection", fail)


def test_only_plain_https_urls_of_listed_hosts_are_looked_up(no_network, loader):
    with opened(dataclasses.replace(LIMITS, fetch_hosts=(HOST,))) as fetching:
        for url in URLS:
            assert refusal(fetching, url.format(HOST)).code == "invalid_image_url", url
            assert HOST not in refusal(fetching, url.format(HOST)).message
        with pytest.raises(AssertionError, match="network"):
            asyncio.run(fetching.load(f"https://{HOST}:443/a/b.png?c=d&e=%20", "x"))
    assert refusal(loader, f"https://{HOST}/a.png").code == "invalid_image_url"  # off by default


@pytest.mark.parametrize("host", ["https://x.org", "X.org", "x.org.", "x.org:443", "", "[::1]", "*.org", "\u00e9.org",
                                  "a..org", "-a.org", "a" * 64 + ".org"])
def test_a_host_that_is_none_is_told_at_the_start(host):
    with pytest.raises(UserError, match="--fetch-hosts .*host name"):
        media.check_hosts((HOST, host))


@pytest.mark.parametrize("address", [
    "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
    "198.18.0.1", "203.0.113.5", "224.0.0.1", "239.255.255.250", "255.255.255.255", "::", "::1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:808:808::", "2001::1",
    "2001:db8::1", "fec0::1",
])
def test_addresses_of_no_internet_host(address):
    assert not media.is_public(address)
    assert media.is_public("8.8.8.8") and media.is_public("2606:4700:4700::1111")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Key and certificate of HOST in one file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "2",
                    "-addext", f"subjectAltName=DNS:{HOST}", "-keyout", path, "-out", path.with_name("c.pem")],
                   check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_name("c.pem").read_bytes())
    return path


PNG = IMAGES["PNG in RGB"]
HEAD = b"HTTP/1.1 200 OK\r\n"
REPLIES = {
    "whole": (HEAD + b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG, None),
    "chunked": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG), None),
    "until its end": (HEAD + b"\r\n" + PNG, None),
    "after a hint": (b"HTTP/1.1 103 Early Hints\r\n\r\n" + HEAD + b"\r\n" + PNG, None),
    "cut": (HEAD + b"Content-Length: 9999\r\n\r\n" + PNG, "invalid_image_url"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n", "invalid_image_url"),
    "not found": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabc", "invalid_image_url"),
    "part": (b"HTTP/1.1 206 Partial\r\n\r\n" + PNG, "invalid_image_url"),
    "packed": (HEAD + b"Content-Encoding: gzip\r\n\r\n" + PNG, "invalid_image_url"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", "invalid_image_url"), "silence": (b"", "invalid_image_url"),
    "long head": (HEAD + b"X: y\r\n" * 200_000 + b"\r\n", "invalid_image_url"),
    "nothing": (HEAD + b"Content-Length: 0\r\n\r\n", "empty_image"),
    "too much": (HEAD + b"\r\n" + bytes(400_000), "image_too_large"),
    "a page": (HEAD + b"\r\n<html>", "invalid_image_format"),
}


class Web:
    """A server at 127.0.0.1 that counts as public, and the name lookups and requests that it sees."""

    def __init__(self, certificate: Path, monkeypatch, addresses: tuple[str, ...] = ("127.0.0.1",)):
        self.lookups, self.requests, self.names, self.reply, self.is_stalled = [], [], [], b"", False
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.context.sni_callback = lambda _, name, __: self.names.append(name)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setattr(media, "is_public", lambda address: address.startswith("127.0.0."))

        def lookup(host, port, **_):
            if host.startswith("127."):  # asyncio's own, of an address
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
            self.lookups.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *_, **__: lookup(host, port))
        self.monkeypatch = monkeypatch

    async def serve(self, reader, writer) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if self.is_stalled:
                await reader.read()
            writer.write(self.reply)
            await writer.drain()
            writer.close()

    def load(self, url: str = f"https://{HOST}/a.png?b=c", **limits):
        async def run():
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
            self.monkeypatch.setattr(media, "HTTPS_PORT", server.sockets[0].getsockname()[1])
            hosts = (HOST, "other.example.org")
            bounds = {"fetch_hosts": hosts, "fetch_seconds": 60} | limits
            loader = MediaLoader(dataclasses.replace(LIMITS, **bounds), SMALL, False)
            try:
                return await loader.load(url, "x")
            finally:
                await loader.close()
                server.close()
        return asyncio.run(run())


@pytest.mark.parametrize("name", REPLIES)
def test_fetching(name, certificate, monkeypatch):
    web = Web(certificate, monkeypatch)
    web.reply, code = REPLIES[name]
    if code is None:
        assert web.load().digest == hashlib.sha256(PNG).digest()
        assert web.requests[0].startswith(b"GET /a.png?b=c HTTP/1.1\r\n") and b"gzip" not in web.requests[0]
        assert f"host: {HOST}\r\n".encode() in web.requests[0].lower()
    else:
        with pytest.raises(ApiError) as error:
            web.load()
        assert (error.value.status, error.value.code) == (400, code) and "127" not in error.value.message
    assert (web.lookups, web.names) == ([HOST], [HOST])  # one lookup, whose address is the one connected to


def test_a_certificate_of_another_name_is_not_trusted(certificate, monkeypatch):
    web = Web(certificate, monkeypatch)
    with pytest.raises(ApiError, match="could not be fetched"):
        web.load("https://other.example.org/")
    assert not web.requests


def test_one_address_that_is_not_public_is_enough(certificate, monkeypatch):
    web = Web(certificate, monkeypatch, ("127.0.0.1", "10.0.0.1"))
    with pytest.raises(ApiError, match="could not be fetched"):
        web.load()
    assert web.lookups and not web.names


def test_the_next_address_is_tried(certificate, monkeypatch):
    web = Web(certificate, monkeypatch, ("127.0.0.2", "127.0.0.1"))
    web.reply = HEAD + b"\r\n" + PNG
    assert web.load().tiles.shape == (1, 28, 28, 3)


def test_a_server_that_never_answers(certificate, monkeypatch):
    web = Web(certificate, monkeypatch)
    web.is_stalled = True
    with pytest.raises(ApiError, match="could not be fetched"):
        web.load(fetch_seconds=0.3)
    assert web.requests


def process_ids(loader: MediaLoader) -> list[int]:
    return [process._process.pid for process in loader._processes]


def slow_jpeg() -> bytes:
    """150 KB with a hundred scans, each of which costs as much as the image."""
    content = encoded(Image.new("RGB", (5000, 5000), "red"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (101 - content.count(b"\xff\xda")) + content[-2:]


def test_a_slow_image_ends_its_process_and_no_other(caplog):
    with opened(Limits(decode_processes=2, decode_seconds=0.7)) as loader:
        before = process_ids(loader)
        assert "more than 0.7 s" in refusal(loader, data_url(slow_jpeg())).message
        assert len(set(before) & set(process_ids(loader))) == 1
        assert asyncio.run(loader.load(data_url(encoded(picture(8, 8))), "x")).tiles.shape == (1, 28, 28, 3)
    assert caplog.text.count("has ended with -14") == 1


def test_a_process_that_dies_is_replaced(monkeypatch):
    original = media.DecodingProcess.decode

    def decode(self, content, *rest):
        if content == PNG:
            os.kill(self._process.pid, signal.SIGKILL)
        return original(self, content, *rest)

    async def lose_one(loader: MediaLoader) -> None:
        lost, loaded = await asyncio.gather(*(loader.load(data_url(content), "x") for content in (PNG, IMAGES["JPEG"])),
                                            return_exceptions=True)
        assert "could not be decoded" in lost.message and lost.status == 400
        assert loaded.digest == hashlib.sha256(IMAGES["JPEG"]).digest()

    monkeypatch.setattr(media.DecodingProcess, "decode", decode)
    with opened() as loader:
        asyncio.run(lose_one(loader))
        idle, = loader._processes
        idle.end()
        assert asyncio.run(loader.load(data_url(encoded(picture(3, 3))), "x")).tiles.shape == (1, 28, 28, 3)


@pytest.mark.parametrize("answer", [b"", b"[]\n", b"7\n", b'{"refused": "x"}\n', b'{"refused": []}\n', b"{" * 400,
                                    b'{"width": 0, "height": 5}\n', b'{"width": "4", "height": 4}\n',
                                    b'{"width": 9e99, "height": 1}\n', b'{"width": 4, "height": 4}\nabc',
                                    b'{"width": 100000, "height": 100000}\n'])
def test_false_answers_of_a_process_reach_nobody(answer, loader):
    process = media.DecodingProcess.__new__(media.DecodingProcess)
    program = f"import sys; sys.stdin.buffer.read(9); sys.stdout.buffer.write({answer!r})"
    process._process = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=-1, stdout=-1)
    with pytest.raises(EOFError):
        process.decode(b"abc", False, SMALL, LIMITS)
    process.wait()


def test_processes_see_no_secret_and_end_with_the_server(tmp_path):
    """One of them while it decodes."""
    path = tmp_path / "slow.jpg"
    path.write_bytes(slow_jpeg())
    program = ("import sys; from llava_jax.serve import limits, media; from llava_jax.images import ImageProcessor\n"
               "bounds = limits.Limits(decode_processes=2, decode_seconds=1)\n"
               "made = media.MediaLoader(bounds, ImageProcessor(), False)\n"
               "process, other = (process._process for process in made._processes)\n"
               "content = open(sys.argv[1], 'rb').read()\n"
               "process.stdin.write(bytes(1) + len(content).to_bytes(8, 'big') + content); process.stdin.flush()\n"
               "print(process.pid, other.pid, flush=True); input()")
    server = subprocess.Popen([sys.executable, "-c", program, path], stdin=-1, stdout=-1, text=True,
                              env=os.environ | {"LLAVA_JAX_API_KEY": "sk-secret-1"})
    ids = list(map(int, server.stdout.readline().split()))
    ends = [os.pidfd_open(number) for number in ids]
    for number in ids:
        assert b"sk-secret-1" not in Path(f"/proc/{number}/environ").read_bytes()
    server.kill()
    server.communicate()
    for end in ends:
        assert select.select([end], [], [], 60)[0]
        os.close(end)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Length of each file that a process was given."""
    lengths, original = [], media.DecodingProcess.decode
    monkeypatch.setattr(media.DecodingProcess, "decode", lambda self, content, *rest: (
        lengths.append(len(content)), original(self, content, *rest))[1])
    return lengths


def test_the_same_image_is_decoded_once(decoded, monkeypatch):
    small, large = data_url(PNG), data_url(IMAGES["JPEG"])

    async def load_together(loader: MediaLoader) -> None:
        images = await asyncio.gather(*(loader.load(url, "x") for url in (small, large, small, large, small)))
        assert images[0] is images[2] is images[4] and not loader._decodings
        assert await loader.load(small, "x") is images[0]

    with opened() as loader:
        asyncio.run(load_together(loader))
        assert sorted(decoded) == sorted([len(PNG), len(IMAGES["JPEG"])])
        monkeypatch.setattr(media, "CACHE_BYTES", 2 * 28 * 28 * 3)
        for seed in range(4):
            asyncio.run(loader.load(data_url(encoded(picture(seed=seed))), "x"))
        assert loader._cached_bytes == 2 * 28 * 28 * 3 == sum(image.tiles.nbytes for image in loader._cache.values())


def test_images_of_requests_that_left_are_not_decoded(decoded):
    async def leave(loader: MediaLoader) -> None:
        process = loader._idle.get()  # so that all wait
        urls = [data_url(encoded(picture(seed=seed))) for seed in range(3)]
        left = [asyncio.create_task(loader.load(url, "x")) for url in urls]
        stays = asyncio.create_task(loader.load(urls[1], "x"))
        while len(loader._decodings) < 3 or sum(work.waiters for work in loader._decodings.values()) < 4:
            await asyncio.sleep(0)
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        loader._idle.put(process)
        assert (await stays).tiles.shape == (1, 28, 28, 3) and not loader._decodings
        assert await loader.load(urls[2], "x")

    with opened() as loader:
        asyncio.run(leave(loader))
        assert len(decoded) <= 3  # the first may have been in its thread already


def test_decoding_goes_on_after_the_signals_of_a_terminal(loader):
    asyncio.run(loader.load(data_url(encoded(picture(seed=76))), "x"))
    before = process_ids(loader)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before[0], number)
    asyncio.run(loader.load(data_url(encoded(picture(seed=77))), "x"))
    assert process_ids(loader) == before
