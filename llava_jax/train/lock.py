"""Locks an output directory, so that only one run uses it.

On a local disk, and on NFS with working locks, the lock is an flock, which the kernel releases when the process ends.
A note in the file names its owner. A note of another host, a file system without locks, and a bucket need a heartbeat:
a run rewrites its note every HEARTBEAT_SECONDS, and counts as ended after LOST_SECONDS without a heartbeat. There, two
runs that start within two seconds may both continue.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from llava_jax.cli import printable
from llava_jax.errors import UserError, user_path
from llava_jax.parallel.processes import allgather_object

NAME = ".lock"
HEARTBEAT_SECONDS, LOST_SECONDS = 10.0, 45.0
"""Seconds between heartbeats, and seconds without one after which a run counts as ended."""
KILL_SECONDS = 10.0
"""Seconds that a killed process may need to end. The kernel keeps its lock until then."""
SETTLE_SECONDS = 2.0
"""Seconds until a bucket shows the later of two notes that were written at the same time."""
NOTE_BYTES = 512
"""Size of the note in bytes, padded so that every write replaces all of it."""


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Keeps other runs out of an output directory. All processes of a run call it.

    Raises UserError that names the run which is using the directory.
    """
    lock = None
    if jax.process_index() == 0:
        lock = (_FileLock if isinstance(directory, Path) else _BucketLock)(directory)
    try:
        allgather_object("the lock of the output directory", None)
        yield
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    """The note and its heartbeat. Subclasses define `acquire`, `put` and `release` for their storage."""

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / NAME
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.note = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": secrets.token_hex(8)}
        self.beats, self.ended = 0, threading.Event()
        self.acquire()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def write(self) -> None:
        """Writes the note with the next heartbeat's number."""
        self.beats += 1
        self.put(json.dumps(self.note | {"beat": self.beats}).ljust(NOTE_BYTES).encode())

    def refuse(self) -> None:
        """Raises UserError that names the run of the stored note."""
        note = self.read()
        owner = f"a {_owner(note)}" if note else "another run"
        raise UserError(f"{self.directory}: {owner} is using this output directory; end it, or give another --output")

    def read(self) -> dict:
        """Returns the stored note, empty if there is none."""
        try:
            note = json.loads(self.path.read_bytes())
            return note if isinstance(note, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def wait_for_silence(self) -> None:
        """Waits until the run of the stored note is silent for LOST_SECONDS. Raises UserError if it is not."""
        before = self.read()
        if not before:
            return
        print(f"{self.directory}: waiting {LOST_SECONDS:.0f} s to see whether the {_owner(before)} has ended",
              flush=True)
        until = time.monotonic() + LOST_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, LOST_SECONDS))
            if self.read() != before:
                self.refuse()

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_SECONDS):
            note = self.read()
            if note and note.get("token") != self.note["token"]:
                print(f"error: {self.directory}: the {_owner(note)} has taken this output directory; this one ends",
                      file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):  # the disk may be full, or the network down, for a while
                self.write()

    def stop_heartbeat(self) -> None:
        """Stops the heartbeat and waits for its thread."""
        self.ended.set()
        self.thread.join()


class _FileLock(_Lock):
    def acquire(self) -> None:
        self.created = not self.directory.exists()
        with user_path(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + KILL_SECONDS
        while True:
            try:
                locked = self.lock()
            except BlockingIOError:
                if time.monotonic() > until:
                    os.close(self.file)
                    self.refuse()
                os.close(self.file)
                time.sleep(0.2)
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file), os.stat(self.path)):
                    break
            os.close(self.file)  # the earlier run removed this file when it ended
        if not (locked and self.read().get("host") == self.note["host"]):
            self.wait_for_silence()
        with user_path(self.path):  # the disk may be full
            self.write()

    def lock(self) -> bool:
        """Locks the file. Returns False on a file system without locks. Raises BlockingIOError if it is locked."""
        # Read-only access is enough, except on NFS. A file open for writing prevents a read-only remount.
        for access in (os.O_RDONLY, os.O_RDWR):
            with user_path(self.path):
                self.file = os.open(self.path, access | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                raise
            except OSError:
                if access == os.O_RDONLY:
                    os.close(self.file)
        return False

    def put(self, note: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(file, note, 0)
        finally:
            os.close(file)

    def release(self) -> None:
        self.stop_heartbeat()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self.file)
        if self.created:  # a run that fails at its start leaves nothing
            with contextlib.suppress(OSError):
                self.directory.rmdir()


class _BucketLock(_Lock):
    def acquire(self) -> None:
        self.wait_for_silence()
        self.write()
        time.sleep(SETTLE_SECONDS)
        if self.read().get("token") != self.note["token"]:
            self.refuse()

    def put(self, note: bytes) -> None:
        self.path.write_bytes(note)

    def release(self) -> None:
        self.stop_heartbeat()
        with contextlib.suppress(OSError):
            self.path.unlink()


def _owner(note: dict) -> str:
    return printable(f"run on {note.get('host')} (process {note.get('pid')}, since {note.get('since')})")
