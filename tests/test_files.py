import os
import subprocess
import sys
import time

import pytest

from llava_jax import files
from llava_jax.errors import UserError
from llava_jax.files import making, replacing


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with replacing(str(path)) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    (tmp_path / "link").symlink_to(path)
    with replacing(str(tmp_path / "link")) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), replacing(str(tmp_path / "file")) as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_told_with_the_name(tmp_path):
    """A limit on the size of files, one kilobyte, stands for it."""
    write = ("import sys; from llava_jax.files import replacing\n"
             "with replacing(sys.argv[1]) as file: file.write(bytes(2000))")
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-c", write, str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and str(tmp_path / "file") in ended.stderr.splitlines()[-1], ended.stderr
    assert not os.listdir(tmp_path)


def test_a_folder_where_a_file_is_meant_is_told(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match=r"page\.html: Is a directory$"), replacing(str(tmp_path / "page.html")) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["page.html"]


MAKE = """
import sys, time
from llava_jax.files import making
with making(sys.argv[1], folder=sys.argv[2] == "folder") as temporary:
    print(temporary, flush=True)
    if sys.argv[2] == "folder":
        open(temporary + "/part", "w").close()
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_was_making_goes_and_what_a_living_one_makes_stays(tmp_path, kind):
    path = str(tmp_path / "model")
    for name in (".model.bak", ".model.tmp", ".model.0123456789.tmp", ".models.123456.12345678.tmp"):
        (tmp_path / name).touch()
    own = set(os.listdir(tmp_path))
    command = [sys.executable, "-c", MAKE, path, kind]
    killed, living = (subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                      for _ in range(2))
    left, kept = (os.path.basename(process.stdout.readline().strip()) for process in (killed, living))
    assert set(os.listdir(tmp_path)) == own | {left, kept}
    killed.kill()
    killed.wait()
    with making(path) as temporary:
        assert set(os.listdir(tmp_path)) == own | {kept, os.path.basename(temporary)}
    living.communicate("")
    assert living.returncode == 0 and set(os.listdir(tmp_path)) == own


@pytest.mark.parametrize("age, stays", [(files.ABANDONED / 2, True), (files.ABANDONED * 2, False)])
def test_what_another_host_was_making_stays_until_nobody_has_touched_it_for_long(tmp_path, age, stays):
    left = tmp_path / ".model.000000.12345678.tmp"
    left.mkdir()
    (left / "part").touch()
    for path in (left, left / "part"):
        os.utime(path, (time.time() - age,) * 2)
    files.remove_leftovers(str(tmp_path / "model"))
    assert left.exists() == stays


def test_a_name_of_any_length_can_be_replaced(tmp_path):
    for name in ("x" * 255, "\ud55c" * 85):
        with replacing(str(tmp_path / name)) as file:
            file.write(b"x")
        assert os.listdir(tmp_path) == [name]
        os.unlink(tmp_path / name)
