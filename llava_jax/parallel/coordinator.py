"""Connects the processes of a run. Process 0 starts this script, which outlives process 0 and so can report its death.

Every process keeps one connection and sends JSON lines. The coordinator collects the values of a collective call and
sends them to all processes. It chooses the step of a stop. It names the process that failed, died or stopped sending.

A connection that speaks HTTP/2 is JAX's and is forwarded to JAX's service in process 0. The forwarded connection stays
open when process 0 dies, because JAX would abort the other processes with a C++ stack trace before they print its name.

The coordinator ignores connections without a correct greeting, and forwards JAX's only for hosts of the run. It runs
without this package and without JAX. Its argument is a JSON object with the arguments of `coordinate`.
"""

import asyncio
import contextlib
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
from typing import Any

FAULT, MISTAKE, LOST, INTERRUPTED = 1, 2, 75, 130
"""Exit codes: any error; a UserError; a process that is gone, late or was stopped; Ctrl-C."""

ERROR_DELAY = 1.0
"""Seconds before a reported error is sent on. A process found dead meanwhile is its cause and is named instead."""

GREETING_SECONDS, GREETING_BYTES = 10.0, 2**12
"""Limits of a new connection's first message."""

MESSAGE_BYTES = 2**24
"""Maximum size of a message."""

MAX_STRANGERS, CROWDED_SECONDS = 64, 1.0
"""Number of connections without a greeting beyond which the oldest are closed, but none that is younger than this."""

HTTP2 = b"PRI * HTTP/2"
"""First bytes of JAX's own connections."""

FIELDS = {
    "hello": {"process": [int], "count": [int], "host": [str], "secret": [str]},
    "alive": {},
    "round": {"name": [str], "value": [], "seconds": [int, float]},
    "stop": {"signal": [int]},
    "here": {"step": [int]},
    "failed": {"line": [str], "code": [int]},
    "bye": {},
}
"""Types of each field, by the kind of message; an empty list allows any JSON value."""


def parse(line: bytes) -> dict[str, Any]:
    """Reads a message. Raises ValueError unless it has a known kind and exactly its fields."""
    try:
        message = json.loads(line)
        fields = FIELDS[message["kind"]]
        if message.keys() - {"kind"} == fields.keys() and all(
                not kinds or type(message[name]) in kinds for name, kinds in fields.items()):
            return message
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{line[:80]!r}")


def proof(secret: str) -> str:
    """Returns the hash that is sent instead of the secret."""
    return hashlib.sha256(b"llava_jax" + secret.encode(errors="surrogateescape")).hexdigest()


class Coordinator:
    """State of a run of `count` processes.

    Attributes:
      names: process and host, for messages.
      strangers: start time of each connection without a greeting, the oldest first.
      writers: connection of each process that has greeted and not ended.
      heard: time of the last message of each process.
      left: processes that ended properly or reported an error.
      rounds: name and values by process of each unfinished collective call, by its number.
      steps: step of each process, after a process asked for a stop.
      verdict: process and message of the error that ends the run.
      over: set when the coordinator may end.
    """

    def __init__(self, count: int, hosts: list[str], heartbeat_timeout: float, jax_port: int, secret: str = ""):
        self.heartbeat_timeout, self.jax_port, self.proof = heartbeat_timeout, jax_port, proof(secret)
        self.names = [f"process {i}" + (f" ({hosts[i]})" if hosts else "") for i in range(count)]
        self.strangers: dict[asyncio.StreamWriter, float] = {}
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.addresses: set[str] = set()
        self.heard: dict[int, float] = {}
        self.left: set[int] = set()
        self.rounds: dict[int, tuple[str, dict[int, Any]]] = {}
        self.round_counts = [0] * count
        self.steps: dict[int, int] | None = None
        self.verdict: tuple[int | None, str] | None = None
        self.over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection. What it sends can end the run, but never this process."""
        try:
            data = await self.read_greeting(reader, writer)
            address = writer.get_extra_info("peername")[0]
            if data.startswith(HTTP2) and address in self.addresses:
                await self.forward(reader, writer, data)
            elif (process := self.admit(data, writer)) is not None:
                self.addresses.add(address)
                await self.listen_to(process, reader)
        except (ValueError, OSError, TimeoutError):
            pass
        finally:
            writer.close()

    async def read_greeting(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Reads the first line, or the first bytes of HTTP/2."""
        now = self.strangers[writer] = time.monotonic()
        while len(self.strangers) > MAX_STRANGERS:
            oldest, start = next(iter(self.strangers.items()))
            if now - start < CROWDED_SECONDS:  # its greeting may have arrived without having been read yet
                break
            del self.strangers[oldest]
            oldest.close()
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                data = b""
                while not data.endswith(b"\n") and not (data.startswith(HTTP2)):
                    more = await reader.read(GREETING_BYTES)
                    data += more
                    if not more or len(data) > GREETING_BYTES:
                        raise ValueError("no greeting")
                if writer.is_closing():  # it was closed for its age, so what it sent counts no longer
                    raise ValueError("too late")
                return data
        finally:
            self.strangers.pop(writer, None)

    def admit(self, data: bytes, writer: asyncio.StreamWriter) -> int | None:
        """Returns the process that greets; None after telling a process of another run why it is refused."""
        hello = parse(data)
        process, count, host = hello["process"], hello["count"], hello["host"]
        if hello["kind"] != "hello" or not re.fullmatch(r"[\w.-]{1,255}", host) or process < 0:
            raise ValueError("no greeting of a run")
        refusal = ""
        if not hmac.compare_digest(hello["secret"].encode(errors="replace"), self.proof.encode()):
            refusal = "LLAVA_JAX_SECRET is not the same here and in process 0"
        elif count != len(self.names) or process >= count or process in self.writers:
            twice = process in self.writers and count == len(self.names)
            wrong = f"it is {self.names[process]} too" if twice else f"there are {count} processes"
            refusal = (f"this process says that {wrong}, and process 0 knows {len(self.names)}, each with an id of its "
                       "own")
        if refusal:
            self.send(writer, kind="refused", line=f"{host}: {refusal}")
            return None
        self.writers[process], self.heard[process] = writer, time.monotonic()
        self.names[process] = f"process {process} ({host})"
        self.send(writer, kind="welcome")
        return process

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Connects a process to JAX's service. The process's side stays open if the service ends."""
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while piece := await source.read(2**16):
                    sink.write(piece)
                    await sink.drain()

        while True:  # process 0 starts the service at about the same time
            with contextlib.suppress(OSError):
                service, to_service = await asyncio.open_connection("127.0.0.1", self.jax_port)
                break
            await asyncio.sleep(0.05)
        to_service.write(data)
        answers = asyncio.create_task(copy(service, writer))
        await copy(reader, to_service)
        to_service.close()
        await answers

    async def listen_to(self, process: int, reader: asyncio.StreamReader) -> None:
        """Handles the messages of a process until its connection ends."""
        handlers = {"alive": lambda process: None, "round": self.on_round, "stop": self.on_stop, "here": self.on_here,
                    "failed": self.on_failed, "bye": self.left.add}
        try:
            while line := await reader.readline():
                self.heard[process] = time.monotonic()
                message = parse(line)
                kind = message.pop("kind")
                if kind == "hello":
                    raise ValueError("a second greeting")
                handlers[kind](process, **message)
        except ValueError as error:
            self.end(None, f"{self.names[process]} sent an invalid message ({error})", FAULT)
        except OSError:
            pass
        del self.writers[process]
        if process not in self.left:
            self.lose(process, "has ended without a word: it was killed (for its memory?), or it crashed")
        if not self.writers:
            self.over.set()

    def on_round(self, process: int, name: str, value: Any, seconds: float) -> None:
        """Collects a value. All processes must send theirs within `seconds` of the first."""
        number = self.round_counts[process]
        self.round_counts[process] += 1
        if number not in self.rounds:
            self.rounds[number] = name, {}
            asyncio.get_running_loop().call_later(seconds, self.on_timeout, number, seconds)
        first, values = self.rounds[number]
        values[process] = value
        if name != first:
            self.end(None, f"{self.names[process]} is at {name!r} and {self.names[min(values)]} at {first!r}: they do "
                           "not run the same program", MISTAKE)
        elif len(values) == len(self.names):
            del self.rounds[number]
            self.send_all(kind="round", values=[values[i] for i in range(len(self.names))])

    def on_timeout(self, number: int, seconds: float) -> None:
        if number in self.rounds:
            name, values = self.rounds[number]
            missing = [self.names[i] for i in range(len(self.names)) if i not in values]
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            self.end(None, f"{name}: waited {seconds:.0f} s for {', '.join(missing[:8])}{more}", LOST)

    def on_stop(self, process: int, signal: int) -> None:
        """A process got a signal: asks all for their step. None starts another step until the last one is agreed."""
        if self.steps is None:
            self.steps, self.signal = {}, signal
            self.send_all(kind="where")

    def on_here(self, process: int, step: int) -> None:
        if self.steps is None:
            raise ValueError("a step that was not asked for")
        self.steps[process] = step
        if self.steps.keys() >= self.writers.keys():
            self.send_all(kind="stop", step=max(self.steps.values()) + 1, signal=self.signal)

    def on_failed(self, process: int, line: str, code: int) -> None:
        if code not in (FAULT, MISTAKE, LOST, INTERRUPTED):
            raise ValueError(f"exit code {code}")
        self.left.add(process)
        asyncio.get_running_loop().call_later(ERROR_DELAY, self.end, process, line, code)

    def lose(self, process: int, why: str) -> None:
        self.end(process, f"{why}; the same command goes on from the last checkpoint", LOST)

    def end(self, process: int | None, line: str, code: int) -> None:
        """Ends the run of all processes with this exit code. Only the first call counts."""
        if self.verdict is None:
            name = "" if process is None else self.names[process] + ": "
            self.verdict = process, name + line
            self.send_all(kind="end", process=process, line=self.verdict[1], code=code)
            asyncio.get_running_loop().call_later(10, self.over.set)

    async def watch(self) -> None:
        """Ends the run if a process is silent."""
        while True:
            await asyncio.sleep(self.heartbeat_timeout / 10)
            self.send_all(kind="alive")
            for process in self.writers.keys() - self.left:
                if time.monotonic() - self.heard[process] > self.heartbeat_timeout:
                    self.lose(process, f"has not been heard of for {self.heartbeat_timeout:.0f} s: its host or the "
                                       "network to it is gone, or it hangs")

    def send_all(self, **message: Any) -> None:
        for writer in self.writers.values():
            self.send(writer, **message)

    def send(self, writer: asyncio.StreamWriter, **message: Any) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(message).encode() + b"\n")


def is_loopback(address: str) -> bool:
    """Returns whether an IP address or name is this machine's loopback."""
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Opens a server socket at the address of `host` if it belongs to this machine, else at all addresses.

    A name that /etc/hosts maps to a loopback address may mean another address elsewhere, so it is not used.
    """
    host = host.strip("[]")
    with contextlib.suppress(socket.gaierror):
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not is_loopback(address[0]) or is_loopback(host):
                with contextlib.suppress(OSError):  # what is wrong with the port shows below
                    return socket.create_server(address, family=family, backlog=backlog)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


async def coordinate(host: str, port: int, count: int, **settings: Any) -> None:
    """Serves the processes of a run until their last connection ends."""
    with contextlib.suppress(ValueError, OSError):
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    backlog = count + MAX_STRANGERS
    coordinator = Coordinator(count, secret=os.environ.get("LLAVA_JAX_SECRET", ""), **settings)
    listener = listen(host, port, backlog)
    await asyncio.start_server(coordinator.serve, sock=listener, backlog=backlog, limit=MESSAGE_BYTES)
    print("ready", flush=True)
    watch = asyncio.create_task(coordinator.watch())  # noqa: F841 (asyncio keeps only weak references to tasks)
    asyncio.get_running_loop().call_later(60, lambda: coordinator.writers or coordinator.over.set())
    await coordinator.over.wait()
    os._exit(0)  # connections that are still forwarded would keep asyncio waiting


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # it outlives the processes
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # no tracebacks if strangers use up all file descriptors
    try:
        asyncio.run(coordinate(**json.loads(sys.argv[1])))
    except OSError as error:
        print(f"process 0 cannot listen there: {error}", flush=True)
