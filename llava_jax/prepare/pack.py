"""`prepare pack`: instruction data of any format, images included, as a TFDS data set of ArrayRecord shards.

A shard contains the rows between two numbers, so the files do not depend on the number of workers or hosts. OUT becomes
a readable data set at the very end, when dataset_info.json is written. The state of an unfinished pack is in OUT/.pack:
the plan (data, options, bounds of the shards), shards in progress, and a note on each finished shard. Hosts share
nothing else: whichever finds all notes at its end completes the data set.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from typing import Any, Literal

from google.protobuf import json_format

from llava_jax.cli import Flag, printable
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, Source, open_mixture
from llava_jax.errors import DISK_FULL_ERRNOS, UserError
from llava_jax.files import read_json
from llava_jax.parallel.cluster import detect_cluster
from llava_jax.prepare.beam import run_pipeline
from llava_jax.prepare.options import (
    DataOptions,
    ImageOptions,
    OutArgument,
    WorkerOptions,
    require_at_least,
)
from llava_jax.prepare.progress import run_tasks
from llava_jax.prepare.shards import SHOWN_BAD_ROWS, Encoding, Examples, ShardWriter, features, write_json

PROBE_ROWS = 100
"""Number of rows that are encoded to estimate how many rows make a shard."""
INFO = "dataset_info.json"
"""Name of the file that makes a folder a data set."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

Note = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(WorkerOptions, ImageOptions, DataOptions):
    """Writes a data set, images included, as a TFDS data set of ArrayRecord shards.

    Training reads OUT at random from any disk or bucket, without a file for every image;
    tfds.builder_from_directory(OUT) opens it. Every row of DATA is written once, in order. A mixture file must take
    every row once an epoch. If a pack is stopped at any moment, the same command continues it; if it is finished,
    the command says so. To have OUT in a bucket, write it to a disk and copy it: gcloud storage cp -r OUT gs://BUCKET
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
    hosts: int | Literal["cluster"] = 1
    """Number of hosts that run this command, each for its share of the shards. All must see DATA, its images and OUT
    under the same paths. With `cluster`, number and position are those of the processes of a training run here."""
    host: int = 0
    """Position of this host, from 0, with --hosts."""
    runner: str = ""
    """Apache Beam runner that writes the shards, instead of --workers: DirectRunner, FlinkRunner, SparkRunner, ... Its
    workers must see DATA, its images and OUT under the same paths. Needs pip install 'llava_jax[beam]'."""
    runner_options: tuple[str, ...] = ()
    """Options of the Beam pipeline, without dashes: direct_num_workers=4."""

    def run(self) -> int:
        self._check_options()
        host, hosts = self._position()
        self._check_folder()
        name, version = self._name()
        mixture = self._open()
        encoding = Encoding(self.image_size, self.image_mode, self.image_format, self.quality, self.exif,
                            self.max_pixels)
        examples, plan = Examples(mixture, encoding), self._plan(mixture, name, version)
        if not os.path.exists(_state(self.out)) and self._is_finished(plan):
            return 0
        with _lock(self.out, host, hosts), _explained(self.out):
            if self._is_finished(plan):  # by another pack, in the meantime
                return 0
            bounds = self._bounds(examples, plan, hosts)
            count = len(bounds) - 1
            files = [f"{name}-{self.split}.array_record-{shard:05}-of-{count:05}" for shard in range(count)]
            writer = ShardWriter(
                examples=examples,
                bounds=bounds,
                files=tuple(os.path.join(self.out, file) for file in files),
                notes=tuple(_state(self.out, f"{shard:05}.json") for shard in range(count)),
            )
            notes = self._write(writer, range(host, count, hosts))
            if file := _changed_file(plan["files"], _file_stamps(mixture)):
                raise UserError(f"{self.out}: {file} has changed meanwhile; delete this folder and start anew")
            if None not in notes:
                self._finish(notes, plan)
        print(printable(self._summary(notes)))
        return 0

    def _check_options(self) -> None:
        if "://" in self.out:
            raise UserError(f"{self.out}: pack writes to a disk; copy that then: gcloud storage cp -r FOLDER URL")
        require_at_least(1, self, "image_size", "shards", "max_pixels")
        require_at_least(0, self, "workers", "host")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}: it must be from 1 to 100")
        for name in ("split", "name"):
            value = getattr(self, name)
            if not re.fullmatch(r"[a-z]\w*", value, re.ASCII | re.IGNORECASE) and (value or name == "split"):
                raise UserError(f"--{name} must be a word of letters, digits and _, not {value!r}")
        _parse_size(self.shard_size)

    def _position(self) -> tuple[int, int]:
        """Returns the position of this host and the number of hosts."""
        host, hosts = self.host, self.hosts
        if hosts == "cluster":
            info = detect_cluster()
            host, hosts = (info.process_id, info.num_processes) if info else (0, 1)
        if not host < hosts:
            raise UserError(f"--host is {host}: with --hosts {hosts} it must be less")
        if hosts > 1 and self.overwrite:
            raise UserError("--overwrite is for one host; delete the folder, then start all hosts")
        if hosts > 1 and self.runner:
            raise UserError("--runner has workers of its own; leave out --hosts")
        return host, hosts

    def _check_folder(self) -> None:
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out}: is a file; give a folder")
        found = set(os.listdir(self.out)) if os.path.isdir(self.out) else set()
        if found and not found & {INFO, ".pack"}:
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

    def _plan(self, mixture: Mixture, name: str, version: str) -> dict[str, Any]:
        """Returns what a pack that continues must have in common with the one before."""
        images = {"size": self.image_size, "mode": self.image_mode, "format": self.image_format,
                  "quality": self.quality} | ({"exif": True} if self.exif else {})
        return {
            "files": _file_stamps(mixture),
            "data": [[source.path, source.image_root, len(source)] for source in mixture.sources],
            "images": images if self.image_size or self.exif else {},
            "shards": self.shards or self.shard_size,
            "name": [name, version, self.split],
            "columns": sorted(features()),
        }

    def _is_finished(self, plan: dict[str, Any]) -> bool:
        """Returns whether the folder contains the data set that this command makes, and says so.

        Raises UserError if it contains another one that may not be overwritten.
        """
        if self.overwrite or not self._is_complete():
            return False
        if read_json(os.path.join(self.out, INFO)).get("description") != self._description(plan):
            raise UserError(f"{self.out}: contains a data set already; give another folder, or --overwrite")
        shutil.rmtree(_state(self.out), ignore_errors=True)
        print(printable(f"{self.out}: is finished; this command has nothing to do (--overwrite packs it anew, as after "
                        "a change of images)"))
        return True

    def _description(self, plan: dict[str, Any]) -> str:
        """Returns the description of the data set, by which the command that made it recognises it.

        It depends on paths and times of the data's files, not of images. Nothing else in the folder does.
        """
        content = json.dumps([plan, self.bad_rows, self.max_pixels], sort_keys=True)
        return f"prepare pack {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _bounds(self, examples: Examples, plan: dict[str, Any], hosts: int) -> tuple[int, ...]:
        """Returns the bounds of the shards of an unfinished pack, or new ones, which are written with the plan.

        Raises UserError if the unfinished pack has another plan.
        """
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
            bounds = _new_bounds(examples, self.shards, _parse_size(self.shard_size))
            if hosts == 1:  # another host may have written the same plan in the meantime, and shards
                _clear(self.out)
            write_json(path, plan | {"bounds": bounds})
            return bounds
        if file := _changed_file(before.get("files"), plan["files"]):
            raise UserError(f"{self.out}: contains part of a pack, and {file} has changed since; give another folder, "
                            "or --overwrite")
        for key in changed:
            seen = f"{key}: {_text(before.get(key))} before, {_text(plan[key])} now"
            seen = "data or image root" if key in ("files", "data") else seen
            raise UserError(f"{self.out}: contains part of a pack with other {seen}; give the same to continue, "
                            "another folder, or --overwrite")
        return tuple(before["bounds"])

    def _write(self, writer: ShardWriter, shards: range) -> list[Note | None]:
        """Writes the unfinished ones of `shards`. Returns the notes on all shards, None where there is none yet.

        Raises UserError if rows are bad, also those of other hosts.
        """
        skip = self.bad_rows == "skip"
        before = {shard: writer.finished(shard) for shard in shards}
        # A shard with bad rows is written again, because they may have been mended since.
        missing = [shard for shard, note in before.items() if note is None or (note["bad"] and not skip)]
        rows = [writer.rows(shard) for shard in missing]
        if self.runner:
            run_pipeline(writer, missing, self.runner, self.runner_options)
        else:
            done = sum(map(writer.rows, shards)) - sum(rows)
            for _ in run_tasks(writer, missing, rows, self.workers, done, writes=True):
                pass
        notes = [writer.finished(shard) for shard in range(len(writer.files))]
        found = [note for note in notes if note is not None]
        bad = _bad(found)
        if bad and not skip:
            total = sum(writer.rows(shard) for shard, note in enumerate(notes) if note is not None)
            first = "; ".join([line for note in found for line in note["shown"]][:SHOWN_BAD_ROWS])
            raise UserError(
                f"{bad.total():,} of {total:,} rows cannot be used ({_counted(bad)}); mend them (prepare check lists "
                f"all) or give --bad-rows skip; the first: {first}"
            )
        return notes

    def _finish(self, notes: list[Note], plan: dict[str, Any]) -> None:
        """Makes the folder a data set, which several hosts may do at the same time."""
        if not any(note["rows"] for note in notes):
            raise UserError(f"{self.data}: none of its rows can be used; the first: {notes[0]['shown'][0]}")
        split = {
            "name": self.split,
            "shardLengths": [str(note["rows"]) for note in notes],
            "numBytes": str(sum(note["bytes"] for note in notes)),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        name, version, _ = plan["name"]
        info = {"name": name, "version": version, "fileFormat": "array_record", "disableShuffling": True,
                "description": self._description(plan), "splits": [split]}
        types = json_format.MessageToDict(features().to_proto())
        try:
            for file, content in (("features.json", types), (INFO, info)):
                write_json(os.path.join(self.out, file), content, _state(self.out, file))
        except FileNotFoundError:  # another host has done this, and deleted the state
            if not self._is_complete():
                raise
        shutil.rmtree(_state(self.out), ignore_errors=True)

    def _is_complete(self) -> bool:
        return os.path.exists(os.path.join(self.out, INFO))

    def _summary(self, notes: list[Note | None]) -> str:
        if missing := notes.count(None):
            rest = f"{missing:,} of {len(notes):,} shards are missing; the last host completes the data set"
            return f"{self.out}: this host is done; " + ("so are the others" if self._is_complete() else rest)
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
def _lock(out: str, host: int, hosts: int) -> Iterator[None]:
    """Makes sure that one process at a time, or one of each host, writes to the folder, which is created if missing."""
    locks = {"lock": fcntl.LOCK_EX} if hosts == 1 else {"lock": fcntl.LOCK_SH, f"lock-{host}": fcntl.LOCK_EX}
    with contextlib.ExitStack() as stack:
        for name, kind in locks.items():
            while True:
                os.makedirs(_state(out), exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # deleted by a pack that has just finished
                    handle = os.open(_state(out, name), os.O_CREAT | os.O_RDWR)
                    stack.callback(os.close, handle)
                    try:
                        fcntl.flock(handle, kind | fcntl.LOCK_NB)
                    except BlockingIOError:
                        raise UserError(f"{out}: another pack is writing to this folder; wait for it, or give another "
                                        "folder") from None
                    except OSError:  # a file system without locks
                        pass
                    if os.path.samestat(os.fstat(handle), os.stat(_state(out, name))):
                        break
        yield


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


def _new_bounds(examples: Examples, shards: int | None, size: int) -> tuple[int, ...]:
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
    for name in (INFO, "features.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(out, name))
    for name in os.listdir(_state(out)):
        if not name.startswith("lock"):
            os.unlink(_state(out, name))
    for name in os.listdir(out):
        if re.search(r"\.array_record-\d+-of-\d+$", name):
            os.unlink(os.path.join(out, name))


def _files(source: Source) -> list[str]:
    """Returns the files of a source, without those in a bucket."""
    return [os.path.abspath(file) for file in source.files if "://" not in file]


def _file_stamps(mixture: Mixture) -> dict[str, list[int]]:
    """Returns size and time of every file of the data."""
    files = {file: os.stat(file) for source in mixture.sources for file in _files(source) if os.path.exists(file)}
    return {file: [status.st_size, status.st_mtime_ns] for file, status in files.items()}


def _changed_file(before: Any, now: dict[str, list[int]]) -> str | None:
    """Returns a file whose size or time are not those before, if there is one."""
    before = before if isinstance(before, dict) else {}
    return next((file for file in now if before.get(file, now[file]) != now[file]), None)


def _bad(notes: list[Note]) -> Counter:
    return sum((Counter(note["bad"]) for note in notes), Counter())


def _counted(bad: Counter) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in bad.most_common())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {part}" for key, part in sorted(value.items())) or "as in the files"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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
