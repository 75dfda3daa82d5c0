"""Communicates between the processes of a run: start, collective values, a common stop, an end of all on an error.

A single process needs none of this, so every function returns at once. Nothing here uses the devices.
"""

import atexit
import contextlib
import hashlib
import json
import math
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from llava_jax.cli import printable
from llava_jax.errors import UserError
from llava_jax.parallel.cluster import ClusterInfo, detect_cluster
from llava_jax.parallel.coordinator import FAULT, INTERRUPTED, LOST, MISTAKE, proof

CONNECT_TIMEOUT = 300.0
"""Seconds within which all processes must be started."""

BARRIER_TIMEOUT = 600.0
"""Seconds that processes wait for the last of them after equal work."""

LOAD_TIMEOUT = 1800.0
"""Seconds that processes wait for the last of them to read a model's files."""

WORK_TIMEOUT = 24 * 3600.0
"""Seconds that processes wait for unequal work, such as prepared data or answered questions."""

HEARTBEAT_TIMEOUT = 60.0
"""Seconds without a message after which a process counts as lost."""

MAX_WELCOME = 2**12
"""Maximum length in characters of the coordinator's answer to a greeting."""

MAX_ERROR = 2000
"""Maximum length in characters of an error that other processes print. The failed process prints all of it."""


class CollectiveError(UserError):
    """Raised with the same message on every process; no further coordination is needed."""


class ProcessGroup:
    """Connection of this process to the coordinator. Two threads of it read messages and send heartbeats."""

    def __init__(self, cluster: ClusterInfo, connection: socket.socket, lines: TextIO):
        self.cluster, self.socket, self.lines = cluster, connection, lines
        self.values: queue.SimpleQueue[list] = queue.SimpleQueue()
        self.steps, self.asked, self.paused = 0, False, False
        self.stop_step, self.stop_signal = None, 0
        self.verdict, self.code = None, 0
        self.changed = threading.Condition()
        self.sending = threading.Lock()
        self.heard = time.monotonic()

    def start_threads(self) -> None:
        for work in (self._read, self._send_heartbeats):
            threading.Thread(target=work, daemon=True).start()

    def send(self, **message: Any) -> None:
        """Sends a message. The reading thread notices a broken connection."""
        with self.sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def gather(self, name: str, value: Any, seconds: float) -> list:
        """Returns the value of every process; see `allgather_object`."""
        self.send(kind="round", name=name, value=value, seconds=seconds)
        return self.values.get()

    def should_stop(self, signal: int) -> int:
        """Counts a step, waits while the last step is being agreed, and returns the signal of a stop after it, or 0."""
        with self.changed:
            self.steps += 1
            if signal and not self.asked:
                self.asked = True
                self.send(kind="stop", signal=signal)
            self.changed.wait_for(lambda: not self.paused)
            return self.stop_signal if self.stop_step is not None and self.steps >= self.stop_step else 0

    def abort(self, line: str, code: int) -> None:
        """Ends the run on all processes. Returns if this process has an error of its own to show, else exits."""
        with self.changed:
            self.code = code
            self.send(kind="failed", line=line, code=code)
            self.changed.wait_for(lambda: self.verdict is not None, timeout=10)
        timer = threading.Timer(10, os._exit, (code,))  # a thread may wait for processes that are gone
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """Waits at Python's exit until all processes arrive. After an error no process does."""
        if self.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)
        self.gather("the end of the program", None, WORK_TIMEOUT)
        self.send(kind="bye")

    def receive(self, message: dict[str, Any]) -> None:
        """Handles a message of the coordinator."""
        with self.changed:
            match message:
                case {"kind": "round", "values": values}:
                    self.values.put(values)
                case {"kind": "where"}:
                    self.paused = True  # no further step until the last one is agreed
                    self.send(kind="here", step=self.steps)
                case {"kind": "stop", "step": step, "signal": signal}:
                    self.paused, self.stop_step, self.stop_signal = False, step, signal
                case {"kind": "end", "process": process, "line": line, "code": code}:
                    self._end(process, line, code)
            self.changed.notify_all()

    def _end(self, process: int | None, line: str, code: int) -> None:
        self.verdict = line
        if process == self.cluster.process_id:
            return
        if not self.code or code == LOST:  # an error after a loss is its effect
            _exit(line, code)
        self.code = code  # this process failed too: it shows its own error and exits with the common code
        print(f"error: {printable(line)}", file=sys.stderr, flush=True)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self.lines:
                self.heard = time.monotonic()
                self.receive(json.loads(line))
        self._abandon("has ended: it was killed, or its host is gone")

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(HEARTBEAT_TIMEOUT / 10)
            self.send(kind="alive")
            if time.monotonic() - self.heard > HEARTBEAT_TIMEOUT:
                self._abandon(f"has not been heard of for {HEARTBEAT_TIMEOUT:.0f} s")

    def _abandon(self, why: str) -> None:
        if self.verdict is None:
            _exit(f"the coordinator on the host of process 0 ({self.cluster.coordinator_address}) {why}; "
                  "the same command goes on from the last checkpoint", LOST)


_group: ProcessGroup | None = None


def initialize() -> None:
    """Connects the processes of a run, if there are several, and initializes JAX across them.

    Call it before JAX uses a device; a second call does nothing. Raises UserError or OSError if the processes do not
    connect. Afterwards an error of one process ends all, and each other process prints one line that names it.
    All exit with 2 for a UserError, 130 for Ctrl-C, 75 for a process that was stopped, killed, lost or late, else 1.
    """
    global _group
    cluster = None if _group else detect_cluster()
    if cluster is None:
        return
    host, _, port = cluster.coordinator_address.rpartition(":")
    jax_port = 0
    if cluster.process_id == 0:
        jax_port = _start_coordinator(cluster, host, int(port))
    try:
        _group = ProcessGroup(cluster, *_connect(cluster, host.strip("[]"), int(port)))
    except TimeoutError as error:
        _exit(str(error), LOST)
    _group.start_threads()
    atexit.register(_group.leave)
    sys.excepthook = _abort_then(sys.excepthook)
    _group.gather("start", None, CONNECT_TIMEOUT)
    _initialize_jax(cluster, _group.socket.getpeername()[0], int(port), jax_port)


def _initialize_jax(cluster: ClusterInfo, address: str, port: int, jax_port: int) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would replace Python's handler of SIGTERM
    day = 24 * 3600  # the coordinator detects and names a lost process
    jax.distributed.initialize(
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}", cluster.num_processes, cluster.process_id,
        cluster_detection_method="deactivate", initialization_timeout=math.ceil(CONNECT_TIMEOUT),
        heartbeat_timeout_seconds=day, shutdown_timeout_seconds=day,
        coordinator_bind_address=f"127.0.0.1:{jax_port}")


def allgather_object(name: str, value: Any, seconds: float = BARRIER_TIMEOUT) -> list:
    """Returns the `value` of every process, by its index. All processes must call it equally often, in the same order.

    `value` is anything that JSON can represent. If a process has not called it `seconds` after the first one did, the
    run ends with a line that names it.
    """
    return [value] if _group is None else _group.gather(name, value, seconds)


def allreduce_sum(name: str, values: Sequence[float]) -> list[float]:
    """Returns the sum of each number over all processes."""
    return [sum(column) for column in zip(*allgather_object(name, list(values)), strict=True)]


def assert_equal_across_processes(name: str, value: dict[str, Any]) -> None:
    """Raises CollectiveError that names the first process whose entries differ from process 0's, and the entries."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    if len(set(allgather_object(name, digest))) == 1:
        return
    all_values = allgather_object(name, [socket.gethostname(), value])
    first = all_values[0][1]
    for index, (host, theirs) in enumerate(all_values):
        if differ := [key for key in first | theirs if theirs.get(key) != first.get(key)]:
            parts = ", ".join(f"{key} ({theirs.get(key)}, not {first.get(key)})" for key in differ[:4])
            raise CollectiveError(f"{name}: process {index} ({host}) differs from process 0 in {parts}")


def should_stop(signal: int) -> int:
    """Returns the signal by which all processes stop after this step, or 0.

    `signal` is one that this process received, or 0. All processes call it once in every step. It sends no message
    until a process got a signal. Then all stop after the same step: the next one that no process has started.
    """
    return signal if _group is None else _group.should_stop(signal)


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Ends all processes if the block raises an error. Other processes print a line that names this one."""
    try:
        yield
    except BaseException as error:
        abort_all(error)
        raise


def abort_all(error: BaseException) -> None:
    """Ends all processes because of an error of this one, which then raises it as usual."""
    if _group is None or _group.code or isinstance(error, CollectiveError):
        return
    if isinstance(error, SystemExit):
        if not error.code:
            return
        code = error.code if error.code in (MISTAKE, LOST, INTERRUPTED) else FAULT
        line = "was stopped" if code == LOST else f"has ended with exit code {error.code}"
    elif isinstance(error, KeyboardInterrupt):
        line, code = "was interrupted", INTERRUPTED
    elif isinstance(error, UserError):
        line, code = str(error), MISTAKE
    else:
        line, code = f"{type(error).__name__}: {error}"[:MAX_ERROR], FAULT
    _group.abort(" ".join(line.split()), code)


def _abort_then(hook: Callable) -> Callable:
    def excepthook(kind, error, traceback):
        abort_all(error)
        hook(kind, error, traceback)
    return excepthook


def _exit(line: str, code: int) -> None:
    """Ends this process at once, because its main thread may wait in C++ for a process that is gone."""
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _start_coordinator(cluster: ClusterInfo, host: str, port: int) -> int:
    """Starts the coordinator. Returns the port that it expects JAX's service at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        jax_port = free.getsockname()[1]
    settings = {"host": host, "port": port, "count": cluster.num_processes, "hosts": cluster.hosts,
                "heartbeat_timeout": HEARTBEAT_TIMEOUT, "jax_port": jax_port}
    # -P keeps this folder off the path. A new session receives no signals of a terminal.
    script = Path(__file__).with_name("coordinator.py")
    process = subprocess.Popen([sys.executable, "-P", str(script), json.dumps(settings)], stdout=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    readable = select.select([process.stdout], [], [], CONNECT_TIMEOUT)[0]
    answer = process.stdout.readline().strip() if readable else ""
    if answer != "ready":
        raise OSError(f"{cluster.coordinator_address}: {answer or 'the coordinator did not start'}")
    return jax_port


def _connect(cluster: ClusterInfo, host: str, port: int) -> tuple[socket.socket, TextIO]:
    """Waits for the coordinator and connects. Raises TimeoutError if there is none, UserError if it refuses."""
    name = re.sub(r"[^\w.-]", "_", socket.gethostname())[:255] or "unknown"
    hello = json.dumps({"kind": "hello", "process": cluster.process_id, "count": cluster.num_processes, "host": name,
                        "secret": proof(os.environ.get("LLAVA_JAX_SECRET", ""))})
    until = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(hello.encode() + b"\n")
            lines = connection.makefile("r", encoding="utf-8")
            welcome = json.loads(lines.readline(MAX_WELCOME) or "null")
            match welcome:
                case {"kind": "refused", "line": str(line)}:
                    raise UserError(line)
                case {"kind": "welcome"}:
                    connection.settimeout(None)
                    return connection, lines
            problem = "connection closed" if welcome is None else "another program answers there"
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            problem = error
        if time.monotonic() > until:
            raise TimeoutError(f"process 0 at {cluster.coordinator_address} has not answered for {CONNECT_TIMEOUT:.0f} "
                               f"s ({problem}): is it running, and may this host connect to it?")
        time.sleep(0.5)
