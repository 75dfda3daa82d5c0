"""`prepare pack`: instruction data of any format as a TFDS data set, images and all, in ArrayRecord shards.

A shard holds the rows from one number to another whoever writes it, so the files are the same with any number of
workers. OUT is no readable data set until all is done: dataset_info.json comes last. What is under way lies in
OUT/.pack: the plan (what is packed, how, where shards begin), shards that are being written, and the notes on finished
ones. A pack that was stopped goes on from there.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from llava_jax.cli import printable
from llava_jax.config import Data
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Source, open_mixture
from llava_jax.data.workers import Pool
from llava_jax.errors import FULL, UserError
from llava_jax.files import read_json
from llava_jax.prepare.shards import FEATURES, SHOWN, Encoding, Examples, ShardWriter, write_json

SAMPLED = 100  # rows that are tried to tell how many make a shard
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Pack:
    """Write a data set, images included, as a TFDS data set of ArrayRecord shards.

    Training reads OUT at random from any disk or bucket, without a file for every image;
    tfds.builder_from_directory(OUT) opens it. Every row of DATA is written once, in order; of a mixture file, which may
    take its sources neither more nor less often, source by source. Stopped at any moment, the same command goes on
    where it was. To have OUT in a bucket, write it to a disk and copy it: gcloud storage cp -r OUT gs://BUCKET
    """

    data: tyro.conf.Positional[str]
    """Data file of any format, or a mixture file."""
    out: tyro.conf.Positional[str]
    """Folder to write. If it is called FOLDER/NAME/1.0.0, tfds.data_source("NAME", data_dir=FOLDER) finds it too."""
    image_root: str = ""
    """Folder that image paths are relative to; the data file's own by default."""
    image_size: int | None = None
    """Store of every larger image only the square of this size that the model sees (336 for LLaVA-1.5): smaller, and
    faster to read. By default image files are kept byte for byte."""
    image_mode: Literal["pad", "square"] = "pad"
    """With --image-size, the model's way to a square: pad fills up (LLaVA-1.5), square crops the centre."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """With --image-size: png changes no pixel of what the model sees, but saves little."""
    quality: int = 95
    """With --image-size: JPEG quality, 1 to 100."""
    exif: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Turn images as their EXIF orientation says; these are written anew, as --image-format."""
    max_pixels: int = Data.max_pixels
    """Pixels of an image at most; a larger one is a bad row."""
    shard_size: str = "256MB"
    """About how large shards become."""
    shards: int | None = None
    """Number of shards, instead of their size."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes, each of which writes one shard at a time; 0: this one."""
    split: str = "train"
    """What the rows are called in the data set."""
    name: str = ""
    """Name of the data set; that of the folder by default."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used: error ends without a data set, skip leaves it out and counts it."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Begin anew where OUT holds a data set or part of one."""

    def run(self) -> int:
        self._check_options()
        self._check_folder()
        name, version = self._name()
        mixture = open_mixture(self.data, self.image_root)
        if mixture.counts != tuple(map(len, mixture.sources)):
            raise UserError(
                f"{self.data}: pack writes every row once, but this mixture takes some more or less often; write it "
                "out first (prepare mix --materialise), or pack its sources and train on a mixture of them"
            )
        for source in mixture.sources:
            inside = os.path.realpath(self.out) + os.sep
            if any(os.path.realpath(file).startswith(inside) for file in _files(source)):
                raise UserError(f"{self.out}: {source.path} lies in this folder; give another one")
        encoding = Encoding(self.image_size, self.image_mode, self.image_format, self.quality, self.exif,
                            self.max_pixels)
        examples = Examples(mixture, encoding)
        with _lock(self.out), _explained(self.out):
            self._check_folder()  # another pack may have ended in the meantime
            bounds = self._begin(examples, name, version)
            count = len(bounds) - 1
            files = [f"{name}-{self.split}.array_record-{shard:05}-of-{count:05}" for shard in range(count)]
            write = ShardWriter(
                examples=examples,
                bounds=bounds,
                files=tuple(os.path.join(self.out, file) for file in files),
                notes=tuple(_inner(self.out, f"{shard:05}.json") for shard in range(count)),
            )
            notes = self._write(write)
            self._finish(notes, name, version)
        print(printable(self._summary(notes)))
        return 0

    def _check_options(self) -> None:
        if "://" in self.out:
            raise UserError(f"{self.out}: pack writes to a disk; copy that then: gcloud storage cp -r FOLDER URL")
        for name, least in (("image_size", 1), ("shards", 1), ("workers", 0), ("max_pixels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, not {self.quality}")
        for name in ("split", "name"):
            value = getattr(self, name)
            if not re.fullmatch(r"[a-z]\w*", value, re.ASCII | re.IGNORECASE) and (value or name == "split"):
                raise UserError(f"--{name} must be a word of letters, digits and _, not {value!r}")
        _bytes(self.shard_size)

    def _check_folder(self) -> None:
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out}: is a file; give a folder")
        found = set(os.listdir(self.out)) if os.path.isdir(self.out) else set()
        if "dataset_info.json" in found and not self.overwrite:
            raise UserError(f"{self.out}: holds a data set already; give another folder, or --overwrite")
        if found and not found & {"dataset_info.json", ".pack"}:
            raise UserError(f"{self.out}: holds other things ({min(found)}); give an empty folder or a new one")

    def _name(self) -> tuple[str, str]:
        """Name and version of the data set."""
        parent, last = os.path.split(os.path.abspath(self.out))
        version = last if re.fullmatch(r"\d+\.\d+\.\d+", last) else ""
        called = os.path.basename(parent) if version else last
        name = re.sub(r"\W+", "_", called, flags=re.ASCII).strip("_").lower()
        return self.name or (name if name[:1].isalpha() else f"data_{name}".rstrip("_")), version or "1.0.0"

    def _images(self) -> dict[str, Any]:
        """The options that change images; none if they are kept byte for byte."""
        if not (self.image_size or self.exif):
            return {}
        chosen = {"size": self.image_size, "mode": self.image_mode, "format": self.image_format,
                  "quality": self.quality}
        return chosen | ({"exif": True} if self.exif else {})

    def _begin(self, examples: Examples, name: str, version: str) -> tuple[int, ...]:
        """The bounds of the shards, from the plan of the pack that goes on, or from a new one, which is written.

        UserError if the pack that was begun is another.
        """
        plan = {
            "data": [_fingerprint(source) for source in examples.mixture.sources],
            "images": self._images(),
            "shards": self.shards or self.shard_size,
            "name": [name, version, self.split],
            "features": hashlib.sha256(json.dumps(FEATURES).encode()).hexdigest()[:16],
        }
        path = _inner(self.out, "plan.json")
        begun, damage = self._read_plan(path)
        same = all(now == begun.get(key) for key, now in plan.items())
        if same and not _are_bounds(begun.get("bounds"), len(examples)):
            damage = f"{path}: bounds is damaged"
        if damage and not self.overwrite:
            raise UserError(f"{damage}; give --overwrite to begin anew")
        if not begun or self.overwrite and (damage or not same):
            _clear(self.out)
            bounds = _bounds(examples, self.shards, _bytes(self.shard_size))
            write_json(path, plan | {"bounds": bounds})
            return bounds
        for key, now in plan.items():
            if now != begun.get(key):
                seen = f": {_shown(begun.get(key))} before, {_shown(now)} now" if key != "data" else " or image root"
                raise UserError(
                    f"{self.out}: holds part of a pack with other {key}{seen}; give the same to go on, another folder, "
                    "or --overwrite"
                )
        for file in glob.glob(_inner(glob.escape(self.out), "*.json-*")):  # shards that were being written
            os.unlink(file)
        return tuple(begun["bounds"])

    def _read_plan(self, path: str) -> tuple[dict[str, Any], str]:
        """The plan of the pack that was begun, {} if there is none, and what is wrong with its file."""
        if not os.path.exists(path):
            return {}, ""
        try:
            return read_json(path), ""
        except UserError as error:
            return {}, str(error)

    def _write(self, write: ShardWriter) -> list[dict[str, Any]]:
        """Writes the shards that are not yet finished. Returns the notes on all; UserError if rows are bad."""
        skip = self.bad_rows == "skip"
        notes = [write.finished(shard) for shard in range(len(write.files))]
        # What is bad may have been mended since.
        missing = [shard for shard, note in enumerate(notes) if note is None or (note["bad"] and not skip)]
        total = write.bounds[-1]
        done = total - sum(write.bounds[shard + 1] - write.bounds[shard] for shard in missing)
        with Pool(write, min(self.workers, len(missing)), writes=True) as pool:
            bar = tqdm(total=total, initial=done, unit=" rows", disable=not sys.stderr.isatty())
            with bar, _stopping_at_once():
                for shard, note in zip(missing, pool.map(missing), strict=True):
                    notes[shard] = note
                    bar.update(write.bounds[shard + 1] - write.bounds[shard])
        bad = _bad(notes)
        if bad and not skip:
            first = "; ".join([line for note in notes for line in note["shown"]][:SHOWN])
            raise UserError(
                f"{bad.total():,} of {total:,} rows cannot be used ({_counted(bad)}); mend them (prepare check lists "
                f"all) or give --bad-rows skip; the first: {first}"
            )
        return notes

    def _finish(self, notes: list[dict[str, Any]], name: str, version: str) -> None:
        if not any(note["rows"] for note in notes):
            raise UserError(f"{self.data}: none of its rows can be used; the first: {notes[0]['shown'][0]}")
        split = {
            "name": self.split,
            "shardLengths": [str(note["rows"]) for note in notes],
            "numBytes": str(sum(note["bytes"] for note in notes)),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        info = {"name": name, "version": version, "fileFormat": "array_record", "disableShuffling": True}
        write_json(os.path.join(self.out, "features.json"), FEATURES)
        write_json(os.path.join(self.out, "dataset_info.json"), info | {"splits": [split]})
        shutil.rmtree(_inner(self.out))

    def _summary(self, notes: list[dict[str, Any]]) -> str:
        total = {name: sum(note[name] for note in notes) for name in ("rows", "images", "read", "kept", "size")}
        held = f"{total['rows']:,} rows with {total['images']:,} images"
        lines = [f"{self.out}: {held} in {len(notes):,} shards, {_size(total['size'])}"]
        if self.image_size and total["images"]:
            how = "png" if self.image_format == "png" else f"jpeg {self.quality}"
            ratio = f"{total['read'] / total['kept']:.2f} times smaller ({self.image_mode} {self.image_size}, {how})"
            lines.append(f"images: {_size(total['read'])} before, {_size(total['kept'])} now, {ratio}")
        if bad := _bad(notes):
            lines.append(f"left out: {bad.total():,} rows ({_counted(bad)})")
        return "\n".join(lines)


@contextlib.contextmanager
def _lock(out: str) -> Iterator[None]:
    """Lets one process at a time write to the folder, which is made if need be. A killed process holds no lock."""
    os.makedirs(_inner(out), exist_ok=True)
    handle = os.open(_inner(out, "lock"), os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samestat(os.fstat(handle), os.stat(_inner(out, "lock")))
        except (BlockingIOError, FileNotFoundError):  # locked; or deleted by a pack that has ended just now
            alone = False
        if not alone:
            raise UserError(f"{out}: another pack is writing to this folder; wait for it, or give another folder")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(out: str) -> Iterator[None]:
    """Says of a full disk or a dead worker how far the pack has come, and that it goes on."""
    try:
        yield
    except (OSError, BrokenExecutor) as error:
        done = len(glob.glob(_inner(glob.escape(out), "*[0-9].json")))
        note = f"{done} shards are finished, and the same command goes on from there"
        if isinstance(error, BrokenExecutor):
            raise RuntimeError(f"{out}: a worker process died (was it killed for its memory?); {note}") from error
        # A worker's error comes as ArrayRecord's text, without a code.
        if full := [os.strerror(code) for code in FULL if code == error.errno or os.strerror(code) in str(error)]:
            raise UserError(f"{out}: {full[0]}; make room; {note}") from error
        error.add_note(f"{out}: {note}")
        raise


@contextlib.contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the program without waiting for the workers, which end with it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)


def _bounds(examples: Examples, shards: int | None, size: int) -> tuple[int, ...]:
    """The number of each shard's first row, and that of rows: so many shards, or shards of about `size` bytes."""
    rows = len(examples)
    if shards is None:
        tried, sizes = min(rows, SAMPLED), []
        for k in range(tried):
            with contextlib.suppress(BadRow):
                sizes.append(len(examples.load(rows * k // tried)[0]))
        shards = -(-rows * sum(sizes) // (max(len(sizes), 1) * size))
    shards = min(max(shards, 1), rows)
    return tuple(rows * k // shards for k in range(shards + 1))


def _are_bounds(bounds: Any, rows: int) -> bool:
    """Whether a value of a plan can be the bounds of shards of so many rows."""
    if not isinstance(bounds, list) or len(bounds) < 2 or not all(type(bound) is int for bound in bounds):
        return False
    return sorted(bounds) == bounds and (bounds[0], bounds[-1]) == (0, rows)


def _clear(out: str) -> None:
    """Deletes a data set or what there is of one, first what makes it readable. Other files stay."""
    for name in ("dataset_info.json", "features.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(out, name))
    for name in os.listdir(_inner(out)):
        if name != "lock":
            os.unlink(_inner(out, name))
    for name in os.listdir(out):
        if re.search(r"\.array_record-\d+-of-\d+$", name):
            os.unlink(os.path.join(out, name))


def _files(source: Source) -> list[str]:
    """The files of a source, but for those in a bucket."""
    return [os.path.abspath(file) for file in source.files if "://" not in file]


def _fingerprint(source: Source) -> list[Any]:
    """What tells whether a source is the one of before: its files' names, sizes and times, and its image root."""
    about = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in _files(source)]
    return [source.path, source.image_root, len(source), about]


def _bad(notes: list[dict[str, Any]]) -> Counter:
    return sum((Counter(note["bad"]) for note in notes), Counter())


def _counted(bad: Counter) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in bad.most_common())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {part}" for key, part in value.items()) or "as in the files"
    return " ".join(value) if isinstance(value, list) else str(value)


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", size, re.IGNORECASE)
    if not match or float(match[1]) * UNITS[match[2].upper()] < 1:
        raise UserError(f"--shard-size must be a size such as 256MB, not {size!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _size(count: int) -> str:
    unit = next((unit for unit in ("GB", "MB") if count >= UNITS[unit]), "KB")
    return f"{count / UNITS[unit]:,.1f} {unit}"


def _inner(out: str, name: str = "") -> str:
    return os.path.join(out, ".pack", name)
