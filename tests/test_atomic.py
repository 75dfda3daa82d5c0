import os
import resource
import signal

import pytest

from llava_jax.atomic import check_page, replacing


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
    """A limit on the size of files stands for it."""
    process = os.fork()
    if not process:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            with replacing(str(tmp_path / "file")) as file:
                file.write(bytes(200))
        except OSError as error:
            os._exit(0 if str(tmp_path / "file") in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0 and not os.listdir(tmp_path)


def test_a_page_takes_only_a_pages_place(tmp_path):
    path = tmp_path / "page.html"
    check_page(str(path))
    for content in ("", "<!DOCTYPE html><title>old</title>"):
        path.write_text(content)
        check_page(str(path))
    path.write_text('[{"id": 1}]')
    for taken in (path, tmp_path):
        with pytest.raises(ValueError, match="something else than a page"):
            check_page(str(taken))
