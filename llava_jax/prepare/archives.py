"""Unpacks zip files of images. An interrupted run can continue, and nothing is written outside the folder."""

import errno
import lzma
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable, Set

from tqdm import tqdm

from llava_jax.errors import UserError, user_path
from llava_jax.files import atomic_write

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
"""Extensions of images."""


def unpack(archive: str, folder: str, names: Set[str]) -> int:
    """Unpacks the images of a zip file into `folder` and returns the number of images that it wrote.

    `names` are the expected names in the folder. The first member that has such a name behind leading folders tells
    which leading folders are removed. An image appears when it is complete, and complete images are kept.

    Raises UserError before anything is written if the file is no zip file, has none of `names`, has a member that is a
    link or would leave the folder, or if the disk is too small. Raises UserError later if a member is damaged.
    """
    try:
        with user_path(archive):
            zipped = zipfile.ZipFile(archive)
        with zipped:
            members = _images(archive, zipped.infolist(), names)
            targets = {_inside(folder, name, archive): member for name, member in members.items()}
            absent = {target: member for target, member in targets.items() if not _has_size(target, member.file_size)}
            require_space(folder, sum(member.file_size for member in absent.values()), f"unpacking {archive}")
            for parent in {os.path.dirname(target) for target in absent}:
                with user_path(parent):
                    os.makedirs(parent, exist_ok=True)
            for target, member in tqdm(absent.items(), archive, unit="images", disable=None):
                _write(zipped, member, target)
            return len(absent)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _broken(archive, error) from None
    except OSError as error:
        # bz2 raises a plain OSError for damaged data, and a damaged offset makes a seek fail.
        if error.errno is None or error.errno == errno.EINVAL and error.filename is None:
            raise _broken(archive, error) from None
        raise


def _broken(archive: str, error: Exception) -> UserError:
    return UserError(f"{archive}: a broken zip file ({error}); delete it and download it again")


def require_space(folder: str, size: float, what: str) -> None:
    """Prints on stderr how many bytes `what` takes and how many are free. Raises UserError if they are too few."""
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder or ".").free
    need = f"{what} takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in {folder or '.'}"
    if free < size:
        raise UserError(f"{need}: make room")
    print(need, file=sys.stderr)


def _images(archive: str, members: Iterable[zipfile.ZipInfo], names: Set[str]) -> dict[str, zipfile.ZipInfo]:
    """Returns the images of a zip file by their names in the folder."""
    images = []
    for member in members:
        name = member.filename
        # An empty part would make the rest an absolute path, once the leading folders are removed.
        if {"", ".", ".."} & {*name.removesuffix("/").split("/")} or "\\" in name or ":" in name:
            raise UserError(f"{archive}: the name {name!r:.200} would leave the folder; nothing was unpacked")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{archive}: {name!r:.200} is a link; nothing was unpacked")
        if name.lower().endswith(SUFFIXES):
            images.append(member)
    lead = next((lead for image in images if (lead := _leading_folders(image.filename, names)) is not None), None)
    if lead is None:
        raise UserError(f"{archive}: contains none of the expected images; is it another archive?")
    return {image.filename.removeprefix(lead): image for image in images if image.filename.startswith(lead)}


def _inside(folder: str, name: str, archive: str) -> str:
    """Returns the path of a member. It is checked again here, because links may lead outside the folder."""
    target, root = os.path.join(folder, name), os.path.realpath(folder)
    if os.path.commonpath([os.path.realpath(target), root]) != root:
        raise UserError(f"{archive}: {name!r:.200} would be written outside of {folder}; nothing was unpacked")
    return target


def _leading_folders(name: str, names: Set[str]) -> str | None:
    """Returns the leading folders to remove from a member's name to get one of `names`."""
    parts = name.split("/")
    return next(("/".join([*parts[:i], ""]) for i in range(len(parts)) if "/".join(parts[i:]) in names), None)


def _write(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, target: str) -> None:
    with zipped.open(member) as packed, atomic_write(target) as file:
        shutil.copyfileobj(packed, file, 1 << 20)


def _has_size(path: str, size: int) -> bool:
    return os.path.exists(path) and os.path.getsize(path) == size
