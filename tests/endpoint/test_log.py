import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from llava_jax.endpoint.log import AnswerLog, is_written
from llava_jax.endpoint.request import Reply
from llava_jax.errors import UserError

APPENDER = """
import hashlib, sys
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Reply
log, start = AnswerLog(sys.argv[1]), int(sys.argv[2])
for i in range(start, start + 100_000):
    log.append(hashlib.sha256(str(i).encode()).hexdigest(), Reply("x" * (i * 37 % 9000), "stop", i, 0, 1, "m", None, 0))
    print(i, flush=True)
"""


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def reply(i: int, text: str = "text") -> Reply:
    return Reply(f"{text} {i}", "stop", i, 0, 1, "m", None, 0)


def write(path: str, numbers, **fields) -> None:
    with AnswerLog(path) as log:
        for i in numbers:
            log.append(key(i), reply(i, **fields))


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "answers.jsonl")


def test_what_is_written_is_read(path):
    odd = "line\nbreak \u2028 \x85 \x00 ' \" 한국어 😀"
    with AnswerLog(path) as log:
        assert len(log) == 0 and key(1) not in log and log.mended == 0
        log.append(key(1), reply(1, odd), note={"image": "a.jpg"})
        assert log[key(1)] == reply(1, odd)
        log.append(key(0), reply(0))
        assert log[key(1)] == reply(1, odd) and log[key(0)] == reply(0)
    with AnswerLog(path) as log:
        assert list(log.items()) == [(key(1), reply(1, odd)), (key(0), reply(0))]
        assert log.damaged == [] and log.mended == 0
        with pytest.raises(UserError, match="already"):
            log.append(key(1), reply(2))
        with pytest.raises(KeyError):
            log[key(5)]
    lines = open(path, newline="\n").read().split("\n")
    assert len(lines) == 3 and json.loads(lines[0])["note"] == {"image": "a.jpg"}


def test_text_that_is_no_utf8_is_kept(path):
    write(path, [1], text="\ud800")
    with AnswerLog(path) as log:
        assert "1" in log[key(1)].text


def test_every_broken_last_line_is_mended(path):
    write(path, range(3))
    whole = open(path, "rb").read()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:end])
        with AnswerLog(path, read_only=True) as log:
            assert key(1) in log and os.path.getsize(path) == end  # a reader changes nothing
        with AnswerLog(path) as log:
            kept = end == len(whole) - 1  # only the newline is missing: it was paid for
            assert log.mended == (0 if kept else end - start) and log.damaged == []
            assert len(log) == (3 if kept else 2)
            log.append(key(7), reply(7))
        with AnswerLog(path) as log:
            assert log[key(7)] == reply(7) and log.mended == 0 and log.damaged == []
            assert len(log) == (4 if kept else 3)


def test_zeros_at_the_end_are_mended(path):
    write(path, range(2))
    with open(path, "ab") as file:
        file.write(bytes(5000))  # as a file system leaves them after a power cut
    with AnswerLog(path) as log:
        assert log.mended == 5000 and len(log) == 2


def test_damaged_lines_are_named_and_passed_over(path):
    write(path, range(5))
    lines = open(path, "rb").read().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"reply"', b'"reqly"')
    lines[3] = b"\x00\xff" + lines[3][10:]
    lines.insert(4, b"[1, 2]\n")
    with open(path, "wb") as file:
        file.writelines(lines)
    with AnswerLog(path) as log:
        assert log.damaged == [2, 4, 5] and log.mended == 0
        assert [log[key(i)] for i in (0, 2, 4)] == [reply(i) for i in (0, 2, 4)]
        assert key(1) not in log and key(3) not in log
        log.append(key(1), reply(1))
    with AnswerLog(path) as log:
        assert log[key(1)] == reply(1) and len(log) == 4


def test_the_first_of_two_answers_counts(path):
    write(path, [1])
    line = open(path).read()
    with open(path, "a") as file:
        file.write(line.replace("text 1", "late 1"))
    with AnswerLog(path) as log:
        assert log[key(1)].text == "text 1" and len(log) == 1


def test_kill_loses_nothing_that_was_appended(path):
    seen = 0
    for kill_after in (1, 40, 300):
        process = subprocess.Popen([sys.executable, "-c", APPENDER, path, str(seen)], stdout=subprocess.PIPE, text=True)
        told = [int(process.stdout.readline()) for _ in range(kill_after)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        with AnswerLog(path) as log:
            assert log.damaged == []
            assert len(log) - (told[-1] + 1) in (0, 1)  # one may be written and not yet told
            assert all(log[key(i)].prompt_tokens == i for i in range(len(log)))
            seen = len(log)


def test_a_second_process_is_refused_and_a_reader_is_not(path):
    holder = subprocess.Popen([sys.executable, "-c", APPENDER, path, "0"], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process is writing") as error:
            AnswerLog(path)
        assert path in str(error.value) and "\n" not in str(error.value)
        with AnswerLog(path, read_only=True) as log:
            assert key(0) in log and log.damaged == []
    finally:
        holder.kill()
        holder.wait()
    with AnswerLog(path) as log:
        assert key(0) in log


def test_who_looks_whether_a_log_is_written_does_not_stop_a_writer(path, monkeypatch):
    assert not is_written(path)
    write(path, [0])
    assert not is_written(path)
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with AnswerLog(path) as log:
            log.append(key(1), reply(1))
            assert is_written(path)
    assert not is_written(path)


def test_lines_with_windows_ends_are_read(path):
    write(path, range(3))
    lines = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    with AnswerLog(path) as log:
        assert len(log) == 3 and log.damaged == [] and log[key(2)] == reply(2)


@pytest.mark.parametrize("text", [b"5", b"null", b"[]", b"[" * 100_000])
def test_records_that_are_no_replies_are_damaged(path, text):
    write(path, [0])
    with open(path, "ab") as file:
        file.write(open(path, "rb").read().replace(b'"text 0"', text))
    write(path, [1])
    with AnswerLog(path) as log:
        assert log.damaged == [2] and [log[key(i)] for i in (0, 1)] == [reply(0), reply(1)]


def test_no_other_keys_are_written(path):
    with AnswerLog(path) as log, pytest.raises(UserError, match="is no key"):
        log.append("ab", reply(1))
    assert os.path.getsize(path) == 0


def test_a_full_disk_leaves_whole_lines(path):
    """A limit on the file's size makes the kernel write a part of a line and then refuse, as a full disk does."""

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with AnswerLog(path) as log:
            log.append(key(0), reply(0))
            size = os.path.getsize(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
            with pytest.raises(UserError, match="could not be kept") as error:
                log.append(key(1), reply(1))
            assert path in str(error.value) and os.strerror(errno.EFBIG) in str(error.value)
            assert os.path.getsize(path) == size and key(1) not in log
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            log.append(key(2), reply(2))  # room was made
            assert log[key(2)] == reply(2)

    in_child(child)
    with AnswerLog(path) as log:
        assert [k for k, _ in log.items()] == [key(0), key(2)] and log.damaged == [] and log.mended == 0


def test_a_reader_needs_a_file(path):
    with pytest.raises(FileNotFoundError):
        AnswerLog(path, read_only=True)


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
