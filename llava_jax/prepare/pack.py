"""`prepare pack`: instruction data of any format, images included, as a TFDS data set of ArrayRecord shards.

A shard contains the rows between two numbers, so the files do not depend on the number of workers. OUT becomes a
readable data set at the very end, when dataset_info.json is written. The state of an unfinished pack is in OUT/.pack:
the plan (data, options, bounds of the shards), shards in progress, and a note on each finished shard.
"""

import contextlib
import dataclasses
import fcntl
import glob
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any, Literal

from llava_jax.cli import Flag, printable
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, Source, open_mixture
from llava_jax.errors import DISK_FULL_ERRNOS, UserError
from llava_jax.files import read_json
from llava_jax.prepare.options import (
    DataOptions,
    ImageOptions,
    OutArgument,
    WorkerOptions,
    require_at_least,
)
from llava_jax.prepare.progress import run_tasks
from llava_jax.prepare.shards import SHOWN_BAD_ROWS, Encoding, Examples, ShardWriter, features, replace, write_json

PROBE_ROWS = 100
"""Number of rows that are encoded to estimate how many rows make a shard."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

Note = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(WorkerOptions, ImageOptions, DataOptions):
    """Writes a data set, images included, as a TFDS data set of ArrayRecord shards.

    Training reads OUT at random from any disk or bucket, without a file for every image;
    tfds.builder_from_directory(OUT) opens it. Every row of DATA is written once, in order. A mixture file must take
    every row once an epoch. If a pack is stopped at any moment, the same command continues it. To have OUT in a bucket,
    write it to a disk and copy it: gcloud storage cp -r OUT gs://BUCKET
    """

    out: OutArgument
    """Folder to write. If it is called FOLDER/NAME/1.0.0, tfds.data_source("NAME", data_dir=FOLDER) opens it too."""
    image_size: int | None = None
    """Side in pixels of the square that the model sees (336 for LLaVA-1.5). Larger images are stored as that square,
    which is smaller and faster to read. Without it image files are stored byte for byte."""
    image_mode: Literal["pad", "crop"] = "pad"
    """Image mode of the model, with --image-size: pad fills up to a square (LLaVA-1.5), crop cuts out the centre."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Format of the squares, with --image-size: png changes no pixel that the model sees, but saves little."""
    quality: int = 95
    """JPEG quality, 1 to 100, with --image-size."""
    shard_size: str = "256MB"
    """Approximate size of a shard."""
    shards: int | None = None
    """Number of shards, instead of their size."""
    split: str = "train"
    """Name of the split."""
    name: str = ""
    """Name of the data set; default: the folder's name."""
    bad_rows: Literal["error", "skip"] = "error"
    """Treatment of unusable rows: error stops without a data set, skip leaves them out and counts them."""
    overwrite: Flag = False
    """Whether to replace a data set in OUT, or part of one."""

    def run(self) -> int:
        self._check_options()
        self._check_folder()
        name, version = self._name()
        mixture = self._open()
        encoding = Encoding(self.image_size, self.image_mode, self.image_format, self.quality, self.exif,
                            self.max_pixels)
        examples = Examples(mixture, encoding)
        with _lock(self.out), _explained(self.out):
            self._check_folder()  # another pack may have finished in the meantime
            bounds = self._plan(examples, name, version)
            count = len(bounds) - 1
            files = [f"{name}-{self.split}.array_record-{shard:05}-of-{count:05}" for shard in range(count)]
            writer = ShardWriter(
                examples=examples,
                bounds=bounds,
                files=tuple(os.path.join(self.out, file) for file in files),
                notes=tuple(_state(self.out, f"{shard:05}.json") for shard in range(count)),
            )
            notes = self._write(writer)
            self._finish(notes, name, version)
        print(printable(self._summary(notes)))
        return 0

    def _check_options(self) -> None:
        if "://" in self.out:
            raise UserError(f"{self.out}: pack writes to a disk; copy that then: gcloud storage cp -r FOLDER URL")
        require_at_least(1, self, "image_size", "shards", "max_pixels")
        require_at_least(0, self, "workers")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}: it must be from 1 to 100")
        for name in ("split", "name"):
            value = getattr(self, name)
            if not re.fullmatch(r"[a-z]\w*", value, re.ASCII | re.IGNORECASE) and (value or name == "split"):
                raise UserError(f"--{name} must be a word of letters, digits and _, not {value!r}")
        _parse_size(self.shard_size)

    def _check_folder(self) -> None:
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out}: is a file; give a folder")
        found = set(os.listdir(self.out)) if os.path.isdir(self.out) else set()
        if "dataset_info.json" in found and not self.overwrite:
            raise UserError(f"{self.out}: contains a data set already; give another folder, or --overwrite")
        if found and not found & {"dataset_info.json", ".pack"}:
            raise UserError(f"{self.out}: contains other files ({min(found)}); give an empty folder or a new one")

    def _open(self) -> Mixture:
        mixture = open_mixture(self.data, self.image_root)
        if mixture.counts != tuple(map(len, mixture.sources)):
            raise UserError(
                f"{self.data}: pack writes every row once, but this mixture takes some more or less often; write it "
                "out first (prepare mix --materialise), or pack its sources and train on a mixture of them"
            )
        for source in mixture.sources:
            inside = os.path.realpath(self.out) + os.sep
            if any(os.path.realpath(file).startswith(inside) for file in _files(source)):
                raise UserError(f"{self.out}: {source.path} is in this folder; give another one")
        return mixture

    def _name(self) -> tuple[str, str]:
        """Returns name and version of the data set."""
        parent, last = os.path.split(os.path.abspath(self.out))
        version = last if re.fullmatch(r"\d+\.\d+\.\d+", last) else ""
        folder = os.path.basename(parent) if version else last
        name = re.sub(r"\W+", "_", folder, flags=re.ASCII).strip("_").lower()
        return self.name or (name if name[:1].isalpha() else f"data_{name}".rstrip("_")), version or "1.0.0"

    def _plan(self, examples: Examples, name: str, version: str) -> tuple[int, ...]:
        """Returns the bounds of the shards, from the plan of an unfinished pack or from a new plan, which is written.

        Raises UserError if the unfinished pack has other data or options.
        """
        images = {"size": self.image_size, "mode": self.image_mode, "format": self.image_format,
                  "quality": self.quality} | ({"exif": True} if self.exif else {})
        plan = {
            "data": [_fingerprint(source) for source in examples.mixture.sources],
            "images": images if self.image_size or self.exif else {},
            "shards": self.shards or self.shard_size,
            "name": [name, version, self.split],
            "columns": sorted(features()),
        }
        path, before, damage = _state(self.out, "plan.json"), {}, ""
        try:
            before = read_json(path) if os.path.exists(path) else {}
        except UserError as error:
            damage = str(error)
        changed = [key for key, now in plan.items() if now != before.get(key)]
        if not changed and not _are_bounds(before.get("bounds"), len(examples)):
            damage = f"{path}: bounds is damaged"
        if damage and not self.overwrite:
            raise UserError(f"{damage}; give --overwrite to start anew")
        if not before or self.overwrite and (damage or changed):
            _clear(self.out)
            bounds = _bounds(examples, self.shards, _parse_size(self.shard_size))
            write_json(path, plan | {"bounds": bounds})
            return bounds
        for key in changed:
            seen = f": {_text(before.get(key))} before, {_text(plan[key])} now" if key != "data" else " or image root"
            raise UserError(f"{self.out}: contains part of a pack with other {key}{seen}; give the same to continue, "
                            "another folder, or --overwrite")
        for file in glob.glob(_state(glob.escape(self.out), "*.json-*")):  # shards in progress when it was stopped
            os.unlink(file)
        return tuple(before["bounds"])

    def _write(self, writer: ShardWriter) -> list[Note]:
        """Writes the unfinished shards and returns the notes on all shards. Raises UserError if rows are bad."""
        skip, total = self.bad_rows == "skip", writer.bounds[-1]
        notes = [writer.finished(shard) for shard in range(len(writer.files))]
        # A shard with bad rows is written again, because they may have been mended since.
        missing = [shard for shard, note in enumerate(notes) if note is None or (note["bad"] and not skip)]
        rows = [writer.rows(shard) for shard in missing]
        written = run_tasks(writer, missing, rows, self.workers, done=total - sum(rows), writes=True)
        for shard, note in zip(missing, written, strict=True):
            notes[shard] = note
        bad = _bad(notes)
        if bad and not skip:
            first = "; ".join([line for note in notes for line in note["shown"]][:SHOWN_BAD_ROWS])
            raise UserError(
                f"{bad.total():,} of {total:,} rows cannot be used ({_counted(bad)}); mend them (prepare check lists "
                f"all) or give --bad-rows skip; the first: {first}"
            )
        return notes

    def _finish(self, notes: list[Note], name: str, version: str) -> None:
        if not any(note["rows"] for note in notes):
            raise UserError(f"{self.data}: none of its rows can be used; the first: {notes[0]['shown'][0]}")
        split = {
            "name": self.split,
            "shardLengths": [str(note["rows"]) for note in notes],
            "numBytes": str(sum(note["bytes"] for note in notes)),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        info = {"name": name, "version": version, "fileFormat": "array_record", "disableShuffling": True}
        features().save_config(_state(self.out))
        replace(_state(self.out, "features.json"), os.path.join(self.out, "features.json"))
        write_json(os.path.join(self.out, "dataset_info.json"), info | {"splits": [split]})
        shutil.rmtree(_state(self.out))

    def _summary(self, notes: list[Note]) -> str:
        total = {name: sum(note[name] for note in notes) for name in ("rows", "images", "read", "kept", "size")}
        content = f"{total['rows']:,} rows with {total['images']:,} images"
        lines = [f"{self.out}: {content} in {len(notes):,} shards, {_format_size(total['size'])}"]
        if self.image_size and total["images"]:
            how = "png" if self.image_format == "png" else f"jpeg {self.quality}"
            ratio = f"{total['read'] / total['kept']:.2f} times smaller ({self.image_mode} {self.image_size}, {how})"
            lines.append(f"images: {_format_size(total['read'])} before, {_format_size(total['kept'])} now, {ratio}")
        if bad := _bad(notes):
            lines.append(f"left out: {bad.total():,} rows ({_counted(bad)})")
        return "\n".join(lines)


@contextlib.contextmanager
def _lock(out: str) -> Iterator[None]:
    """Makes sure that one process at a time writes to the folder, which is created if it is missing."""
    os.makedirs(_state(out), exist_ok=True)
    handle = os.open(_state(out, "lock"), os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(handle), os.stat(_state(out, "lock")))
        except (BlockingIOError, FileNotFoundError):  # locked; or deleted by a pack that has just finished
            locked = False
        if not locked:
            raise UserError(f"{out}: another pack is writing to this folder; wait for it, or give another folder")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(out: str) -> Iterator[None]:
    """Adds to the error of a full disk or a dead worker how many shards are finished."""
    try:
        yield
    except (OSError, BrokenExecutor) as error:
        done = len(glob.glob(_state(glob.escape(out), "*[0-9].json")))
        note = f"{done} shards are finished, and the same command continues from there"
        if isinstance(error, BrokenExecutor):
            raise RuntimeError(f"{out}: a worker process died (was it killed for its memory?); {note}") from error
        # The error of a worker comes as ArrayRecord's text, without a code.
        for code in DISK_FULL_ERRNOS:
            if code == error.errno or os.strerror(code) in str(error):
                raise UserError(f"{out}: {os.strerror(code)}; make room; {note}") from error
        error.add_note(f"{out}: {note}")
        raise


def _bounds(examples: Examples, shards: int | None, size: int) -> tuple[int, ...]:
    """Returns the number of the first row of each shard, then the number of rows.

    There are `shards` shards or, if that is None, shards of about `size` bytes.
    """
    rows = len(examples)
    if shards is None:
        probed, sizes = min(rows, PROBE_ROWS), []
        for k in range(probed):
            with contextlib.suppress(BadRow):
                sizes.append(len(examples.load(rows * k // probed).example))
        shards = -(-rows * sum(sizes) // (max(len(sizes), 1) * size))
    shards = min(max(shards, 1), rows)
    return tuple(rows * k // shards for k in range(shards + 1))


def _are_bounds(bounds: Any, rows: int) -> bool:
    """Returns whether a value of a plan can be the bounds of shards of `rows` rows."""
    if not isinstance(bounds, list) or len(bounds) < 2 or not all(type(bound) is int for bound in bounds):
        return False
    return sorted(bounds) == bounds and (bounds[0], bounds[-1]) == (0, rows)


def _clear(out: str) -> None:
    """Deletes a data set, complete or not, starting with the files that make it readable. Other files stay."""
    for name in ("dataset_info.json", "features.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(out, name))
    for name in os.listdir(_state(out)):
        if name != "lock":
            os.unlink(_state(out, name))
    for name in os.listdir(out):
        if re.search(r"\.array_record-\d+-of-\d+$", name):
            os.unlink(os.path.join(out, name))


def _files(source: Source) -> list[str]:
    """Returns the files of a source, without those in a bucket."""
    return [os.path.abspath(file) for file in source.files if "://" not in file]


def _fingerprint(source: Source) -> list[Any]:
    """Returns what identifies a source: names, sizes and times of its files, and its image root."""
    about = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in _files(source)]
    return [source.path, source.image_root, len(source), about]


def _bad(notes: list[Note]) -> Counter:
    return sum((Counter(note["bad"]) for note in notes), Counter())


def _counted(bad: Counter) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in bad.most_common())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {part}" for key, part in value.items()) or "as in the files"
    return " ".join(value) if isinstance(value, list) else str(value)


def _parse_size(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", size, re.IGNORECASE)
    if not match or float(match[1]) * UNITS[match[2].upper()] < 1:
        raise UserError(f"--shard-size must be a size such as 256MB, not {size!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _format_size(count: int) -> str:
    unit = next((unit for unit in ("GB", "MB") if count >= UNITS[unit]), "KB")
    return f"{count / UNITS[unit]:,.1f} {unit}"


def _state(out: str, name: str = "") -> str:
    """Returns the path of a file of the unfinished pack."""
    return os.path.join(out, ".pack", name)
