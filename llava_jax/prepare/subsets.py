"""`prepare split`, `prepare sample` and `prepare mix`: subsets and mixtures of data sets, made reproducibly."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from llava_jax.cli import Flag, printable
from llava_jax.data.records import REASONS
from llava_jax.data.sources import Mixture, open_mixture
from llava_jax.errors import UserError, user_path
from llava_jax.files import parse_json, temporary_path
from llava_jax.prepare.options import DataOptions, OutArgument, WorkerOptions
from llava_jax.prepare.ranking import mix_rows, rank, read_rows, sample_rows, split_rows
from llava_jax.prepare.writing import check_outputs, common_root, move_images, write_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions(WorkerOptions, DataOptions):
    """Says which rows a command selects from, and how."""

    exclude: str = ""
    """File of findings of `prepare check --bad-rows`. Its rows are left out."""
    exclude_kinds: tuple[str, ...] = REASONS
    """Kinds of findings for which --exclude leaves a row out; default: the kinds of unusable rows."""
    seed: int = 0
    """Random seed of the selection."""
    overwrite: Flag = False
    """Whether to replace existing files."""

    def open(self, outputs: Sequence[str]) -> tuple[Mixture, np.ndarray]:
        """Opens the data, checks the outputs, and returns the mixture and the numbers of the rows to select from."""
        mixture = open_mixture(self.data, self.image_root)
        check_outputs(outputs, [self.data, *(source.path for source in mixture.sources)], self.overwrite)
        return mixture, _included(mixture, self.exclude, self.exclude_kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(RowOptions):
    """Splits a data set into parts that share no image, such as one for training and one for validation.

    Writes OUT/train.json and so on. Every row of a mixture file is used once.
    """

    out_dir: OutArgument
    """Folder for the parts."""
    parts: str = "train=0.98,validation=0.02"
    """Names of the parts with shares (0.02) or numbers of rows (500). One share may be `rest`."""
    by: Literal["image", "row"] = "image"
    """Unit of the split: image keeps all rows about one image in one part."""
    format: Literal["json", "jsonl", "parquet"] = "json"
    """Format of the parts."""

    def run(self) -> int:
        shares = _parse_parts(self.parts)
        outputs = [os.path.join(self.out_dir, f"{name}.{self.format}") for name in shares]
        mixture, numbers = self.open(outputs)
        targets = _targets(shares, len(numbers), self.parts)
        rows, hashes = rank(mixture, numbers, self.seed, self.by, self.workers)
        if self.by == "row":  # equal rows may be in different parts
            parts = np.empty(len(numbers), np.int64)
            parts[np.argsort(hashes, kind="stable")] = np.repeat(np.arange(len(targets)), targets)
        else:
            parts = split_rows(rows, hashes, targets)
        for index, name in enumerate(shares):
            if not np.any(parts == index):
                raise UserError(f"--parts {self.parts}: {name} would get no row of {len(numbers):,}; give it more, or "
                                "--by row if most rows are about the same images")
        _write(mixture, numbers, outputs, parts)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(RowOptions):
    """Draws a number or a share of the rows of a data set, at random but reproducibly.

    A sample is contained in every larger sample with the same seed. Every row of a mixture file is drawn at most once.
    """

    out: OutArgument
    """File to write: .json, .jsonl or .parquet."""
    count: int = 0
    """Number of rows of the sample."""
    fraction: float = 0.0
    """Share of the rows; 1 keeps all, in their order."""

    def run(self) -> int:
        if (self.count > 0) == (self.fraction > 0) or self.count < 0 or not 0 <= self.fraction <= 1:
            raise UserError("give either --count, of at least 1, or --fraction, of at most 1")
        mixture, numbers = self.open([self.out])
        count = self.count or round(self.fraction * len(numbers))
        if not 0 < count <= len(numbers):
            raise UserError(f"{self.data}: {count:,} rows are to be taken of {len(numbers):,}")
        _, hashes = rank(mixture, numbers, self.seed, "row", self.workers)
        _write(mixture, numbers[sample_rows(hashes, count)], [self.out])
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix(WorkerOptions):
    """Combines several data sets: a mixture file, which names them, or one file with all rows.

    A part is PATH, or PATH with settings after commas: `a.json b.json,epochs=2 c.parquet,count=5000,image_root=images`.
    `epochs` is the number of times, or the share, that an epoch reads of the part's rows. `count` is the number of rows
    in an epoch. `weight` is the part's share of an epoch; either all parts have it, or none. Training and every prepare
    command read a mixture file.
    """

    out: OutArgument
    """Mixture file to write: .json; with --materialise .json, .jsonl or .parquet."""
    parts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PART ...")]
    """PATH[,epochs=N|,count=N|,weight=N][,image_root=DIR] ..."""
    materialise: Flag = False
    """Whether to write the rows of one epoch, mixed, instead of a file that names the parts."""
    seed: int = 0
    """Random seed of the selection and order of the rows, with --materialise."""
    overwrite: Flag = False
    """Whether to replace an existing file."""

    def run(self) -> int:
        if not self.materialise and not self.out.endswith(".json"):
            raise UserError(f"{self.out}: the name of a mixture file must end in .json")
        base = os.path.dirname(os.path.abspath(self.out))
        parts = [_parse_part(part, base) for part in self.parts]
        if not parts:
            raise UserError("mix needs at least one part")
        os.makedirs(base, exist_ok=True)
        with temporary_path(self.out) as temporary:
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    json.dump({"mixture": parts}, file, indent=2, ensure_ascii=False)
                    file.write("\n")
                mixture = open_mixture(temporary)  # checks parts and settings
                check_outputs([self.out], [source.path for source in mixture.sources], self.overwrite)
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
        _, hashes = rank(mixture, np.arange(mixture.starts[-1]), self.seed, "row", self.workers)
        own = [hashes[start:stop] for start, stop in zip(mixture.starts, mixture.starts[1:], strict=False)]
        _write(mixture, mix_rows(own, mixture.counts), [self.out])


def _write(mixture: Mixture, numbers: np.ndarray, outputs: Sequence[str], parts: np.ndarray | None = None) -> None:
    """Writes row `numbers[k]` to `outputs[parts[k]]`, or all rows to the only output, and reports the outputs."""
    root = common_root(mixture.sources)
    if len(formats := {source.key for source in mixture.sources}) > 1:
        raise UserError(f"a file holds rows of one format, and these have {' and '.join(sorted(formats))}; "
                         "make a mixture file, which names several files (prepare mix)")
    parts = np.zeros(len(numbers), int) if parts is None else parts

    def rows() -> Iterator[tuple[int, Any]]:
        found = tqdm(read_rows(mixture, numbers), "writing", len(numbers), unit=" rows", disable=None)
        for part, (_, source, row) in zip(parts.tolist(), found, strict=True):
            yield part, move_images(row, source, root)

    write_rows(rows, outputs, mixture.sources)
    for index, output in enumerate(outputs):
        print(f"{output}: {np.sum(parts == index):,} rows")
    if root:
        print(printable(f"to be read with --image-root {root}"))


def _included(mixture: Mixture, exclude: str, kinds: Sequence[str]) -> np.ndarray:
    """Returns the numbers of the rows for which the file of findings `exclude` has none of these kinds."""
    keep = np.ones(mixture.starts[-1], bool)
    if not exclude:
        return np.flatnonzero(keep)
    from llava_jax.prepare.findings import KINDS

    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"--exclude-kinds {', '.join(unknown)}: there is no such kind; there are {', '.join(KINDS)}")
    sources = [(os.path.abspath(source.path), start, len(source))  # a mixture may read one file twice
               for source, start in zip(mixture.sources, mixture.starts, strict=False)]
    for line, (path, row, kind) in read_findings(exclude):
        own = os.path.abspath(path)
        found = [start + row - 1 for source, start, size in sources if source == own and 1 <= row <= size]
        if not found:
            raise UserError(f"{exclude}, line {line}: there is no row {row} of {path} in {mixture.name}")
        keep[found] &= kind is not None and kind not in kinds
    if not keep.any():
        raise UserError(f"{mixture.name}: {exclude} leaves no row")
    print(f"{exclude}: {np.sum(~keep):,} of {len(keep):,} rows are left out")
    return np.flatnonzero(keep)


def read_findings(path: str) -> Iterator[tuple[int, tuple[str, int, str | None]]]:
    """Yields the number of each line of a file of findings, with the source, row and kind that the line names."""
    with user_path(path), open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            try:
                found = parse_json(text.decode("utf-8-sig" if line == 1 else "utf-8"), path)
                source, row, kind = found["source"], found["row"], found.get("kind")
                valid = isinstance(source, str) and type(row) is int and isinstance(kind, str | None)
            except (UserError, UnicodeDecodeError, KeyError):
                valid = False
            if not valid or "\0" in source:
                raise UserError(f"{path}, line {line}: not what prepare check --bad-rows writes")
            yield line, (source, row, kind)


def _parse_parts(text: str) -> dict[str, str]:
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
    """Returns the numbers of rows of the parts; their sum is `total`."""
    counts = {name: float(share) * ("." in share and total or 1) for name, share in shares.items() if share != "rest"}
    remaining = total - sum(counts.values())
    if remaining < -1e-6 * total or (len(counts) == len(shares) and remaining > 1e-6 * total):
        raise UserError(f"--parts {text}: these are {sum(counts.values()):,.0f} of {total:,} rows; shares must sum to "
                         "1, or one part be the rest, as in train=rest,validation=0.02")
    edges = np.round(np.cumsum([0, *(counts.get(name, remaining) for name in shares)])).astype(int)
    return np.diff(edges).tolist()


def _parse_part(text: str, base: str) -> dict[str, Any]:
    """Returns a part of a mixture file, with paths relative to the folder `base` of that file."""
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
