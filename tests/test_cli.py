"""How commands end: one line and code 2 for a UserError, a traceback and code 1 for every other error."""

import errno
import math
import subprocess
import sys

import jax
import pytest
from commands import run_command

from llava_jax import cli
from llava_jax.errors import UserError, user_path
from llava_jax.files import read_json


def ended(body: str, *args: str, **options) -> subprocess.CompletedProcess:
    code = f"import errno, os, sys\nfrom llava_jax import cli\ndef main(args):\n    {body}\ncli.run(main)"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, **options)


@pytest.mark.parametrize("error", [
    RuntimeError("out"), MemoryError(), OSError(errno.EIO, "Input/output error"), ValueError("shapes"), KeyError("x"),
    ImportError("lib"), FileNotFoundError(errno.ENOENT, "No such file or directory"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")], ids=lambda error: type(error).__name__)
def test_other_errors_pass(error, monkeypatch):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["verb"])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(type(error)) as raised:
        cli.run(main)
    assert raised.value is error


def test_other_errors_keep_their_traceback_and_exit_with_1():
    done = ended("raise OSError(errno.EIO, 'Input/output error')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_mistake_is_one_line_and_2():
    raised = r"from llava_jax.errors import UserError; raise UserError('a.json, row 1: \x1b[31mred\n is no role')"
    done = ended(raised)
    assert done.returncode == 2 and done.stderr == "error: a.json, row 1: \N{REPLACEMENT CHARACTER}[31mred is no role\n"
    shown = ended(raised, "--debug")
    assert shown.returncode == 2 and "Traceback" in shown.stderr and "error: a.json" in shown.stderr


def test_a_reader_that_has_left_is_no_crash():
    code = "from llava_jax import cli\ndef main(args):\n    for i in range(100000): print(i)\ncli.run(main)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'],
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


def test_a_terminal_without_utf8_shows_what_it_can():
    done = ended("print('\\ud55c\\uae00'); raise cli.UserError('\\u03b1')", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stdout == "??\n" and done.stderr == "error: ?\n"


def test_text_of_others_moves_no_cursor():
    assert cli.printable("a\x1b[2J\x9b31m\u202ecod.exe\u2066\udc80\x07\x00b") == "a�[2J�31m�cod.exe���" "�b"
    plain = "Ünïcode\t한국어\n👩‍👩‍👧 क्‍ष a\u00a0b　c"
    assert cli.printable(plain) == plain


def test_a_mistake_and_its_traceback_move_no_cursor():
    raised = "from llava_jax.errors import UserError; raise UserError('row \\x1b[2J\\u202e')"
    done = ended(raised, "--debug")
    assert done.returncode == 2 and done.stderr.count("row \N{REPLACEMENT CHARACTER}[2J") == 2
    assert not {"\x1b", "\u202e"} & set(done.stderr.replace(raised, ""))


def test_a_value_without_end_does_not_fill_the_terminal():
    line = cli.one_line(UserError(f"answers.jsonl, line 3: {'9' * 10**6}; --partial leaves it out"))
    assert line.startswith("answers.jsonl, line 3: 999") and line.endswith("999; --partial leaves it out")
    assert len(line) < 8010 and cli.one_line("x " * 3000) == "x " * 2999 + "x"


def test_a_wrong_path_is_a_mistake_and_a_broken_disk_is_not(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=str(path)), user_path(path):
            open(path, "rb")
    with pytest.raises(OSError, match="Input/output"), user_path(tmp_path):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_a_mistake_and_another_value_error_is_not(tmp_path, name):
    with pytest.raises(UserError, match=r"'a\\.*b': no file can have this name"), user_path(name):
        open(name, "rb")
    with pytest.raises(ValueError, match="math domain") as raised, user_path(tmp_path):
        math.sqrt(-1)
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "not JSON"), (b"\xff\xfe", "byte 1 is not UTF-8"), (b"[1]", "must be an object, and is a list"),
    (b"null", "must be an object, and is null"), (b"[" * 100_000, "nested too deeply"), (b"", "not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON")])
def test_a_small_file_that_is_wrong_is_named(tmp_path, content, message):
    path = tmp_path / "small.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"small.json: {message}"):
        read_json(path)


def test_a_command_in_this_process_ends_as_in_its_own(tmp_path):
    """`run_command` of the tests against a process, for an error and for printed text."""
    (tmp_path / "rows.json").write_text("[3]")
    for args in (["prepare", "check", str(tmp_path / "rows.json")], ["train", "no_such_recipe"], ["prepare", "--help"]):
        verb, *options = args
        done = subprocess.run([sys.executable, "-m", f"llava_jax.{verb}", *options], capture_output=True, text=True)
        assert run_command(*args)[::2] == (done.returncode, done.stderr)
