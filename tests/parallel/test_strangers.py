"""The coordinator before strangers: what they send neither ends nor stops the run, and gets no answer."""

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
from starting import finish, free_port, start

from llava_jax.parallel import coordinator


class Member:
    """A process of the run, by its connection alone."""

    def __init__(self, port: int, hello: bytes):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.lines = self.socket.makefile("rb")
        self.socket.sendall(hello)

    def say(self, **message) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict | None:
        """The next message; None at the end of the connection."""
        with contextlib.suppress(ConnectionError):
            while line := self.lines.readline():
                if (message := json.loads(line)) != {"kind": "alive"}:
                    return message
        return None


def hello(process: int = 0, count: int = 2, host: str = "a", secret: str = "") -> bytes:
    fields = {"kind": "hello", "process": process, "count": count, "host": host, "secret": coordinator.proof(secret)}
    return json.dumps(fields).encode() + b"\n"


@contextlib.contextmanager
def running(host: str = "127.0.0.1", files: int | None = None, **environment: str) -> Iterator[int]:
    """A coordinator of two processes; its port."""
    port = free_port()
    settings = {"host": host, "port": port, "count": 2, "hosts": [], "heartbeat_timeout": 60, "jax_port": 1}
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    process = subprocess.Popen(
        [sys.executable, "-P", coordinator.__file__, json.dumps(settings)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env=os.environ | environment, preexec_fn=limit)
    assert process.stdout.readline() == "ready\n"
    try:
        yield port
        assert process.poll() is None or process.returncode == 0
    finally:
        process.kill()
        assert "Traceback" not in process.communicate()[1]


def meet(port: int, **options) -> list[Member]:
    members = [Member(port, hello(process, **options)) for process in range(2)]
    assert [member.hear()["kind"] for member in members] == 2 * ["welcome"]
    return members


def assert_a_round_works(members: list[Member]) -> None:
    for member in members:
        member.say(kind="round", name="start", value=[1], seconds=30)
    assert [member.hear() for member in members] == 2 * [{"kind": "round", "values": [[1], [1]]}]


GREETINGS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" * 40 + b"\n", b"\n", b"null\n", b"[]\n",
    b"{}\n", b"1" * 5000 + b"\n", b"[" * 3000 + b"\n", b'{"a":' * 700 + b"\n", b"\xff\xfe\n", hello()[:-2] + b"\n",
    hello()[:-1] + hello(1), hello(process=-1), hello(process=-2), hello(process=True), hello(process=0.0),
    hello(process="0"), hello(host="\x1b[2Jx"), hello(host="x" * 300), hello(host=7), hello(count=None),
    hello()[:-2] + b', "kinds": "serve"}\n', hello()[:-2] + b', "kind": "alive"}\n',
    b'{"kind": "alive"}\n', b'{"kind": "__init__"}\n',
]


def test_greetings_that_are_none_get_no_answer():
    with running() as port:
        for greeting in GREETINGS:
            assert Member(port, greeting).hear() is None, greeting
        assert_a_round_works(meet(port))


def test_processes_that_are_not_of_this_run_are_told_why():
    with running() as port:
        first = Member(port, hello(0))
        assert first.hear()["kind"] == "welcome"
        for wrong, why in ((hello(2), "there are 2 processes"), (hello(1, count=3), "there are 3 processes"),
                           (hello(0), r"it is process 0 \(a\) too"), (hello(1, secret="x"), "LLAVA_JAX_SECRET is not")):
            told = Member(port, wrong).hear()
            assert told["kind"] == "refused" and re.search(why, told["line"])
        second = Member(port, hello(1))
        assert second.hear()["kind"] == "welcome"
        assert_a_round_works([first, second])


def test_only_who_knows_the_secret_is_let_in():
    with running(LLAVA_JAX_SECRET="open sesame") as port:
        for secret in ("", "open", coordinator.proof("open sesame")):
            assert Member(port, hello(1, secret=secret)).hear()["kind"] == "refused"
        assert_a_round_works(meet(port, secret="open sesame"))


def test_a_flood_of_silent_connections_keeps_nobody_out():
    with running(files=200) as port:
        silent = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(400)]
        for number, connection in enumerate(silent):  # half of them with the start of a greeting
            with contextlib.suppress(ConnectionError):
                connection.sendall(hello()[: number % 2 * 20])
        members = meet(port)
        for connection in silent:
            connection.close()
        assert_a_round_works(members)


def test_a_greeting_without_end_is_cut_off():
    with running() as port:
        endless = socket.create_connection(("127.0.0.1", port), timeout=30)
        with pytest.raises(ConnectionError):
            while True:
                endless.sendall(b"a" * 2**20)
        assert_a_round_works(meet(port))


def test_a_slow_greeting_is_not_waited_for(monkeypatch):
    """Strangers are let go after GREETING_SECONDS."""
    monkeypatch.setattr(coordinator, "GREETING_SECONDS", 0.01)

    async def meet() -> bytes:
        told = coordinator.Coordinator(2, [], 60, 1)
        server = await asyncio.start_server(told.serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(hello()[:10])
        end = await reader.read()
        assert not told.strangers and not told.writers and told.verdict is None
        return end

    assert asyncio.run(meet()) == b""


def test_a_greeting_that_arrived_before_a_flood_is_read():
    """All connections are accepted in one step of the event loop. The first has greeted."""
    async def greet() -> bytes:
        told = coordinator.Coordinator(2, [], 60, 1)
        server = await asyncio.start_server(told.serve, "127.0.0.1", 0, backlog=200)
        address = server.sockets[0].getsockname()
        connections = [socket.create_connection(address, timeout=30) for _ in range(2 * coordinator.MAX_STRANGERS)]
        connections[0].sendall(hello())
        reader, _ = await asyncio.open_connection(sock=connections[0])
        return await reader.readline()

    assert json.loads(asyncio.run(greet()))["kind"] == "welcome"


def test_a_greeting_of_a_closed_connection_is_not_admitted():
    """The process would count as lost, which ends the run of all."""
    async def greet() -> None:
        reader, told = asyncio.StreamReader(), coordinator.Coordinator(2, [], 60, 1)
        reader.feed_data(hello())
        writer = mock.Mock(**{"is_closing.return_value": True, "get_extra_info.return_value": ("127.0.0.1", 1)})
        await told.serve(reader, writer)
        assert not told.writers and told.verdict is None and not told.over.is_set()

    asyncio.run(asyncio.wait_for(greet(), 30))


@pytest.mark.parametrize("line", [
    b"\xff\n", b"{}\n", b"[]\n", b'{"kind": "serve"}\n', b'{"kind": ["round"]}\n', b'{"kind": "end", "line": "x"}\n',
    b'{"kind": "tell"}\n', b'{"kind": "here", "step": 3}\n', b'{"kind": "stop", "signal": "15"}\n', hello(),
    b'{"kind": "round", "number": 7, "name": "start", "value": 1, "seconds": 1}\n',
    b'{"kind": "round", "name": "start", "value": 1, "seconds": null}\n',
    b'{"kind": "failed", "line": "x", "code": 0}\n', b'{"kind": "alive", "step": 1}\n', b"[" * 100_000 + b"\n",
    b"1" * (coordinator.MESSAGE_BYTES + 2) + b"\n",
])
def test_a_process_that_sends_no_message_ends_the_run_by_name(line):
    with running() as port:
        first, second = meet(port)
        with contextlib.suppress(ConnectionError):  # it may be cut off while it sends
            second.socket.sendall(line)
        told = first.hear()
        assert (told["kind"], told["code"]) == ("end", 1)
        assert re.match(r"process 1 \(a\) sent an invalid message \(", told["line"])


def test_a_run_meets_among_strangers():
    """Real processes, while strangers do what they can."""
    port = free_port()
    first, = start("agree", 2, present=range(1), port=port)
    over = threading.Event()

    def pester() -> None:
        kept = []
        while not over.is_set():
            for greeting in (*GREETINGS, b""):
                with contextlib.suppress(OSError):
                    kept = [*kept, socket.create_connection(("127.0.0.1", port), timeout=1)][-50:]
                    kept[-1].sendall(greeting)

    pesterers = [threading.Thread(target=pester) for _ in range(2)]
    for thread in pesterers:
        thread.start()
    try:
        second = start("agree", 2, present=range(1, 2), port=port)
        codes, outputs, errors = finish([first, *second])
    finally:
        over.set()
        for thread in pesterers:
            thread.join()
    assert codes == [0, 0], errors
    assert outputs[0][0] == outputs[1][0] == "gathered [0, 10] [2, 1]"


def test_it_listens_where_the_others_look_for_it():
    """At the address of process 0; everywhere only if its name says nothing of it."""
    for host, address in (("localhost", ("127.0.0.1", "::1")), ("127.0.0.1", ("127.0.0.1",)),
                          ("127.0.0.2", ("127.0.0.2",)), ("203.0.113.7", ("::", "0.0.0.0")),
                          ("name.invalid", ("::", "0.0.0.0"))):
        with coordinator.listen(host, 0, 1) as listening:
            assert listening.getsockname()[0] in address, host
    own = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    with coordinator.listen(socket.gethostname(), 0, 1) as listening:
        assert listening.getsockname()[0] in own or all(map(coordinator.is_loopback, own))
