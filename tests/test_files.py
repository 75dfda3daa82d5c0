import os
import subprocess
import sys

import pytest

from llava_jax.errors import UserError
from llava_jax.files import check_page, replacing


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


def test_a_page_takes_only_a_pages_place(tmp_path):
    path = tmp_path / "page.html"
    check_page(str(path))
    for content in ("", "<!DOCTYPE html><title>old</title>"):
        path.write_text(content)
        check_page(str(path))
    path.write_text('[{"id": 1}]')
    for taken in (path, tmp_path):
        with pytest.raises(UserError, match="something else than a page"):
            check_page(str(taken))
