import os
import subprocess
import sys
import time

import pytest

from llava_jax import files
from llava_jax.errors import UserError
from llava_jax.files import atomic_write, temporary_path


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    with atomic_write(str(path)) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    (tmp_path / "link").symlink_to(path)
    with atomic_write(str(tmp_path / "link")) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), atomic_write(str(tmp_path / "file")) as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files, one kilobyte, stands for it."""
    write = ("import sys; from llava_jax.files import atomic_write\n"
             "with atomic_write(sys.argv[1]) as file: file.write(bytes(2000))")
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-c", write, str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and str(tmp_path / "file") in ended.stderr.splitlines()[-1], ended.stderr
    assert not os.listdir(tmp_path)


def test_a_folder_of_that_name_is_named(tmp_path):
    (tmp_path / "page.html").mkdir()
    match = r"page\.html: Is a directory$"
    with pytest.raises(UserError, match=match), atomic_write(str(tmp_path / "page.html")) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["page.html"]


MAKE = """
import sys, time
from llava_jax.files import temporary_path
with temporary_path(sys.argv[1], folder=sys.argv[2] == "folder") as temporary:
    print(temporary, flush=True)
    if sys.argv[2] == "folder":
        open(temporary + "/part", "w").close()
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path, kind):
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
    with temporary_path(path) as temporary:
        assert set(os.listdir(tmp_path)) == own | {kept, os.path.basename(temporary)}
    living.communicate("")
    assert living.returncode == 0 and set(os.listdir(tmp_path)) == own


@pytest.mark.parametrize("folder", [False, True])
def test_a_temporary_file_that_another_process_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch, folder):
    lock, removed = files._lock, []

    def late(temporary):
        if not removed:
            removed.append(temporary)
            files._remove(temporary)
        return lock(temporary)

    monkeypatch.setattr(files, "_lock", late)
    with temporary_path(str(tmp_path / "model"), folder=folder) as temporary:
        assert os.listdir(tmp_path) == [os.path.basename(temporary)] and temporary != removed[0]


@pytest.mark.parametrize("age, stays", [(files.ABANDONED_SECONDS / 2, True), (files.ABANDONED_SECONDS * 2, False)])
def test_another_hosts_temporary_file_is_removed_once_it_is_old(tmp_path, age, stays):
    left = tmp_path / ".model.000000.12345678.tmp"
    left.mkdir()
    (left / "part").touch()
    for path in (left, left / "part"):
        os.utime(path, (time.time() - age,) * 2)
    files.remove_leftovers(str(tmp_path / "model"))
    assert left.exists() == stays


def test_a_name_of_any_length_can_be_replaced(tmp_path):
    for name in ("x" * 255, "\ud55c" * 85):
        with atomic_write(str(tmp_path / name)) as file:
            file.write(b"x")
        assert os.listdir(tmp_path) == [name]
        os.unlink(tmp_path / name)
