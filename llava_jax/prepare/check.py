"""`prepare check`: the options, and the report as text."""

import contextlib
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from llava_jax.cli import printable
from llava_jax.config import Data, Stage
from llava_jax.data.records import REASONS
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError, user_path
from llava_jax.files import making, parse_json
from llava_jax.prepare.audit import audit
from llava_jax.prepare.findings import KINDS, SUSPECT, Checker, Finding
from llava_jax.prepare.settings import Settings
from llava_jax.text import agreement

WIDTH = 100  # columns of the text
SHOWN = 20  # findings in the text


@dataclasses.dataclass(frozen=True)
class Check:
    """Reads a data set once, says which rows are bad and why, and what the good ones amount to.

    Exits with 0 if nothing was found, or only what --allow names; with 1 if something was; with 2 if the data cannot be
    opened. Rows that cannot be used are malformed, role, turn_order, image_count, outside_root, missing_image,
    broken_image, no_supervised_tokens, too_long, unsupported. Rows that training would take, but that look wrong, are
    empty_answer, empty_question, wrong_type, animated, rotated, transparent, faint, separator, media_mark,
    duplicate_id, duplicate, duplicate_question.

    --json prints one object. ok: whether the exit code is 0. rows, good_rows (training would take them) and
    text_only_rows (good, without image). images: references, distinct, and per_row, how many good rows have how many.
    tokens, of the good rows: total, learned, learned_share, min, median, mean, p95, max, and histogram, a list of
    [from, below, rows]; null without a model. findings: how many of each kind. allowed: kinds. unknown_keys: how many
    rows have a field that nothing reads (turn.NAME: a turn's). packing, of an epoch:
    sequence_length, tiles_per_sequence, rows, token_fill, image_fill, rows_per_step, steps; null without a model.
    sources: path, format, rows_per_epoch and the figures above of each. bad_rows: the first 1000 findings, each with
    source, row and line (from 1; line may be null), id, kind, message and usable (whether training would take the row).
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """data file or folder of any format, or a mixture file"""
    image_root: str = ""
    """folder to which image paths are relative; the data's own folder if empty"""
    model: str = ""
    """directory of the LLaVA to be trained, or of its language model or tokenizer; without it tokens are not counted"""
    template: str = ""
    """conversation template; the model's if empty, vicuna_v1 without a model"""
    max_length: int | None = None
    """tokens of a packed row, data.sequence_length of a recipe; 2048 by default"""
    tiles_per_sequence: int | None = None
    """image slots of a packed row, data.tiles_per_sequence of a recipe; by default as many as a row needs, from 2 on"""
    tokens_per_image: int | None = None
    """visual tokens of an image, where the model is no whole LLaVA; 576 by default"""
    exif: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """turn images as their EXIF orientation says, data.exif of a recipe; then none is rotated"""
    max_pixels: int = Data.max_pixels
    """pixels of an image at most, data.max_pixels of a recipe"""
    batch_size: int = Stage.batch_size
    """packed rows of a training step, to tell how many steps an epoch has"""
    workers: int | None = None
    """processes; by default one for each core, 0 for none beside this one"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object and nothing else"""
    bad_rows: str = ""
    """file for all findings, as JSON lines"""
    allow: tuple[str, ...] = ()
    """kinds of findings that are no error"""

    def __post_init__(self):
        for name in ("max_length", "tiles_per_sequence", "tokens_per_image", "batch_size"):
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{option} is {value}: it must be at least 1")
            if value is not None and name in ("max_length", "tokens_per_image") and not self.model:
                raise UserError(f"{option} needs --model: without its tokenizer no tokens are counted")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers is {self.workers}: it must be 0 or more")
        for kind in self.allow:
            if kind not in KINDS:
                raise UserError(f"--allow {kind}: there is no such kind of finding; there are {', '.join(KINDS)}")

    def run(self) -> int:
        mixture = open_mixture(self.data, self.image_root)
        settings = Settings.load(self.model, self.template)
        settings = dataclasses.replace(settings, exif=self.exif, max_pixels=self.max_pixels)
        if self.tokens_per_image is not None:
            settings = dataclasses.replace(settings, tokens_per_image=self.tokens_per_image)
        max_length = self.max_length or Data.sequence_length
        workers = (os.cpu_count() or 1) if self.workers is None else self.workers
        if settings.context is not None:
            agreement.check_length(max_length, settings.context, "--max-length")
        checker = Checker(mixture.sources, settings, max_length, self.tiles_per_sequence)
        with _saving(self.bad_rows) as save:
            result = audit(checker, mixture, workers, save)
        report = result.report(max_length, self.tiles_per_sequence, self.batch_size, self.allow)
        text = json.dumps(report) if self.json else describe(report, result.shown[:SHOWN])
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))
        return int(not report["ok"])


@contextlib.contextmanager
def _saving(path: str) -> Iterator[Callable[[Finding], None] | None]:
    """Writes findings as JSON lines into a file that appears once it is whole."""
    if not path:
        yield None
        return
    if os.path.isdir(path):
        raise UserError(f"--bad-rows {path}: this is a folder; name a file")
    if not _may_replace(path):
        raise UserError(f"--bad-rows {path}: there is something else than findings; name another file")

    def attempt(action: Callable, *args: Any) -> Any:
        with user_path(f"--bad-rows {path}", missing="cannot be written, there is no such folder"):
            return action(*args)

    with contextlib.ExitStack() as stack:
        temporary = attempt(stack.enter_context, making(path))
        file = stack.enter_context(open(temporary, "w"))
        yield lambda finding: attempt(file.write, json.dumps(finding.as_json()) + "\n")
        attempt(file.close)
        attempt(os.replace, temporary, path)


def _may_replace(path: str) -> bool:
    """Whether nothing is at `path`, an empty file, or findings of an earlier check: not the data, nor an image."""
    if not os.path.lexists(path):
        return True
    if not os.path.isfile(path):
        return False
    with user_path(path), open(path, "rb") as file:
        first = file.readline(1 << 20)
    try:
        return not first or {"source", "row", "kind", "usable"} <= parse_json(first.decode(), path).keys()
    except (UserError, UnicodeDecodeError):
        return False


def describe(report: dict[str, Any], shown: Sequence[Finding]) -> str:
    """A report as text of at most WIDTH columns, with some of its findings."""
    lines = [*_findings(report, shown), *_sources(report), *_unknown(report), *_images(report), *_tokens(report)]
    return "\n".join(map(_fit, lines))


def _findings(report: dict[str, Any], shown: Sequence[Finding]) -> list[str]:
    lines = []
    for finding in shown:
        file = f"{os.path.basename(finding.source)}, " if len(report["sources"]) > 1 else ""
        line = f" (line {finding.line})" if finding.line else ""
        named = f", id {finding.id:.40}" if finding.id else ""
        lines.append(_wrap(f"{finding.kind:20} ", f"{file}row {finding.row}{line}{named}: {finding.message}"))
    more = sum(report["findings"].values()) - len(shown)
    if more:
        lines.append(f"... and {more:,} more (--bad-rows FILE writes all of them)")
    for title, kinds in (("cannot be used", REASONS), ("can be used, but looks wrong", SUSPECT)):
        found = [kind for kind in kinds if kind in report["findings"]]
        lines += ["", title] if found else []
        for kind in found:
            allowed = "allowed" if kind in report["allowed"] else ""
            lines.append(f"  {kind:20} {report['findings'][kind]:>11,}  {allowed:7}  {SUSPECT.get(kind, '')}".rstrip())
    return [*lines, ""] if lines else []


def _sources(report: dict[str, Any]) -> list[str]:
    if len(report["sources"]) == 1:
        return [f"{report['sources'][0]['path']}: {report['sources'][0]['format']}"]
    lines = [f"{'source':47}{'rows':>13}{'good':>13}{'per epoch':>13}{'findings':>13}"]
    for source in report["sources"]:
        name = source["path"] if len(source["path"]) < 47 else "..." + source["path"][-43:]
        figures = (source["rows"], source["good_rows"], source["rows_per_epoch"], sum(source["findings"].values()))
        lines.append(f"{name:47}" + "".join(f"{figure:13,}" for figure in figures))
    return lines


def _unknown(report: dict[str, Any]) -> list[str]:
    keys = sorted(report["unknown_keys"].items(), key=lambda item: -item[1])
    named = ", ".join(f"{key:.40} in {rows:,}" for key, rows in keys)
    return [_wrap("not read  ", f"{named} rows")] if keys else []


def _images(report: dict[str, Any]) -> list[str]:
    images = report["images"]
    return [f"rows      {report['rows']:,}, of which {report['good_rows']:,} can be used",
            f"images    {images['references']:,} in the rows, {images['distinct']:,} different ones; "
            f"{report['text_only_rows']:,} good rows have none",
            *_bars("images", images["per_row"].items())]


def _tokens(report: dict[str, Any]) -> list[str]:
    tokens, packing = report["tokens"], report["packing"]
    if tokens is None:
        return ["tokens    not counted: lengths, too_long and packing need --model"] if report["good_rows"] else []
    epoch = sum(source["rows_per_epoch"] for source in report["sources"])
    return [
        f"tokens    {tokens['total']:,} in the good rows, of which {tokens['learned_share']:.1%} are learned",
        f"          shortest {tokens['min']:,}, median {tokens['median']:,.0f}, mean {tokens['mean']:,.0f}, "
        f"95 % up to {tokens['p95']:,.0f}, longest {tokens['max']:,}",
        *_bars("tokens", [(f"{low:,}-{high - 1:,}", count) for low, high, count in tokens["histogram"]]),
        f"packing   an epoch of {epoch:,} rows becomes {packing['rows']:,} packed rows of "
        f"{packing['sequence_length']:,} tokens and {packing['tiles_per_sequence']} images",
        f"          {packing['token_fill']:.1%} of the tokens and {packing['image_fill']:.1%} of the images filled",
        f"          {packing['steps']:,} steps of {packing['rows_per_step']:,} rows",
    ]


def _bars(unit: str, counts: Sequence[tuple[str, int]]) -> list[str]:
    most = max((count for _, count in counts), default=0)
    return [f"{name:>21} {unit} {count:>12,} {'█' * -(-48 * count // most)}" for name, count in counts]


def _wrap(start: str, text: str) -> str:
    """`start` and a text of any length, on as many lines as it needs: what is wrong is never cut."""
    text = printable(" ".join(text.split()))
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _fit(lines: str) -> str:
    """Lines without what could confuse a terminal; one that is still too long loses its middle."""
    shown = printable(lines).split("\n")
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 43]}...{line[-40:]}" for line in shown)
