"""The client of bench_serve.py and soak_serve.py: responses cut into any blocks, beside http.client."""

import http.client
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import serve_load
import soak_serve

PIECES = ["A ", "red ", "", "círculo\r\n0\r\n\r\n", "✓"]


def event(choices: list, **fields) -> bytes:
    return b"data: " + json.dumps({"choices": choices} | fields, ensure_ascii=False).encode() + b"\n\n"


EVENTS = [*(event([{"delta": {"content": text}, "finish_reason": None}]) for text in PIECES),
          event([{"delta": {}, "finish_reason": "stop"}]), event([], usage={"completion_tokens": 5}),
          b"data: [DONE]\n\n"]
STREAM = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
          + b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in EVENTS) + b"0\r\n\r\n")


class Bytes:
    """A socket that http.client reads a response from."""

    def __init__(self, data: bytes):
        self.data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12, unique=True))
def test_a_stream_cut_anywhere(cuts):
    ends = [*sorted(cuts), len(STREAM)]
    blocks = [(10.0 + i, STREAM[a:b]) for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
    reply = serve_load.parse(blocks, started=9.0)
    response = http.client.HTTPResponse(Bytes(STREAM))
    response.begin()
    assert (reply.status, reply.body, reply.complete) == (response.status, response.read(), True)
    assert (reply.text, reply.tokens, reply.finish_reason) == ("".join(PIECES), 5, "stop")
    # A piece has the time of the block that its last byte came with, and pieces of one block are one.
    chunk_ends = [STREAM.index(data) + len(data) + 2 for data, text in zip(EVENTS, PIECES, strict=False) if text]
    assert reply.times == sorted({1.0 + next(i for i, end in enumerate(ends) if end >= last) for last in chunk_ends})


def test_a_stream_that_is_cut_off():
    reply = serve_load.parse([(1.0, STREAM[: STREAM.index(b"red ") + 2])], started=0.5)
    assert (reply.status, reply.complete, reply.text) == (200, False, "A ")
    assert serve_load.parse([], started=0.5).status == 0


@pytest.mark.parametrize("reply, problem", [
    (serve_load.Reply(200, complete=True, text="red", tokens=2), None),
    (serve_load.Reply(200, complete=True, text="blue", tokens=2), "'blue'"),
    (serve_load.Reply(200, complete=True, text="red", tokens=3), "3 instead"),
    (serve_load.Reply(200, text="red", tokens=2), "complete False"),
    (serve_load.Reply(500, complete=True, error={}), "status 500"),
    (serve_load.Reply(), "status 0"),
])
def test_what_a_soak_counts_as_a_problem(reply, problem):
    soak = soak_serve.Soak(None, [], [("red", 2)], None)
    soak.check("good", 0, reply)
    assert [problem in text for text in soak.problems] == ([] if problem is None else [True])


def test_memory_that_grows(capsys):
    soak = soak_serve.Soak(None, [], [], None)
    soak.memory = [100 * 2**20] * 30 + [104 * 2**20] * 15
    soak.check_memory()
    assert not soak.problems
    soak.memory[-15:] = [106 * 2**20] * 15
    soak.check_memory()
    assert soak.problems == ["memory has grown by 6.0%"]
