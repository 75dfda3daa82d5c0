"""Opens the images of a request: data URLs, and https URLs of listed hosts. Processes of their own decode them.

No other module opens what a stranger sends. This file is also the program of a decoding process, which has neither JAX
nor the environment of the server. It receives a file and returns pixels. The server trusts none of its answers: it
checks their shape and computes the layout itself.
"""

import asyncio
import binascii
import contextlib
import hashlib
import importlib
import ipaddress
import json
import logging
import math
import os
import queue
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_jax.errors import UserError
from llava_jax.image_files import TooLarge, decoding, open_header, to_rgb, turn_upright
from llava_jax.images import ImageProcessor, Layout
from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import PreparedImage
from llava_jax.serve.limits import Limits

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Formats that are decoded, known by their content. Of several frames, only the first is decoded."""

CACHE_BYTES = 2**28
"""Maximum number of bytes of decoded images that are kept for later requests."""

MAX_FETCHES = 16
"""Number of images that are fetched and decoded at a time, which bounds their memory."""

BASE64_PIECE = 2**20
"""Number of characters that are decoded at a time, because Python's other threads wait meanwhile."""

START_SECONDS = 60.0
"""Seconds that the start of a decoding process may take, besides the time for an image."""

BYTES_PER_PIXEL, OTHER_BYTES = 24, 2**29
"""Address space of a decoding process: per pixel of the largest image (WebP needs 18), and for Python."""

HTTPS_PORT = 443

DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
"""Start of a data URL. Its media type is not read, because the content tells the format."""

HTTPS_URL = re.compile(
    r"https://([a-z0-9.-]+)(?::443)?(/[\w.~!$&'()*+,;=:@%/-]*)?(\?[\w.~!$&'()*+,;=:@%/?-]*)?", re.ASCII)
"""The only form of URLs that are fetched: no user, other port, fragment, backslash, blank or non-ASCII character."""

HOST = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

GLOBAL_V6, SIX_TO_FOUR = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("2002::/16")

MESSAGES = {
    "url": ("The image must be a data URL, such as data:image/png;base64,...", "invalid_image_url"),
    "host": ("The server does not fetch images from this host; send a data URL.", "invalid_image_url"),
    "fetch": ("The image could not be fetched.", "invalid_image_url"),
    "base64": ("The data URL is not valid base64.", "invalid_base64_image"),
    "empty": ("The image is empty.", "empty_image"),
    "bytes": ("The image is too large: at most {image_bytes:,} bytes are allowed.", "image_too_large"),
    "pixels": ("The image is too large: at most {image_pixels:,} pixels are allowed.", "image_too_large"),
    "side": ("The image is too large: at most {image_side:,} pixels a side are allowed.", "image_too_large"),
    "aspect": ("The image is too elongated: at most {image_aspect} to 1 is allowed.", "invalid_image"),
    "elongated": ("The image is too elongated for this model.", "invalid_image"),
    "format": ("The image is not a readable JPEG, PNG, WebP or GIF.", "invalid_image_format"),
    "damaged": ("The image is damaged or incomplete.", "image_parse_error"),
    "memory": ("The image needs too much memory to decode.", "image_too_large"),
    "time": ("The image takes more than {decode_seconds:g} s to decode.", "image_too_large"),
    "lost": ("The image could not be decoded.", "image_parse_error"),
}
"""Message and OpenAI's code of each reason for which an image is refused."""


class Refused(Exception):
    """Raised for an image that is not opened. Its argument is a key of MESSAGES."""


@dataclass(eq=False)
class Decoding:
    """An image that is being decoded or waits for it, and the number of requests that wait for the image."""

    future: asyncio.Future[PreparedImage]
    waiters: int = 0


class MediaLoader:
    """Opens images. It starts `limits.decode_processes` processes at once, and replaces one that dies.

    Args:
      processor: makes an image's tiles and layout.
      exif: whether images are rotated as their EXIF orientation says.
    """

    def __init__(self, limits: Limits, processor: ImageProcessor, exif: bool):
        self.limits, self.processor = limits, processor
        self._settings = json.dumps({"processor": asdict(processor), "limits": asdict(limits), "exif": exif})
        self._tls = ssl.create_default_context() if limits.fetch_hosts else None
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._cache: OrderedDict[tuple[bytes, bool], PreparedImage] = OrderedDict()
        self._cached_bytes = 0
        self._decodings: dict[tuple[bytes, bool], Decoding] = {}
        self._threads = ThreadPoolExecutor(limits.decode_processes, "decode")  # each waits for one process
        self._reader = ThreadPoolExecutor(1, "base64")  # one, because glibc keeps memory for each thread that had some
        self._idle: queue.LifoQueue[DecodingProcess] = queue.LifoQueue()
        self._closed, self._starting = False, threading.Lock()
        self._processes = {DecodingProcess(self._settings) for _ in range(limits.decode_processes)}
        for process in self._processes:
            self._idle.put(process)

    async def load(self, url: str, param: str, images: int = 1) -> PreparedImage:
        """Opens an image.

        Args:
          url: data URL, or https URL of a host in `limits.fetch_hosts`.
          param: field of the request, for the error.
          images: number of images of the conversation, because some processors make fewer tiles of several.

        Raises ApiError with status 400 if the image is refused. If the call is cancelled while the image waits for a
        process, it is not decoded.
        """
        padded = self.processor.for_images(images) is not self.processor
        try:
            if start := DATA_URL.match(url):
                content, digest = await asyncio.get_running_loop().run_in_executor(
                    self._reader, read_base64, url, start.end(), self.limits.image_bytes)
                return await self._prepare(content, digest, padded)
            if not self.limits.fetch_hosts or not url.startswith("https:"):
                raise Refused("url")
            async with self._fetches:
                content = await self._fetch(url)
                return await self._prepare(content, hashlib.sha256(content).digest(), padded)
        except Refused as reason:
            message, code = MESSAGES[reason.args[0]]
            raise ApiError(400, message.format(**asdict(self.limits)), param, code) from None

    async def close(self) -> None:
        """Ends the decoding processes. Images that are being decoded are lost."""
        with self._starting:
            self._closed = True
        for process in list(self._processes):
            process.end()
        for threads in (self._reader, self._threads):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)

    async def _prepare(self, content: bytes, digest: bytes, padded: bool) -> PreparedImage:
        """Returns the image from the cache, or waits until it is decoded, once for all who wait for it."""
        key = digest, padded
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        work = self._decodings.get(key)
        if work is None:
            work = self._decodings[key] = Decoding(asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, content, digest, padded))
        work.waiters += 1
        try:
            image = await asyncio.shield(work.future)
        finally:
            work.waiters -= 1
            if not work.waiters:
                work.future.cancel()  # without effect if it is done; an image that still waits is not decoded
                del self._decodings[key]
            del work  # this frame is in the traceback of a refusal, which would keep itself and the image
        self._keep(key, image)
        return image

    def _keep(self, key: tuple[bytes, bool], image: PreparedImage) -> None:
        if key not in self._cache:
            self._cache[key] = image
            self._cached_bytes += image.tiles.nbytes
        while self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1].tiles.nbytes

    def _decode(self, content: bytes, digest: bytes, padded: bool) -> PreparedImage:
        """Decodes an image in an idle process. Runs in a thread."""
        process = self._idle.get()
        try:
            if not process.is_alive():
                process = self._replace(process)
            try:
                tiles, layout = process.decode(content, padded, self.processor, self.limits)
            except EOFError:
                code = process.wait()
                log.warning("a decoding process has ended with %d and is replaced", code)
                process = self._replace(process)
                raise Refused("time" if code == -signal.SIGALRM else "lost") from None
        finally:
            self._idle.put(process)
        return PreparedImage(digest, tiles, layout)

    def _replace(self, process: "DecodingProcess") -> "DecodingProcess":
        with self._starting:
            process.end()
            if self._closed:
                return process
            self._processes.remove(process)
            self._processes.add(started := DecodingProcess(self._settings))
            return started

    async def _fetch(self, url: str) -> bytes:
        """Fetches a file by https. Every address of the host must be public, and one of these is connected to."""
        parts = HTTPS_URL.fullmatch(url)
        if not parts or len(url) > 2048:
            raise Refused("url")
        host, target = parts[1], (parts[2] or "/") + (parts[3] or "")
        if host not in self.limits.fetch_hosts:
            raise Refused("host")
        try:
            async with asyncio.timeout(self.limits.fetch_seconds):
                found = await asyncio.get_running_loop().getaddrinfo(host, HTTPS_PORT, type=socket.SOCK_STREAM)
                addresses = [info[4][0] for info in found]
                if not all(map(is_public, addresses)):
                    raise Refused("fetch")
                for address in addresses:
                    with contextlib.suppress(OSError):
                        reader, writer = await asyncio.open_connection(
                            address, HTTPS_PORT, ssl=self._tls, server_hostname=host)
                        try:
                            return await read_response(reader, writer, host, target, self.limits.image_bytes)
                        finally:
                            writer.transport.abort()
        except (OSError, TimeoutError):
            pass
        raise Refused("fetch")


def check_hosts(hosts: Sequence[str]) -> None:
    """Raises UserError for a text that is no host name."""
    for host in hosts:
        if not HOST.fullmatch(host):
            raise UserError(f"--fetch-hosts {host!r}: give a host name in lower case, such as images.example.org")


def read_base64(url: str, start: int, max_bytes: int) -> tuple[bytes, bytes]:
    """Returns the content of a data URL, and its digest. Reads blanks, the URL-safe alphabet, and missing padding."""
    try:
        text = url.encode("ascii")[start:].translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n")
    except UnicodeEncodeError:
        raise Refused("base64") from None
    length = len(text) - (len(text[-3:]) - len(text[-3:].rstrip(b"=")))
    if not length:
        raise Refused("empty")
    if length * 3 // 4 > max_bytes:
        raise Refused("bytes")
    padding = b"=" * (-length % 4)
    if text[length:] not in (b"", padding) or text.find(b"=", 0, length) >= 0:
        raise Refused("base64")
    last, view = (length - 1) // BASE64_PIECE * BASE64_PIECE, memoryview(text)
    pieces = [view[start : start + BASE64_PIECE] for start in range(0, last, BASE64_PIECE)]
    try:
        content = b"".join(binascii.a2b_base64(piece, strict_mode=True)
                           for piece in (*pieces, text[last:length] + padding))
    except binascii.Error:
        raise Refused("base64") from None
    return content, hashlib.sha256(content).digest()


def is_public(address: str) -> bool:
    """Returns whether an IP address is one of the internet, and none that leads to another address (6to4, NAT64)."""
    ip = ipaddress.ip_address(address)
    return ip.is_global and not ip.is_multicast and (
        ip.version == 4 or ip in GLOBAL_V6 and ip not in SIX_TO_FOUR)


async def read_response(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, target: str,
                        max_bytes: int) -> bytes:
    """Sends a GET request and returns the body. Follows no redirect. Raises Refused and OSError."""
    import h11

    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**14)
    headers = [("host", host), ("accept", "image/*"), ("accept-encoding", "identity"), ("connection", "close")]
    body = bytearray()
    try:
        writer.write(http.send(h11.Request(method="GET", target=target, headers=headers)))
        http.send(h11.EndOfMessage())
        while True:
            match http.next_event():
                case h11.Response(status_code=200, headers=fields):
                    if any(name == b"content-encoding" and value != b"identity" for name, value in fields):
                        raise Refused("fetch")
                case h11.Data(data=data):
                    body += data
                    if len(body) > max_bytes:
                        raise Refused("bytes")
                case h11.EndOfMessage():
                    break
                case h11.NEED_DATA:
                    http.receive_data(await reader.read(2**16))
                case h11.InformationalResponse():
                    pass
                case _:
                    raise Refused("fetch")
    except h11.ProtocolError:
        raise Refused("fetch") from None
    if not body:
        raise Refused("empty")
    return bytes(body)


class DecodingProcess:
    """A process that decodes one image at a time.

    It receives one byte (whether the image is padded), the length in 8 bytes, and the content. It sends one JSON line,
    a reason for refusing the image, or its width and height, and then the bytes of the tiles. It ends with its stdin,
    so none is left if the server is killed, and by its own alarm if an image takes too long.
    """

    def __init__(self, settings: str):
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._process = subprocess.Popen([sys.executable, "-P", "-m", "llava_jax.serve.media", settings],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        return self._process.wait()

    def end(self) -> None:
        """Kills the process and waits for its end."""
        self._process.kill()
        self._process.wait()

    def decode(self, content: bytes, padded: bool, processor: ImageProcessor, limits: Limits
               ) -> tuple[np.ndarray, Layout]:
        """Returns the tiles of an image, and its layout.

        Raises Refused, and EOFError if the process has ended, or is killed for its silence or a false answer.
        """
        processor = processor.for_images(1 + padded)
        timer = threading.Timer(START_SECONDS + limits.decode_seconds, self.end)
        timer.start()
        try:
            self._process.stdin.write(bytes([padded]) + len(content).to_bytes(8, "big"))
            self._process.stdin.write(content)
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline(200))
            if (reason := answer.get("refused")) in MESSAGES:
                raise Refused(reason)
            width, height = answer["width"], answer["height"]
            if not 1 <= width * height <= limits.image_pixels:
                raise ValueError(answer)
            layout = processor.layout(width, height)
            shape = layout.tiles, processor.size, processor.size, 3
            return np.frombuffer(self._process.stdout.read(math.prod(shape)), np.uint8).reshape(shape), layout
        except Refused:
            raise
        except Exception as error:  # it does not answer, or not as this program does
            self.end()
            raise EOFError from error
        finally:
            timer.cancel()


def decode(content: bytes, processor: ImageProcessor, exif: bool, image_pixels: int, image_side: int,
           image_aspect: float) -> tuple[tuple[int, int], np.ndarray]:
    """Returns size and tiles of an image. Raises Refused. Only decoding processes call it."""
    try:
        with decoding("", content):
            try:
                opened = open_header(content, image_pixels, formats=FORMATS)
            except UnidentifiedImageError:
                raise Refused("format") from None
            except (TooLarge, Image.DecompressionBombWarning, Image.DecompressionBombError):
                raise Refused("pixels") from None
            with opened as image:
                short, long = sorted(image.size)
                if long > image_side:
                    raise Refused("side")
                if long > image_aspect * short:
                    raise Refused("aspect")
                image.load()
                image = to_rgb(turn_upright(image) if exif else image)
    except MemoryError:
        raise Refused("memory") from None
    except UserError:
        raise Refused("damaged") from None
    try:
        return image.size, processor(image)
    except UserError:
        raise Refused("elongated") from None


def serve(settings: dict, requests: BinaryIO, answers: BinaryIO) -> None:
    """Decodes images until the server closes `requests`."""
    limits, exif = settings["limits"], settings["exif"]
    one = ImageProcessor(**{name: _tuples(value) for name, value in settings["processor"].items()})
    bounds = {name: limits[name] for name in ("image_pixels", "image_side", "image_aspect")}
    while len(header := requests.read(9)) == 9:
        content = requests.read(int.from_bytes(header[1:], "big"))
        signal.setitimer(signal.ITIMER_REAL, limits["decode_seconds"])  # nothing handles SIGALRM, so it kills
        try:
            (width, height), tiles = decode(content, one.for_images(1 + header[0]), exif, **bounds)
            answer, tiles = {"width": width, "height": height}, tiles.tobytes()
        except Refused as reason:
            answer, tiles = {"refused": reason.args[0]}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n" + tiles)
        answers.flush()


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main() -> None:
    """Runs a decoding process."""
    settings = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server still needs it while it drains
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # decoders print on them
        os.dup2(null, stream)
    for name in ("Jpeg", "Png", "WebP", "Gif"):  # otherwise PIL imports all its plugins for the first image
        importlib.import_module(f"PIL.{name}ImagePlugin")
    pixels = settings["limits"]["image_pixels"]
    Image.MAX_IMAGE_PIXELS = pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    space = OTHER_BYTES + BYTES_PER_PIXEL * pixels
    for kind, limit in ((resource.RLIMIT_AS, space), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # there is a lower limit already, or it is macOS
            resource.setrlimit(kind, (limit, limit))
    with contextlib.suppress(BrokenPipeError):
        serve(settings, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
