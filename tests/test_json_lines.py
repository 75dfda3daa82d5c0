"""A log of JSON lines survives kills, full disks, damage and a second writer."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.errors import UserError
from llava_jax.json_lines import BLOCK_BYTES, JsonLinesFile, is_written

APPENDER = """
import sys
from llava_jax.json_lines import JsonLinesFile
file, start = JsonLinesFile(sys.argv[1]), int(sys.argv[2])
for i in range(start, start + 100_000):
    file.append({"number": i, "text": "x" * (i * 37 % 9000)})
    print(i, flush=True)
"""


def values(path: str) -> list:
    with JsonLinesFile(path, read_only=True) as file:
        return [json.loads(line) for _, line in file.lines()]


def write(path: str, *written) -> list[int]:
    with JsonLinesFile(path) as file:
        return [file.append(value) for value in written]


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "log.jsonl")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4), max_size=6))
def test_values_come_back_in_order(tmp_path_factory, written):
    path = str(tmp_path_factory.mktemp("log") / "log.jsonl")
    offsets = write(path, *written)
    assert values(path) == written == [json.loads(line) for line in open(path, encoding="utf-8", newline="\n")]
    with JsonLinesFile(path) as file:
        assert [file.read(offset) for offset in offsets] == written and file.size == os.path.getsize(path)
        assert [offset for offset, _ in file.lines()] == offsets


def test_lines_longer_than_a_block(path):
    written = ["é" * BLOCK_BYTES, "b", "c" * (3 * BLOCK_BYTES)]
    offsets = write(path, *written)
    assert values(path) == written
    with JsonLinesFile(path) as file:
        assert file.read(offsets[2]) == written[2] and file.dropped == 0
    os.truncate(path, os.path.getsize(path) - 10)
    with JsonLinesFile(path) as file:
        assert file.size == offsets[2] and file.dropped == 3 * BLOCK_BYTES + 3 - 10


def test_every_incomplete_last_line_is_dropped(path):
    write(path, {"a": 1}, {"b": "é한"})
    content = open(path, "rb").read()
    start = content.index(b"\n") + 1
    for end in range(start + 1, len(content)):
        with open(path, "wb") as file:
            file.write(content[:end])
        complete = end == len(content) - 1  # only the newline is missing
        expected = [{"a": 1}, {"b": "é한"}][: 1 + complete]
        assert values(path) == expected and os.path.getsize(path) == end  # a reader changes nothing
        with JsonLinesFile(path) as file:
            assert file.dropped == (0 if complete else end - start)
            file.append("next")
        assert values(path) == [*expected, "next"]


def test_zeros_at_the_end_are_dropped(path):
    write(path, 1)
    with open(path, "ab") as file:
        file.write(bytes(5000))  # as a file system leaves them after a power cut
    with JsonLinesFile(path) as file:
        assert file.dropped == 5000
    assert values(path) == [1]


def test_truncate_drops_later_lines(path):
    write(path, "first")
    with JsonLinesFile(path) as file:
        second = file.append("second")
        file.append("third")
        file.truncate(second)
        file.append("new")
    assert values(path) == ["first", "new"]


def test_a_killed_process_loses_no_line(path):
    seen = 0
    for kill_after in (1, 40, 300):
        process = subprocess.Popen([sys.executable, "-c", APPENDER, path, str(seen)], stdout=subprocess.PIPE, text=True)
        printed = [int(process.stdout.readline()) for _ in range(kill_after)]
        process.send_signal(signal.SIGKILL)
        printed += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        write(path)
        numbers = [value["number"] for value in values(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) - (printed[-1] + 1) in (0, 1)  # the last one may be written and not yet printed
        seen = len(numbers)


def test_a_second_writer_is_refused_and_a_reader_is_not(path):
    process = subprocess.Popen([sys.executable, "-c", APPENDER, path, "0"], stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        assert is_written(path) and values(path)[0]["number"] == 0
        with pytest.raises(UserError, match="another process is writing") as error:
            JsonLinesFile(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    finally:
        process.kill()
        process.wait()
    write(path, "now")
    assert not is_written(path)


def test_is_written_does_not_stop_a_writer(path, monkeypatch):
    assert not is_written(path)
    write(path, 0)
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        write(path, 1)
    assert values(path) == [0, 1]


def test_a_full_disk_leaves_complete_lines(path):
    """A limit on the file's size makes the kernel write a part of a line and then refuse, as a full disk does."""

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with JsonLinesFile(path) as file:
            file.append("kept")
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.size + 100, resource.RLIM_INFINITY))
            with pytest.raises(UserError, match="make room") as error:
                file.append("x" * 1000)
            assert path in str(error.value) and os.strerror(errno.EFBIG) in str(error.value)
            assert os.path.getsize(path) == file.size
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            file.append("again")  # room was made

    in_child(child)
    assert values(path) == ["kept", "again"]


def test_paths_that_cannot_be_opened(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        JsonLinesFile(path, read_only=True)
    with pytest.raises(UserError, match="no such folder"):
        JsonLinesFile(str(tmp_path / "missing" / "log.jsonl"))


def in_child(work) -> None:
    """Runs `work` in a forked process."""
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0
