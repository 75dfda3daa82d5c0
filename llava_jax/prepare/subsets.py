"""Subsets of a data set, made reproducibly: parts that share no image, samples, mixtures.

Rows are ranked by a hash of the seed and what they hold, not by their place: a sample of 100 rows is contained in the
sample of 1,000 with the same seed, and rows that are added to a file move only the rows at the edges.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from llava_jax.cli import printable
from llava_jax.data.records import REASONS, BadRow
from llava_jax.data.sources import Mixture, Source, open_mixture
from llava_jax.data.workers import Pool
from llava_jax.errors import UserError, user_path
from llava_jax.files import making, parse_json
from llava_jax.prepare.writing import check_outputs, common_root, is_path, map_images, move_images, write_rows

CHUNK = 256  # rows that a worker reads together


@dataclasses.dataclass(frozen=True)
class Ranker:
    """Rows by their numbers through all sources -> their places in the order that a seed makes."""

    sources: tuple[Source, ...]
    seed: int
    by: Literal["row", "image"]

    def __call__(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Hashes of 64 bits, and the number of the row that each belongs to: one for a row, or for each of its images.

        Raises UserError, one line, for a row that cannot be read.
        """
        rows, hashes, root = [], [], common_root(self.sources)
        for number, source, row in read(self.sources, numbers):
            contents = _images(row, source, root) if self.by == "image" else []
            for content in contents or [json.dumps(row, sort_keys=True, default=_plain)]:
                hashes.append(self._hash(content))
                rows.append(number)
        return rows, hashes

    def _hash(self, content: str | bytes) -> int:
        content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=str(self.seed).encode()).digest(), "big")


def sample_rows(hashes: np.ndarray, count: int) -> np.ndarray:
    """Which `count` of the rows with these hashes to take, in their order."""
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def split_rows(rows: np.ndarray, hashes: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """The part of every row; `targets` rows in each part, as nearly as the groups allow.

    `hashes[k]` belongs to row `rows[k]`. Rows that share a hash, directly or over other rows, are a group and stay in
    one part. Groups are dealt to the parts in the order of their least hash.
    """
    groups = _connected(rows, hashes, sum(targets))
    least = np.full(len(groups), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, groups[rows], hashes)
    names, sizes = np.unique(groups, return_counts=True)
    order = np.argsort(least[names], kind="stable")
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    parts = np.zeros(len(groups), np.int64)
    parts[names[order]] = np.searchsorted(np.cumsum(targets)[:-1], middles, side="right")
    return parts[groups]


def _connected(rows: np.ndarray, hashes: np.ndarray, count: int) -> np.ndarray:
    """The lowest row of the group that each row belongs to."""
    _, images = np.unique(hashes, return_inverse=True)
    groups = np.arange(count)
    while True:
        lowest = np.full(images.max(initial=-1) + 1, count)
        np.minimum.at(lowest, images, groups[rows])
        joined = groups.copy()
        np.minimum.at(joined, rows, lowest[images])
        joined = joined[joined]  # a row's group has moved on itself; without this, long chains take as many rounds
        if np.array_equal(joined, groups):
            return groups
        groups = joined


def mix_rows(hashes: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Row numbers through all sources, `counts` of each source, in a mixed order.

    A source that gives more rows than it has gives each as often as any other, or once more.
    """
    starts = np.cumsum([0, *map(len, hashes)])
    taken = [start + np.resize(np.argsort(own, kind="stable"), count)
             for own, count, start in zip(hashes, counts, starts, strict=False)]
    numbers = np.concatenate(taken)
    keys = np.concatenate(hashes)[numbers]
    # Equal rows, and the copies of one, get keys of their own: the same key would put them side by side.
    order = np.argsort(keys, kind="stable")
    fresh = np.append(True, keys[order][1:] != keys[order][:-1])
    place = np.arange(len(keys))
    copy = np.empty(len(keys), np.uint64)
    copy[order] = place - np.maximum.accumulate(np.where(fresh, place, 0))
    return numbers[np.argsort(_scramble(keys + _scramble(copy)), kind="stable")]


def _scramble(x: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that keeps no order (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def read(sources: Sequence[Source], numbers: Sequence[int]) -> Iterator[tuple[int, Source, Any]]:
    """The rows of these numbers as they are stored. Raises UserError, one line, for a row that cannot be read."""
    starts = np.cumsum([0, *map(len, sources)])
    for number in numbers:
        which = int(np.searchsorted(starts, number, side="right")) - 1
        try:
            yield int(number), sources[which], sources[which].row(int(number - starts[which]))
        except BadRow as bad:
            advice = "leave it out with --exclude FILE, where prepare check --bad-rows FILE has named it"
            raise UserError(f"{bad}; {advice}") from None


def _rank(sources: Sequence[Source], numbers: np.ndarray, seed: int, by: str, workers: int | None) -> tuple:
    """Hashes of the rows, uint64, and the index into `numbers` that each belongs to."""
    ranker = Ranker(tuple(sources), seed, by)
    chunks = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
    rows, hashes = [], []
    with (Pool(ranker, (os.cpu_count() or 1) if workers is None else workers) as pool,
          tqdm(total=len(numbers), desc="reading", unit="rows", disable=not sys.stderr.isatty()) as bar):
        for chunk, (own, found) in zip(chunks, pool.map(chunks), strict=True):
            rows.append(np.searchsorted(numbers, np.array(own, np.int64)))
            hashes.append(np.array(found, np.uint64))
            bar.update(len(chunk))
    return np.concatenate(rows), np.concatenate(hashes)


def _kept(mixture: Mixture, exclude: str, kinds: Sequence[str]) -> np.ndarray:
    """The numbers of the rows for which a file of findings has none of these kinds."""
    keep = np.ones(mixture.starts[-1], bool)
    if not exclude:
        return np.flatnonzero(keep)
    from llava_jax.prepare.findings import KINDS

    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"--exclude-kinds {', '.join(unknown)}: there is no such kind; there are {', '.join(KINDS)}")
    places = [(os.path.abspath(source.path), start, len(source))  # a mixture may read one file twice
              for source, start in zip(mixture.sources, mixture.starts, strict=False)]
    for line, (path, row, kind) in _read_findings(exclude):
        own = os.path.abspath(path)
        found = [start + row - 1 for source, start, size in places if source == own and 1 <= row <= size]
        if not found:
            raise UserError(f"{exclude}, line {line}: there is no row {row} of {path} in {mixture.name}")
        keep[found] &= kind is not None and kind not in kinds
    if not keep.any():
        raise UserError(f"{mixture.name}: {exclude} leaves no row")
    print(f"{exclude}: {np.sum(~keep):,} of {len(keep):,} rows are left out")
    return np.flatnonzero(keep)


def _read_findings(path: str) -> Iterator[tuple[int, tuple[str, int, str | None]]]:
    """The number of each line of a file of findings, with the source, row and kind that it names."""
    with user_path(path), open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            try:
                found = parse_json(text.decode("utf-8-sig" if line == 1 else "utf-8"), path)
                source, row, kind = found["source"], found["row"], found.get("kind")
                fits = isinstance(source, str) and type(row) is int and isinstance(kind, str | None)
            except (UserError, UnicodeDecodeError, KeyError):
                fits = False
            if not fits or "\0" in source:
                raise UserError(f"{path}, line {line}: not what prepare check --bad-rows writes")
            yield line, (source, row, kind)


def _write(sources: Sequence[Source], numbers: np.ndarray, outputs: Sequence[str], parts: np.ndarray) -> None:
    """Writes rows to the outputs that `parts` says, and tells the user."""
    root = common_root(sources)
    if len(formats := {source.key for source in sources}) > 1:
        raise UserError(f"a file holds rows of one format, and these have {' and '.join(sorted(formats))}; "
                         "make a mixture file, which names several files (prepare mix)")

    def rows() -> Iterator[tuple[int, Any]]:
        found = tqdm(read(sources, numbers), "writing", len(numbers), unit="rows", disable=not sys.stderr.isatty())
        for part, (_, source, row) in zip(parts.tolist(), found, strict=True):
            yield part, move_images(row, source, root)

    write_rows(rows, outputs, sources)
    for which, output in enumerate(outputs):
        print(f"{output}: {np.sum(parts == which):,} rows")
    if root:
        print(printable(f"to be read with --image-root {root}"))


def _images(row: Any, source: Source, root: str) -> list[str | bytes]:
    """The row's images; paths are relative to the common root, so that they are the same wherever the data lie."""
    found = []
    map_images(row, lambda image: found.append(image) or image)
    return [os.path.relpath(os.path.join(source.image_root, image), root) if root and is_path(image) else image
            for image in found]


def _plain(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)


def _inputs(data: Sequence[str], mixture: Mixture) -> list[str]:
    return [*data, *(source.path for source in mixture.sources)]


@dataclasses.dataclass(frozen=True)
class Split:
    """Divide a data set into parts, such as one to train and one to validate on, that share no image.

    Writes OUT_DIR/train.json and so on. Of a mixture file every row is taken once."""

    data: tyro.conf.Positional[str]
    """data in any format, or a mixture file"""
    out_dir: tyro.conf.Positional[str]
    """folder for the parts"""
    parts: str = "train=0.98,validation=0.02"
    """names with shares (0.02) or numbers of rows (500); one of them may be rest"""
    by: Literal["image", "row"] = "image"
    """keep all rows about one image in one part, or look at rows alone"""
    seed: int = 0
    """of the order in which rows are dealt out"""
    exclude: str = ""
    """leave out rows that this file names; prepare check --bad-rows writes it"""
    exclude_kinds: tuple[str, ...] = REASONS
    """kinds of findings in that file for which a row is left out; training could not use these"""
    image_root: str = ""
    """folder to which the image paths are relative; the data file's own if empty"""
    format: Literal["json", "jsonl", "parquet"] = "json"
    """of the parts"""
    overwrite: bool = False
    """replace parts that exist"""
    workers: int | None = None
    """processes that read rows; by default one for each core, 0 for none besides this one"""

    def run(self) -> int:
        mixture = open_mixture(self.data, self.image_root)
        shares = _read_parts(self.parts)
        outputs = [os.path.join(self.out_dir, f"{name}.{self.format}") for name in shares]
        check_outputs(outputs, _inputs([self.data], mixture), self.overwrite)
        numbers = _kept(mixture, self.exclude, self.exclude_kinds)
        targets = _targets(shares, len(numbers), self.parts)
        rows, hashes = _rank(mixture.sources, numbers, self.seed, self.by, self.workers)
        if self.by == "row":  # equal rows need not stay together
            parts = np.empty(len(numbers), np.int64)
            parts[np.argsort(hashes, kind="stable")] = np.repeat(np.arange(len(targets)), targets)
        else:
            parts = split_rows(rows, hashes, targets)
        for which, name in enumerate(shares):
            if not np.any(parts == which):
                raise UserError(f"--parts {self.parts}: {name} would get no row of {len(numbers):,}; give it more, or "
                                 "--by row if most rows are about the same images")
        _write(mixture.sources, numbers, outputs, parts)
        return 0


def _read_parts(text: str) -> dict[str, str]:
    shares = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.-]+)=(rest|\d+|\d*\.\d+)\s*", part)
        if not match or match[1] in shares:
            raise UserError(f"--parts {text}: {part!r} must be a new name with its share, as in train=0.98, "
                             "validation=500 or train=rest")
        shares[match[1]] = match[2]
    if list(shares.values()).count("rest") > 1:
        raise UserError(f"--parts {text}: only one part can be the rest")
    return shares


def _targets(shares: dict[str, str], total: int, text: str) -> list[int]:
    """Numbers of rows, which sum to `total`."""
    counts = {name: float(share) * ("." in share and total or 1) for name, share in shares.items() if share != "rest"}
    left = total - sum(counts.values())
    if left < -1e-6 * total or (len(counts) == len(shares) and left > 1e-6 * total):
        raise UserError(f"--parts {text}: these are {sum(counts.values()):,.0f} of {total:,} rows; shares must sum to "
                         "1, or one part be the rest, as in train=rest,validation=0.02")
    edges = np.round(np.cumsum([0, *(counts.get(name, left) for name in shares)])).astype(int)
    return np.diff(edges).tolist()


@dataclasses.dataclass(frozen=True)
class Sample:
    """Take a number or a share of the rows of a data set, at random but reproducibly.

    A sample is contained in any larger one with the same seed. Of a mixture file every row is taken at most once."""

    data: tyro.conf.Positional[str]
    """data in any format, or a mixture file"""
    out: tyro.conf.Positional[str]
    """file to write: .json, .jsonl or .parquet"""
    count: int = 0
    """rows to take"""
    fraction: float = 0.0
    """share of the rows to take; 1 takes all, in their order"""
    seed: int = 0
    """of the choice"""
    exclude: str = ""
    """leave out rows that this file names; prepare check --bad-rows writes it"""
    exclude_kinds: tuple[str, ...] = REASONS
    """kinds of findings in that file for which a row is left out; training could not use these"""
    image_root: str = ""
    """folder to which the image paths are relative; the data file's own if empty"""
    overwrite: bool = False
    """replace a file that exists"""
    workers: int | None = None
    """processes that read rows; by default one for each core, 0 for none besides this one"""

    def run(self) -> int:
        if (self.count > 0) == (self.fraction > 0) or self.count < 0 or not 0 <= self.fraction <= 1:
            raise UserError("give either --count, of at least 1, or --fraction, of at most 1")
        mixture = open_mixture(self.data, self.image_root)
        check_outputs([self.out], _inputs([self.data], mixture), self.overwrite)
        numbers = _kept(mixture, self.exclude, self.exclude_kinds)
        count = self.count or round(self.fraction * len(numbers))
        if not 0 < count <= len(numbers):
            raise UserError(f"{self.data}: {count:,} rows are to be taken of {len(numbers):,}")
        _, hashes = _rank(mixture.sources, numbers, self.seed, "row", self.workers)
        chosen = numbers[sample_rows(hashes, count)]
        _write(mixture.sources, chosen, [self.out], np.zeros(len(chosen), int))
        return 0


@dataclasses.dataclass(frozen=True)
class Mix:
    """Put several data sets together: a mixture file, which names them, or one file with all rows.

    A part is PATH, or PATH with settings after commas: `a.json b.json,epochs=2 c.parquet,count=5000,image_root=images`.
    `epochs` is how often, or which share of, its rows come in an epoch, `count` how many rows; `weight`, which all
    parts have or none, is its share of the whole. Training and every prepare command read a mixture file."""

    out: tyro.conf.Positional[str]
    """mixture file to write: .json; with --materialise .json, .jsonl or .parquet"""
    parts: tyro.conf.Positional[tuple[str, ...]]
    """PATH[,epochs=N|,count=N|,weight=N][,image_root=DIR] ..."""
    materialise: bool = False
    """write the rows of one epoch themselves, mixed, instead of a file that names the parts"""
    seed: int = 0
    """of the choice and order of the rows, with --materialise"""
    overwrite: bool = False
    """replace a file that exists"""
    workers: int | None = None
    """processes that read rows, with --materialise; by default one for each core, 0 for none besides this one"""

    def run(self) -> int:
        if not self.materialise and not self.out.endswith(".json"):
            raise UserError(f"{self.out}: the name of a mixture file must end in .json")
        base = os.path.dirname(os.path.abspath(self.out))
        parts = [_read_part(part, base) for part in self.parts]
        if not parts:
            raise UserError("mix needs at least one part")
        os.makedirs(base, exist_ok=True)
        with making(self.out) as temporary:
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    json.dump({"mixture": parts}, file, indent=2, ensure_ascii=False)
                    file.write("\n")
                mixture = open_mixture(temporary)  # checks parts and settings
                check_outputs([self.out], _inputs([], mixture), self.overwrite)
                if not self.materialise:
                    os.replace(temporary, self.out)
            except UserError as error:
                raise UserError(str(error).replace(temporary, self.out)) from None
        for source, count in zip(mixture.sources, mixture.counts, strict=True):
            print(printable(f"{os.path.relpath(source.path)}: {count:,} rows of {len(source):,} in an epoch"))
        if self.materialise:
            self._materialise(mixture)
        else:
            print(f"{self.out}: {sum(mixture.counts):,} rows in an epoch")
        return 0

    def _materialise(self, mixture: Mixture) -> None:
        _, hashes = _rank(mixture.sources, np.arange(mixture.starts[-1]), self.seed, "row", self.workers)
        own = [hashes[start:stop] for start, stop in zip(mixture.starts, mixture.starts[1:], strict=False)]
        numbers = mix_rows(own, mixture.counts)
        _write(mixture.sources, numbers, [self.out], np.zeros(len(numbers), int))


def _read_part(text: str, base: str) -> dict[str, Any]:
    """A part of a mixture file, with paths relative to the folder `base` that it is in."""
    path, *settings = re.split(r",(?=(?:epochs|count|weight|image_root)=)", text)
    part = {"path": path if "://" in path else os.path.relpath(path, base)}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in part:
            raise UserError(f"part {text}: {key} is given twice")
        if key == "image_root":
            part[key] = os.path.relpath(value, base)
            continue
        try:
            part[key] = int(value) if re.fullmatch(r"\d+", value) else float(value)
        except ValueError:
            raise UserError(f"part {text}: {key} must be a number, not {value!r}") from None
    return part
