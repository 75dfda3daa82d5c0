import errno
import hashlib
import json
import os

import pytest

from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Response
from llava_jax.errors import UserError


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def reply(i: int, text: str = "text") -> Response:
    return Response(f"{text} {i}", "stop", i, 0, 1, "m", None, 0)


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
        assert len(log) == 0 and key(1) not in log and log.dropped == 0
        log.append(key(1), reply(1, odd), note={"image": "a.jpg"})
        assert log[key(1)] == reply(1, odd)
        log.append(key(0), reply(0))
        assert log[key(1)] == reply(1, odd) and log[key(0)] == reply(0)
    with AnswerLog(path) as log:
        assert list(log.items()) == [(key(1), reply(1, odd)), (key(0), reply(0))]
        assert log.damaged == [] and log.dropped == 0
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


def test_damaged_lines_are_named_and_passed_over(path):
    write(path, range(5))
    lines = open(path, "rb").read().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"reply"', b'"reqly"')
    lines[3] = b"\x00\xff" + lines[3][10:]
    lines.insert(4, b"[1, 2]\n")
    with open(path, "wb") as file:
        file.writelines(lines)
    with AnswerLog(path) as log:
        assert log.damaged == [2, 4, 5] and log.dropped == 0
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


def test_an_answer_that_cannot_be_written_is_not_in_the_log(path, monkeypatch):
    with AnswerLog(path) as log:
        log.append(key(0), reply(0))
        with monkeypatch.context() as patch, pytest.raises(UserError, match="make room"):
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            log.append(key(1), reply(1))
        assert key(1) not in log
        log.append(key(2), reply(2))
    with AnswerLog(path) as log:
        assert [k for k, _ in log.items()] == [key(0), key(2)] and log.damaged == []


def test_a_reader_needs_a_file(path):
    with pytest.raises(UserError, match="no such file"):
        AnswerLog(path, read_only=True)
