"""The meeting point of a run's processes, in a process of its own that process 0 starts.

Every process keeps one connection to it. It collects what each says in a round and tells all; when one is asked to
stop, it agrees on when; and when one fails, is killed, or is not heard of, it tells the others which, and why.
It also holds JAX's own coordination service: this makes every other process abort with a C++ stack trace when it goes,
so it must outlive whichever process dies.

It listens at process 0's address alone where it can, believes no connection before its greeting is right, and ends the
run if a process sends what is no message. JAX's service knows no password: keep its ports from strangers.

Runs as a script, without the package or JAX; its argument: those of `coordinate`, as JSON.
"""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

ECHO = 1.0
"""Seconds that a reported error waits: if another process is found dead meanwhile, that is its cause and goes first."""

FAULT, MISTAKE, LOST, INTERRUPTED = 1, 2, 75, 130
"""Exit codes: any error; one that a user can mend; a process that is gone, late or was stopped; Ctrl-C."""

GREETING = 10.0
"""Seconds in which a new connection must have said who it is."""

GREETING_BYTES = 2**12
"""Bytes of a greeting at most."""

MESSAGE_BYTES = 2**24
"""Bytes of a message at most."""

STRANGERS = 64
"""Number of connections that may wait for their greeting at one time. One more ends the oldest of them."""

HELLO = {"process": int, "count": int, "host": str, "secret": str}

NUMBER = int | float
KINDS = {
    "alive": {},
    "round": {"number": int, "name": str, "value": object, "seconds": NUMBER},
    "stop": {"number": int},
    "here": {"step": int},
    "failed": {"line": str, "code": int},
    "bye": {},
}
"""The messages of a process: the fields of each kind, and their types."""


def parse(line: bytes, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads a line that must hold these fields and no others; without `fields` a message, whose `kind` says which.

    Raises ValueError for anything else.
    """
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not an object")
    if fields is None:
        kind = message.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError("no such kind")
        fields = {"kind": str} | KINDS[kind]
    if message.keys() != fields.keys():
        raise ValueError("other fields")
    for name, value in message.items():
        if isinstance(value, bool) and fields[name] is not object or not isinstance(value, fields[name]):
            raise ValueError(f"{name} is of another type")
    return message


def proof(secret: str) -> str:
    """What is sent instead of the secret itself."""
    return hashlib.sha256(b"llava_jax" + secret.encode(errors="surrogateescape")).hexdigest()


class Coordinator:
    """What is known about `count` processes. Messages are JSON lines, of the KINDS above."""

    def __init__(self, count: int, hosts: list[str], silence: float, service_port: int, close: Callable[[], None],
                 secret: str = ""):
        self.proof, self.strangers, self.said = proof(secret), {}, {}
        self.names = [f"process {i}" + (f" ({hosts[i]})" if hosts else "") for i in range(count)]
        self.silence, self.service_port, self.close = silence, service_port, close
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.heard: dict[int, float] = {}
        self.left: set[int] = set()
        self.rounds: dict[int, tuple[str, dict[int, Any]]] = {}
        self.stop: dict[int, int] | None = None
        self.verdict: tuple[int | None, str] | None = None
        self.over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its greeting to its end. What it sends can end the run, but never this process."""
        try:
            process = await self.greet(reader, writer)
            if process is not None:
                await self.listen_to(process, reader)
        finally:
            writer.close()

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
        """The process that a connection is from; None for a stranger, and for a process that is refused."""
        self.strangers[writer] = None
        if len(self.strangers) > STRANGERS:
            oldest = next(iter(self.strangers))
            del self.strangers[oldest]
            oldest.close()
        try:
            hello = await asyncio.wait_for(self.read_hello(reader), GREETING)
        except (ValueError, OSError, TimeoutError):
            return None
        finally:
            self.strangers.pop(writer, None)
        process, host, count = hello["process"], hello["host"], hello["count"]
        if refused := self.refusal(process, count, hello["secret"]):
            self.send(writer, kind="refused", line=f"{host}: {refused}")
            return None
        self.writers[process], self.heard[process] = writer, time.monotonic()
        self.names[process] = f"process {process} ({host})"
        if len(self.writers) == count:
            self.close()  # the port is free for a next run
        self.send(writer, kind="welcome", port=self.service_port)
        return process

    async def read_hello(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\n"):
            more = await reader.read(GREETING_BYTES)
            data += more
            if not more or len(data) > GREETING_BYTES:
                raise ValueError("no greeting")
        hello = parse(data, HELLO)
        if not re.fullmatch(r"[\w.-]{1,255}", hello["host"]) or hello["process"] < 0:
            raise ValueError("no greeting of ours")
        return hello

    def refusal(self, process: int, count: int, secret: str) -> str:
        """Why this process cannot be of the run; "" if it can."""
        if not hmac.compare_digest(secret.encode(errors="replace"), self.proof.encode()):
            return "LLAVA_JAX_SECRET is not the same here and in process 0"
        if count == len(self.names) and process < count and process not in self.writers:
            return ""
        wrong = f"there are {count} processes" if count != len(self.names) or process >= count else \
            f"it is {self.names[process]} too"
        return f"this process says that {wrong}, and process 0 knows {len(self.names)}, each with an id of its own"

    async def listen_to(self, process: int, reader: asyncio.StreamReader) -> None:
        """Takes in what a process says until it has nothing more to say."""
        handle = {"alive": self.on_alive, "round": self.on_round, "stop": self.on_stop, "here": self.on_here,
                  "failed": self.on_failed, "bye": self.on_bye}
        try:
            while line := await reader.readline():
                self.heard[process] = time.monotonic()
                message = parse(line)
                handle[message.pop("kind")](process, **message)
        except ValueError as error:
            self.end(None, f"{self.names[process]} sent what is no message of a run ({error})", FAULT)
        except OSError:
            pass
        del self.writers[process]
        if process not in self.left:
            self.lose(process, "has ended without a word: it was killed (for its memory?), or it crashed")
        if not self.writers:
            self.over.set()

    def on_alive(self, process: int) -> None:
        pass

    def on_round(self, process: int, number: int, name: str, value: Any, seconds: float) -> None:
        """What `process` says in a round; `seconds` after the first of them, all must have."""
        if number != self.said.get(process, -1) + 1:
            raise ValueError(f"round {number} is not its next")
        self.said[process] = number
        if number not in self.rounds:
            self.rounds[number] = name, {}
            asyncio.get_running_loop().call_later(seconds, self.late, number, seconds)
        first, values = self.rounds[number]
        values[process] = value
        if name != first:
            self.end(None, f"{self.names[process]} is at {name!r} and {self.names[min(values)]} at {first!r}: they do "
                           "not run the same program", MISTAKE)
        elif len(values) == len(self.names):
            del self.rounds[number]
            self.tell(kind="round", number=number, values=[values[i] for i in range(len(self.names))])

    def late(self, number: int, seconds: float) -> None:
        if number in self.rounds:
            name, values = self.rounds[number]
            missing = [self.names[i] for i in range(len(self.names)) if i not in values]
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            self.end(None, f"{name}: waited {seconds:.0f} s for {', '.join(missing[:8])}{more}", LOST)

    def on_stop(self, process: int, number: int) -> None:
        """A signal asked `process` to stop: all say at which step they are, and none goes on before all have."""
        if self.stop is None:
            self.stop = {}
            self.signal = number
            self.tell(kind="where")

    def on_here(self, process: int, step: int) -> None:
        if self.stop is None:
            raise ValueError("nobody asked for its step")
        self.stop[process] = step
        if self.stop.keys() >= self.writers.keys():
            self.tell(kind="stop", step=max(self.stop.values()) + 1, number=self.signal)

    def on_failed(self, process: int, line: str, code: int) -> None:
        if code not in (FAULT, MISTAKE, LOST, INTERRUPTED):
            raise ValueError(f"{code} is no exit code of a run")
        self.left.add(process)
        asyncio.get_running_loop().call_later(ECHO, self.end, process, line, code)

    def on_bye(self, process: int) -> None:
        self.left.add(process)

    def lose(self, process: int, why: str) -> None:
        self.end(process, f"{why}; the same command goes on from the last checkpoint", LOST)

    def end(self, process: int | None, line: str, code: int) -> None:
        """Ends the run for all, with this exit code; the first reason stands."""
        if self.verdict is None:
            name = "" if process is None else self.names[process] + ": "
            self.verdict = process, name + line
            self.tell(kind="end", process=process, line=self.verdict[1], code=code)
            self.close()
            asyncio.get_running_loop().call_later(10, self.over.set)

    async def watch(self) -> None:
        """Notices processes that are silent: their host, or the network to it, is gone."""
        while True:
            await asyncio.sleep(self.silence / 10)
            self.tell(kind="alive")
            for process in self.writers.keys() - self.left:
                if time.monotonic() - self.heard[process] > self.silence:
                    self.lose(process, f"has not been heard of for {self.silence:.0f} s: its host or the network to it "
                                       "is gone, or it hangs")

    def tell(self, **message: Any) -> None:
        for writer in self.writers.values():
            self.send(writer, **message)

    def send(self, writer: asyncio.StreamWriter, **message: Any) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(message).encode() + b"\n")


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket for connections to `host`: at the address of that name if it is one of this machine's, else everywhere.

    A name that means this machine to itself alone (127.0.1.1 in /etc/hosts) says nothing of how others reach it.
    """
    host = host.strip("[]")
    with contextlib.suppress(socket.gaierror):
        for *_, (address, *_) in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            if is_loopback(address) and not is_loopback(host):
                continue
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                return socket.create_server((address, port), family=family, backlog=backlog)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def start_service(host: str, count: int) -> tuple[Any, int]:
    """JAX's coordination service and its port. It judges no process dead: this one does, and says so in words."""
    from jaxlib import _jax

    with listen(host, 0, 1) as free:
        address, port = free.getsockname()[:2]
    day = 24 * 3600
    return _jax.get_distributed_runtime_service(
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}", count, heartbeat_timeout=day,
        cluster_register_timeout=day, shutdown_timeout=day), port


async def coordinate(host: str, port: int, count: int, hosts: list[str], silence: float) -> None:
    waiting = count + STRANGERS
    with contextlib.suppress(ValueError, OSError):
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    listener = listen(host, port, waiting)
    service, service_port = start_service(host, count)
    coordinator = Coordinator(count, hosts, silence, service_port, close=lambda: server.close(),
                              secret=os.environ.get("LLAVA_JAX_SECRET", ""))
    server = await asyncio.start_server(coordinator.serve, sock=listener, backlog=waiting, limit=MESSAGE_BYTES)
    print("ready", flush=True)
    watch = asyncio.create_task(coordinator.watch())  # noqa: F841 (a task that nothing holds may vanish)
    asyncio.get_running_loop().call_later(60, lambda: coordinator.writers or coordinator.over.set())
    await coordinator.over.wait()
    os._exit(0)  # nobody is left to whom the service could say goodbye


if __name__ == "__main__":
    # A signal is for the processes of the run; this one ends after them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # asyncio prints a traceback where a flood of strangers takes the last file descriptor, and then goes on.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        asyncio.run(coordinate(**json.loads(sys.argv[1])))
    except OSError as error:
        print(f"process 0 cannot listen there: {error}", flush=True)
