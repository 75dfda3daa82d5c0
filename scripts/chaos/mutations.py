"""Damages to files: of the structure of JSON, JSON lines and safetensors headers, and of bytes. Seeded."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = (None, True, False, 0, 1, -1, -(2**63), 1.5, 1e308, float("nan"), float("inf"), -float("inf"), 10**9, 2**31,
          2**63, "", "x", "\ud800", "\0", "../../etc/hostname", "\x1b]0;x\x07\x1b[31m", "\u202eabc", [], [None], [[]],
          {}, {"a": 1}, "@@DIGITS@@", "@@DEEP@@", "@@DEEP OBJECT@@", "@@LONG@@")
"""What takes the place of a value. Texts with @@ stand for what the JSON library would not write."""
RAW = {'"@@DIGITS@@"': "7" * 10_000, '"@@DEEP@@"': "[" * 100_000 + "]" * 100_000,
       '"@@DEEP OBJECT@@"': '{"a":' * 100_000 + "1" + "}" * 100_000, '"@@LONG@@"': '"' + "x" * 1_000_000 + '"'}


def mutate(path: Path, rng: random.Random) -> str:
    """Damages the file in one way; returns the damage in words."""
    content = path.read_bytes()
    structured = rng.random() < 0.75
    if structured and path.suffix == ".safetensors":
        content, what = change_header(content, rng)
    elif structured and (lines := is_lines(path, content)):
        content, what = change_line(content, rng)
    elif structured and lines is not None:
        text, what = change_json(json.loads(content), rng)
        content = text.encode(errors="surrogatepass")
    else:
        content, what = change_bytes(content, rng)
    path.write_bytes(content)
    return what


def is_lines(path: Path, content: bytes) -> bool | None:
    """Whether the file holds JSON lines; None if it is no JSON."""
    try:
        json.loads(content)
        return path.suffix == ".jsonl"
    except ValueError:
        pass
    try:
        return bool([json.loads(line) for line in content.splitlines()]) or None
    except ValueError:
        return None


def change_line(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    text, what = change_json(json.loads(lines[number]), rng)
    lines[number] = text.encode(errors="surrogatepass")
    return b"\n".join(lines) + b"\n", f"line {number + 1}: {what}"


def change_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Of a safetensors file: its JSON header, or the length before it."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.15:
        wrong = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + content[8:], f"header length {wrong}"
    text, what = change_json(json.loads(content[8 : 8 + length]), rng)
    header = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(header)) + header + content[8 + length :], f"header: {what}"


def change_json(value: Any, rng: random.Random) -> tuple[str, str]:
    """The text of the JSON value with one change."""
    places = list(find_places(value))
    kind = rng.choice(("replace", "replace", "replace", "replace", "delete", "duplicate", "swap", "repeat", "wrap"))
    if not places or rng.random() < 0.03:
        new = rng.choice(VALUES)
        return to_text(new), f"top level is {new!r}"
    # Large tables (a vocabulary) have many places of one kind; the few others are as interesting.
    depth = rng.choice(sorted({len(way) for way in places}))
    way = rng.choice([way for way in places if len(way) == depth])
    parent = value
    for key in way[:-1]:
        parent = parent[key]
    key, where = way[-1], "/".join(map(str, way))[:120]
    if kind == "delete":
        del parent[key]
        return to_text(value), f"{where} deleted"
    if kind == "duplicate" and isinstance(parent, dict):
        new = rng.choice(VALUES)
        parent[f"@@DUPLICATE@@{key}"] = new
        return to_text(value).replace('"@@DUPLICATE@@', '"'), f"{where} twice, then {new!r}"
    if kind == "swap":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
        return to_text(value), f"{where} and {other} swapped"
    if kind == "repeat" and isinstance(parent[key], list):
        parent[key] = parent[key][:100] * 1000
        return to_text(value), f"{where} repeated 1,000 times"
    if kind == "wrap":
        parent[key] = rng.choice([[parent[key]], {"content": parent[key]}, str(parent[key])])
        return to_text(value), f"{where} wrapped as {type(parent[key]).__name__}"
    parent[key] = rng.choice(VALUES)
    return to_text(value), f"{where} = {parent[key]!r}"


def find_places(value: Any, way: tuple = ()):
    """The way to every item and field."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*way, key)
        yield from find_places(value[key], (*way, key))


def to_text(value: Any) -> str:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text


def flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :], f"bit {bit} of byte {at} flipped"


def truncate(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(content))
    return content[:at], f"truncated to {at} bytes"


def append(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    more = rng.choice([b"\0", b"\n", b"}", b"garbage", rng.randbytes(4096)])
    return content + more, f"{len(more)} bytes {more[:8]!r} appended"


def zero(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(content))
    size = min(4096, len(content) - at)
    return content[:at] + bytes(size) + content[at + size :], f"{size} bytes from {at} on are 0"


def insert(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, more = rng.randrange(len(content)), rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"\x1b[31m"])
    return content[:at] + more + content[at:], f"{more!r} inserted at {at}"


def cut(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(content))
    size = rng.randrange(1, 64)
    return content[:at] + content[at + size :], f"{size} bytes from {at} on left out"


def replace_all(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    new = rng.choice([b"", b"\n", b"\xef\xbb\xbf" + content, content.decode("latin-1").encode("utf-16"), bytes(4096),
                      b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!doctype html>"])
    return new, f"the file is {new[:12]!r}"


BYTES: tuple[Callable[[bytes, random.Random], tuple[bytes, str]], ...] = (
    flip, flip, truncate, append, zero, insert, insert, cut, replace_all)


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    return rng.choice(BYTES)(content or b"\0", rng)
