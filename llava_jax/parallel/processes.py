"""What the processes of a run do together: meet, tell each other values, stop at one step, and end when one fails.

All of it does nothing, or the obvious, where one process is alone. Nothing here uses the devices.
"""

import atexit
import contextlib
import hashlib
import json
import os
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
"""Seconds in which all processes must have been started."""

BARRIER_TIMEOUT = 600.0
"""Seconds that processes wait for the last of them, where they have done the same work."""

LOAD_TIMEOUT = 1800.0
"""Seconds that processes wait for the last of them to have read a model's files."""

WORK_TIMEOUT = 24 * 3600.0
"""Seconds that processes wait where one alone has work, or each as much as it got: data made, questions answered."""

ANSWER = 2**12
"""Characters of the coordinator's answer to a greeting at most."""

HEARTBEAT_TIMEOUT = 60.0
"""Seconds after which a process that is not heard of counts as lost."""


LINE = 2000
"""Characters of an error that the other processes print; the process that failed prints all of it."""


class CollectiveError(UserError):
    """An error that all processes raise alike, so that none has to tell the others."""


class Group:
    """This process's connection to the others, through the coordinator."""

    def __init__(self, place: ClusterInfo):
        self.place, self.calls, self.rounds = place, 0, 0
        self.asked, self.paused, self.stop_at, self.signal = False, False, None, 0
        self.verdict, self.code = None, 0
        self.values: dict[int, list] = {}
        self.changed = threading.Condition()
        self.sending = threading.Lock()
        if place.process_id == 0:
            _start_coordinator(place)
        self.socket, self.lines, self.service_port = _meet(place)
        self.heard = time.monotonic()
        for work in (self._read, self._show_life):
            threading.Thread(target=work, daemon=True).start()

    def send(self, **message: Any) -> None:
        """One message; that the connection is gone, the reading thread will notice."""
        with self.sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def gather(self, name: str, value: Any, seconds: float) -> list:
        """The values of all processes, by their index."""
        with self.changed:
            number, self.rounds = self.rounds, self.rounds + 1
            self.send(kind="round", number=number, name=name, value=value, seconds=seconds)
            self.changed.wait_for(lambda: number in self.values)
            return self.values.pop(number)

    def should_stop(self, asked: int) -> int:
        """One call in every step: the signal by which all stop after this step, or 0."""
        with self.changed:
            self.calls += 1
            if asked and not self.asked:
                self.asked = True
                self.send(kind="stop", number=asked)
            self.changed.wait_for(lambda: not self.paused)
            return self.signal if self.stop_at is not None and self.calls >= self.stop_at else 0

    def fail(self, line: str, code: int) -> None:
        """Ends the run for all processes; returns if this one has an error of its own to show, else does not."""
        with self.changed:
            self.code = code
            self.send(kind="failed", line=line, code=code)
            self.changed.wait_for(lambda: self.verdict is not None, timeout=10)
        late = threading.Timer(10, os._exit, (code,))  # should a thread wait for the others, which are gone
        late.daemon = True
        late.start()

    def leave(self) -> None:
        """At the exit of Python: waits until all are here, and lets it go on. After a failure nobody comes."""
        if self.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)
        self.gather("the end of the program", None, seconds=WORK_TIMEOUT)
        self.send(kind="bye")

    def _read(self) -> None:
        handle = {"alive": self._on_alive, "round": self._on_round, "where": self._on_where, "stop": self._on_stop,
                  "end": self._on_end}
        with contextlib.suppress(OSError, ValueError):
            for line in self.lines:
                self.heard = time.monotonic()
                message = json.loads(line)
                with self.changed:
                    handle[message.pop("kind")](**message)
                    self.changed.notify_all()
        self._abandon("has ended: it was killed, or its host is gone")

    def _on_alive(self) -> None:
        pass

    def _on_round(self, number: int, values: list) -> None:
        self.values[number] = values

    def _on_where(self) -> None:
        self.paused = True  # until it is agreed where to stop, no further step
        self.send(kind="here", step=self.calls)

    def _on_stop(self, step: int, number: int) -> None:
        self.paused, self.stop_at, self.signal = False, step, number

    def _on_end(self, process: int | None, line: str, code: int) -> None:
        self.verdict = line
        if process == self.place.process_id:
            return
        if not self.code or code == LOST:  # an error after a loss comes from it
            _exit(line, code)
        self.code = code  # this process failed too: it shows its own error, and ends as all do
        print(f"error: {printable(line)}", file=sys.stderr, flush=True)

    def _show_life(self) -> None:
        while True:
            time.sleep(HEARTBEAT_TIMEOUT / 10)
            self.send(kind="alive")
            if time.monotonic() - self.heard > HEARTBEAT_TIMEOUT:
                self._abandon(f"has not been heard of for {HEARTBEAT_TIMEOUT:.0f} s")

    def _abandon(self, why: str) -> None:
        if self.verdict is None:
            _exit(f"the coordinator on the host of process 0 ({self.place.coordinator_address}) {why}; "
                  "the same command goes on from the last checkpoint", LOST)


_group: Group | None = None


def initialize() -> None:
    """Joins the processes of a run, if there are several. Call it before anything else of JAX.

    Which process this is, `cluster.detect_cluster` tells; UserError or OSError with one line if they do not meet.
    """
    if place := detect_cluster():
        join(place)


def join(place: ClusterInfo) -> None:
    """Meets the other processes and makes JAX one program of them; before anything else of JAX. Once is enough.

    Raises UserError or OSError if that fails. From then on a process that fails ends all of them. The others print one
    line that names it, and all exit with one code: 2 for a UserError, 130 for Ctrl-C, 1 for every other error; 75 if it
    was stopped, killed, lost, late or never started, so that the same command may do.
    `abort_all_on_error` reports an error.
    """
    global _group
    if _group is not None:
        return
    try:
        _group = Group(place)
    except TimeoutError as error:
        _exit(str(error), LOST)
    atexit.register(_group.leave)
    sys.excepthook = _report_then(sys.excepthook)
    _group.gather("start", None, CONNECT_TIMEOUT)
    host = place.coordinator_address.rpartition(":")[0]
    try:  # JAX would abort
        socket.create_connection((host.strip("[]"), _group.service_port), timeout=30).close()
    except OSError as error:
        raise OSError(f"{host}:{_group.service_port}: cannot be reached ({error}); between the hosts all ports "
                      "must be open") from None
    # jax.distributed.initialize would start the service in process 0, with whose death all others abort.
    from jax._src import distributed
    from jax._src.lib import _jax

    state, day = distributed.global_state, 24 * 3600
    state.coordinator_address = f"{host}:{_group.service_port}"
    state.process_id, state.num_processes = place.process_id, place.num_processes
    state.client = _jax.get_distributed_runtime_client(
        state.coordinator_address, place.process_id, init_timeout=int(CONNECT_TIMEOUT), heartbeat_timeout=day,
        shutdown_timeout=day, use_compression=True)
    state.client.connect()


def allgather_object(name: str, value: Any, seconds: float = BARRIER_TIMEOUT) -> list:
    """Every process's `value` (anything JSON can hold), by its index; all must call it in the same order.

    The run ends with a line that names who is missing `seconds` after the first was there.
    """
    return [value] if _group is None else _group.gather(name, value, seconds)


def allreduce_sum(name: str, value: Sequence[float]) -> list[float]:
    """The sum of each number over all processes."""
    return [sum(column) for column in zip(*allgather_object(name, list(value)), strict=True)]


def assert_equal_across_processes(what: str, value: dict[str, Any]) -> None:
    """CollectiveError, naming the first process that has other entries than process 0, and the entries."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    if len(set(allgather_object(what, digest))) == 1:
        return
    all_values = allgather_object(what, [socket.gethostname(), value])
    first = all_values[0][1]
    for index, (host, theirs) in enumerate(all_values):
        if differ := [key for key in first | theirs if theirs.get(key) != first.get(key)]:
            parts = ", ".join(f"{key} ({theirs.get(key)}, not {first.get(key)})" for key in differ[:4])
            raise CollectiveError(f"{what}: process {index} ({host}) differs from process 0 in {parts}")


def should_stop(asked: int) -> int:
    """The signal by which all processes stop after this step, or 0; `asked` is one that this process got, or 0.

    To be called by all, once in every step. It costs no message until one process is asked to stop; then all stop after
    the same step, the next that none has begun.
    """
    return asked if _group is None else _group.should_stop(asked)


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """An error in the block ends all processes, with a line that names this one."""
    try:
        yield
    except BaseException as error:
        report(error)
        raise


def report(error: BaseException) -> None:
    """Ends all processes for an error of this one; here it then takes its usual way."""
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
        line, code = f"{type(error).__name__}: {error}"[:LINE], FAULT
    _group.fail(" ".join(line.split()), code)


def _report_then(hook: Callable) -> Callable:
    def excepthook(kind, error, traceback):
        report(error)
        hook(kind, error, traceback)
    return excepthook


def _exit(line: str, code: int) -> None:
    """Ends this process now: its main thread may wait, in C++, for a process that is no more."""
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _start_coordinator(place: ClusterInfo) -> None:
    script = Path(__file__).with_name("coordinator.py")
    host, _, port = place.coordinator_address.rpartition(":")
    settings = {"host": host, "port": int(port), "count": place.num_processes, "hosts": place.hosts,
                "silence": HEARTBEAT_TIMEOUT}
    # -P: this folder's modules are not for import by their bare names. A session of its own: no terminal's signals.
    process = subprocess.Popen([sys.executable, "-P", str(script), json.dumps(settings)], stdout=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    there = select.select([process.stdout], [], [], CONNECT_TIMEOUT)[0]
    answer = process.stdout.readline().strip() if there else ""
    if answer != "ready":
        raise OSError(f"{place.coordinator_address}: {answer or 'the coordinator did not start'}")


def _meet(place: ClusterInfo) -> tuple[socket.socket, TextIO, int]:
    """A connection to the coordinator, its lines, and the port of JAX's service; waits until it is there."""
    host, _, port = place.coordinator_address.rpartition(":")
    secret = proof(os.environ.get("LLAVA_JAX_SECRET", ""))
    name = re.sub(r"[^\w.-]", "_", socket.gethostname())[:255] or "unknown"
    hello = json.dumps({"process": place.process_id, "count": place.num_processes, "host": name, "secret": secret})
    hello += "\n"
    until = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(hello.encode())
            lines = connection.makefile("r", encoding="utf-8")
            welcome = json.loads(lines.readline(ANSWER) or "null")
            match welcome:
                case {"kind": "refused", "line": str(line)}:
                    raise UserError(line)
                case {"kind": "welcome", "port": int(port_of_service)}:
                    connection.settimeout(None)
                    return connection, lines, port_of_service
            problem = "connection closed" if welcome is None else "another program answers there"
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            problem = error
        if time.monotonic() > until:
            raise TimeoutError(f"process 0 at {place.coordinator_address} has not answered for {CONNECT_TIMEOUT:.0f} s "
                               f"({problem}): is it running, and may this host connect to it?")
        time.sleep(0.5)
