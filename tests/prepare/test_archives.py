"""Zip files unpacked: where their images land, what is refused, what a second run still does."""

import os
import stat
import zipfile

import pytest

from llava_jax.errors import UserError
from llava_jax.prepare import archives
from llava_jax.prepare.archives import unpack

IMAGES = {f"{i // 3}/{i}.jpg": f"image {i} ".encode() * 50 for i in range(7)}


def write(path, members, lead=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(lead + name, content)
    return str(path)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("lead", ["", "images/", "some/where/images/"])
def test_leading_folders_are_left_out(lead, tmp_path):
    archive = write(tmp_path / "x.zip", {**IMAGES, "notes.txt": b"", "empty/": b""}, lead)
    assert unpack(archive, str(tmp_path / "to"), {"0/none.jpg", "1/4.jpg"}) == 7
    assert tree(tmp_path / "to") == IMAGES


def test_images_beside_the_folder_stay_out(tmp_path):
    archive = write(tmp_path / "x.zip", {"images/1.jpg": b"1", "__MACOSX/images/1.jpg": b"x", "thumbs/1.png": b"x"})
    unpack(archive, str(tmp_path / "to"), {"1.jpg"})
    assert tree(tmp_path / "to") == {"1.jpg": b"1"}


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "a/../../../evil.txt", "..\\evil.jpg", "C:\\evil.jpg",
             "0//tmp/evil.jpg", "images//evil.jpg", "./evil.jpg", "0/./evil.jpg", "//evil.jpg"])
def test_a_member_that_leaves_the_folder_is_refused(name, tmp_path):
    archive = write(tmp_path / "x.zip", {**IMAGES, name: b"evil"})
    with pytest.raises(UserError, match="would leave the folder; nothing was unpacked") as raised:
        unpack(archive, str(tmp_path / "to"), set(IMAGES))
    assert str(raised.value).startswith(archive) and "evil" in str(raised.value)
    assert tree(tmp_path) == {"x.zip": (tmp_path / "x.zip").read_bytes()}


def test_an_absolute_path_behind_the_leading_folder(tmp_path):
    """Without its leading folder, this name is that of another folder."""
    archive = write(tmp_path / "x.zip", {"train2017/1.jpg": b"1", f"train2017/{tmp_path}/evil.jpg": b"evil"})
    with pytest.raises(UserError, match="would leave the folder; nothing was unpacked"):
        unpack(archive, str(tmp_path / "to"), {"1.jpg"})
    assert list(tree(tmp_path)) == ["x.zip"]


def test_a_link_in_the_folder_is_not_followed_out_of_it(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/0").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match="would be written outside of"):
        unpack(write(tmp_path / "x.zip", IMAGES), str(tmp_path / "to"), set(IMAGES))
    assert list(tree(tmp_path)) == ["x.zip"]


def test_a_folder_that_is_a_link_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "to").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert unpack(write(tmp_path / "x.zip", IMAGES), str(tmp_path / "to"), set(IMAGES)) == 7
    assert tree(tmp_path / "disk") == IMAGES


def test_a_link_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
        zipped.writestr("1.jpg", "1")
    with pytest.raises(UserError, match="'link.jpg' is a link"):
        unpack(str(tmp_path / "x.zip"), str(tmp_path / "to"), {"1.jpg"})
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.99])
def test_a_truncated_file_is_one_line(keep, tmp_path):
    archive = write(tmp_path / "x.zip", IMAGES)
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"x.zip: a broken zip file .*; delete it and download it again") as raised:
        unpack(archive, str(tmp_path / "to"), set(IMAGES))
    assert "\n" not in str(raised.value)


def test_a_damaged_member_leaves_whole_images_only(tmp_path):
    archive = write(tmp_path / "x.zip", IMAGES)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    with zipfile.ZipFile(archive) as zipped:
        member = zipped.infolist()[4]
    content[member.header_offset + 30 + len(member.filename) + 5] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match="a broken zip file"):
        unpack(archive, str(tmp_path / "to"), set(IMAGES))
    there = tree(tmp_path / "to")
    assert there == {name: IMAGES[name] for name in list(IMAGES)[:4]}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_anywhere_is_one_line(method, tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as zipped:
        zipped.writestr("1.jpg", bytes(range(256)) * 4)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            unpack(str(path), str(tmp_path / f"to {place}"), {"1.jpg"})
        except UserError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > len(whole) / 20


@pytest.mark.parametrize("name", ["1.jpg/2.jpg", "n" * 300 + ".jpg"])
def test_a_name_that_no_file_can_have_is_one_line(name, tmp_path):
    archive = write(tmp_path / "x.zip", {"1.jpg": b"1", name: b"2"})
    with pytest.raises(UserError, match=r"(Is a directory|File name too long)$"):
        unpack(archive, str(tmp_path / "to"), {"1.jpg"})


def test_a_second_run_writes_only_what_is_missing_or_cut_off(tmp_path):
    archive, folder = write(tmp_path / "x.zip", IMAGES), tmp_path / "to"
    unpack(archive, str(folder), set(IMAGES))
    (folder / "0/1.jpg").write_bytes(b"image 1 image")
    (folder / "2/6.jpg").unlink()
    old = {name: os.stat(folder / name).st_mtime_ns for name in IMAGES if name != "2/6.jpg"}
    assert unpack(archive, str(folder), set(IMAGES)) == 2
    assert tree(folder) == IMAGES
    assert {name for name, time in old.items() if os.stat(folder / name).st_mtime_ns != time} == {"0/1.jpg"}


def test_another_archive_is_told(tmp_path):
    archive = write(tmp_path / "x.zip", IMAGES)
    with pytest.raises(UserError, match="contains none of the expected images"):
        unpack(archive, str(tmp_path / "to"), {"000000000009.jpg"})


def test_a_small_disk_is_told_beforehand(tmp_path, monkeypatch, capsys):
    archive = write(tmp_path / "x.zip", IMAGES)
    size = sum(map(len, IMAGES.values()))
    usage = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"unpacking .*x.zip takes .* GB, and .* GB are free in .*: make room"):
        unpack(archive, str(tmp_path / "to"), set(IMAGES))
    assert not (tmp_path / "to").exists()
    usage.free = size
    unpack(archive, str(tmp_path / "to"), set(IMAGES))
    assert "are free in" in capsys.readouterr().err
