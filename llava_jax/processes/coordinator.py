"""The meeting point of a run's processes, in a process of its own that process 0 starts.

Every process keeps one connection to it. It collects what each says in a round and tells all; when one is asked to
stop, it agrees on when; and when one fails, is killed, or is not heard of, it tells the others which, and why.
It also holds JAX's own coordination service: this makes every other process abort with a C++ stack trace when it goes,
so it must outlive whichever process dies.

Runs as a script, without the package or JAX; its argument: those of `coordinate`, as JSON.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

ECHO = 1.0
"""Seconds that a reported error waits: if another process is found dead meanwhile, that is its cause and goes first."""

ERROR, LOST = 2, 75
"""Exit codes: a mistake, which is to be mended; and a process that is gone or late, where trying again may do."""


class Coordinator:
    """What is known about `count` processes. Messages are JSON lines; their kinds are the methods `on_...` here."""

    def __init__(self, count: int, hosts: list[str], silence: float, service_port: int, close: Callable[[], None]):
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
        """One process's connection, from its greeting to its end."""
        try:
            hello = json.loads(await reader.readline())
            process, host, count = int(hello["process"]), str(hello["host"]), int(hello["count"])
        except (ValueError, KeyError, TypeError, OSError):  # a stranger
            writer.close()
            return
        if count != len(self.names) or process in self.writers or process >= count:
            wrong = f"there are {count} processes" if count != len(self.names) else f"it is {self.names[process]} too"
            self.send(writer, kind="refused", line=f"{host}: this process says that {wrong}, and process 0 knows "
                                                   f"{len(self.names)}, each with an id of its own")
            writer.close()
            return
        self.writers[process], self.heard[process] = writer, time.monotonic()
        self.names[process] = f"process {process} ({host})"
        if len(self.writers) == count:
            self.close()  # the port is free for a next run
        self.send(writer, kind="welcome", port=self.service_port)
        try:
            while line := await reader.readline():
                self.heard[process] = time.monotonic()
                message = json.loads(line)
                getattr(self, f"on_{message.pop('kind')}")(process, **message)
        except OSError:
            pass
        writer.close()
        del self.writers[process]
        if process not in self.left:
            self.lose(process, "has ended without a word: it was killed (for its memory?), or it crashed")
        if not self.writers:
            self.over.set()

    def on_alive(self, process: int) -> None:
        pass

    def on_round(self, process: int, number: int, name: str, value: Any, seconds: float | None) -> None:
        """What `process` says in a round; `seconds` after the first of them, all must have."""
        if number not in self.rounds:
            self.rounds[number] = name, {}
            if seconds is not None:
                asyncio.get_running_loop().call_later(seconds, self.late, number, seconds)
        first, values = self.rounds[number]
        values[process] = value
        if name != first:
            self.end(None, f"{self.names[process]} is at {name!r} and {self.names[min(values)]} at {first!r}: they do "
                           "not run the same program", ERROR)
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
        self.stop[process] = step
        if self.stop.keys() >= self.writers.keys():
            self.tell(kind="stop", step=max(self.stop.values()) + 1, number=self.signal)

    def on_failed(self, process: int, line: str) -> None:
        self.left.add(process)
        asyncio.get_running_loop().call_later(ECHO, self.end, process, line, ERROR)

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


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket for connections to `host` if that is this machine alone, else from everywhere."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, port), backlog=backlog)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def start_service(host: str, count: int) -> tuple[Any, int]:
    """JAX's coordination service and its port. It judges no process dead: this one does, and says so in words."""
    from jaxlib import _jax

    with listen(host, 0, 1) as free:
        port = free.getsockname()[1]
    address = f"{host}:{port}" if host in ("localhost", "127.0.0.1") else f"[::]:{port}"
    day = 24 * 3600
    return _jax.get_distributed_runtime_service(
        address, count, heartbeat_timeout=day, cluster_register_timeout=day, shutdown_timeout=day), port


async def coordinate(host: str, port: int, count: int, hosts: list[str], silence: float) -> None:
    listener = listen(host, port, count + 16)
    service, service_port = start_service(host, count)
    coordinator = Coordinator(count, hosts, silence, service_port, close=lambda: server.close())
    server = await asyncio.start_server(coordinator.serve, sock=listener, limit=2**24)
    print("ready", flush=True)
    watch = asyncio.create_task(coordinator.watch())  # noqa: F841 (a task that nothing holds may vanish)
    asyncio.get_running_loop().call_later(60, lambda: coordinator.writers or coordinator.over.set())
    await coordinator.over.wait()
    os._exit(0)  # nobody is left to whom the service could say goodbye


if __name__ == "__main__":
    # A signal is for the processes of the run; this one ends after them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(coordinate(**json.loads(sys.argv[1])))
    except OSError as error:
        print(f"process 0 cannot listen there: {error}", flush=True)
