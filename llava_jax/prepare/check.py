"""Command `prepare check`: reports bad rows, and figures of the good rows, as text or JSON."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_jax.cli import Flag, printable
from llava_jax.config import Data, Stage
from llava_jax.data.records import REASONS
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError, user_path
from llava_jax.files import atomic_write, parse_json
from llava_jax.prepare.audit import audit
from llava_jax.prepare.findings import KINDS, SUSPECT, Checker, Finding
from llava_jax.prepare.options import WorkerOptions, require_at_least
from llava_jax.prepare.settings import ModelOptions
from llava_jax.text import agreement

COLUMNS = 100
"""Maximum number of columns of the text report."""
SHOWN_FINDINGS = 20
"""Number of findings in the text report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(WorkerOptions, ModelOptions):
    """Reads a data set once, and reports bad rows with reasons, and figures of the good rows.

    The exit code is 0 if nothing was found but the kinds of --allow, 1 if another kind was found, and 2 if the data
    cannot be opened. Kinds of unusable rows: malformed, role, turn_order, image_count, outside_root, missing_image,
    broken_image, no_supervised_tokens, too_long, unsupported. Kinds of rows that training would use, but that look
    wrong: empty_answer, empty_question, wrong_type, animated, rotated, transparent, faint, separator, media_mark,
    duplicate_id, duplicate, duplicate_question.

    --json prints one object. ok: whether the exit code is 0. rows, good_rows (usable rows) and text_only_rows (good,
    without image): numbers. images: references, distinct, and per_row, which counts the good rows by their images.
    tokens, of the good rows: total, supervised, supervised_share, min, median, mean, p95, max, and histogram, a list of
    [from, below, rows]; null without a model. findings: numbers by kind. allowed: kinds. unknown_keys: number of rows
    by field that nothing reads (turn.NAME is a field of a turn). packing, of an epoch: sequence_length,
    tiles_per_sequence, sequences, token_fill, tile_fill, batch_size, steps; null without a model. sources: path,
    format, rows_per_epoch and the figures above, for every source. bad_rows: the first 1000 findings, with source, row
    and line (from 1; line may be null), id, kind, message and usable (whether training would use the row).
    """

    tiles_per_sequence: int | None = None
    """Number of tiles of a packed sequence (data.tiles_per_sequence of a recipe); default: the number that the rows
    need, at least 2."""
    visual_tokens: int | None = None
    """Number of visual tokens of a tile, if --model is not a complete LLaVA; default: 576."""
    batch_size: int = Stage.batch_size
    """Number of packed sequences per step, to report the number of steps of an epoch."""
    json: Flag = False
    """Whether to print one JSON object and nothing else."""
    bad_rows: str = ""
    """File for all findings, as JSON lines."""
    allow: tuple[str, ...] = ()
    """Kinds of findings that are not errors."""

    def __post_init__(self):
        require_at_least(1, self, "max_length", "tiles_per_sequence", "visual_tokens", "batch_size")
        require_at_least(0, self, "workers")
        for name in ("max_length", "visual_tokens"):
            if getattr(self, name) is not None and not self.model:
                raise UserError(f"--{name.replace('_', '-')} needs --model: without its tokenizer no tokens are "
                                "counted")
        for kind in self.allow:
            if kind not in KINDS:
                raise UserError(f"--allow {kind}: there is no such kind of finding; there are {', '.join(KINDS)}")

    def run(self) -> int:
        mixture = open_mixture(self.data, self.image_root)
        settings = self.load_settings()
        if self.visual_tokens is not None:
            side = math.isqrt(self.visual_tokens)
            if self.visual_tokens - side**2 > 1:
                raise UserError(f"--visual-tokens is {self.visual_tokens}: it must be a square number, or one more")
            processor = dataclasses.replace(settings.processor, patches=side,
                                            class_token=self.visual_tokens > side**2)
            settings = dataclasses.replace(settings, processor=processor)
        max_length = self.max_length or Data.sequence_length
        if settings.context is not None:
            agreement.check_length(max_length, settings.context, "--max-length")
        checker = Checker(mixture.sources, settings, max_length, self.tiles_per_sequence)
        with _findings_file(self.bad_rows) as save:
            result = audit(checker, mixture, self.workers, save)
        report = result.report(max_length, self.tiles_per_sequence, self.batch_size, self.allow)
        text = json.dumps(report) if self.json else describe(report, result.shown[:SHOWN_FINDINGS])
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))
        return int(not report["ok"])


@contextlib.contextmanager
def _findings_file(path: str) -> Iterator[Callable[[Finding], Any] | None]:
    """Yields a function that writes a finding as a JSON line to a file, which appears when it is complete."""
    if not path:
        yield None
        return
    if os.path.isdir(path):
        raise UserError(f"--bad-rows {path}: this is a folder; name a file")
    if not _may_replace(path):
        raise UserError(f"--bad-rows {path}: there is something else than findings; name another file")
    with atomic_write(path) as file:
        yield lambda finding: file.write(f"{json.dumps(finding.as_json())}\n".encode())


def _may_replace(path: str) -> bool:
    """Returns whether `path` is free, or is an empty file or the findings of an earlier check."""
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
    """Returns a report as text of at most COLUMNS columns, with some of its findings."""
    lines = [*_findings(report, shown), *_sources(report), *_unknown(report), *_images(report), *_tokens(report)]
    return "\n".join(map(_shorten, lines))


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
        f"tokens    {tokens['total']:,} in the good rows, of which {tokens['supervised_share']:.1%} are supervised",
        f"          shortest {tokens['min']:,}, median {tokens['median']:,.0f}, mean {tokens['mean']:,.0f}, "
        f"95 % up to {tokens['p95']:,.0f}, longest {tokens['max']:,}",
        *_bars("tokens", [(f"{low:,}-{high - 1:,}", count) for low, high, count in tokens["histogram"]]),
        f"packing   an epoch of {epoch:,} rows becomes {packing['sequences']:,} packed "
        f"sequences of {packing['sequence_length']:,} tokens and {packing['tiles_per_sequence']} tiles",
        f"          {packing['token_fill']:.1%} of the tokens and {packing['tile_fill']:.1%} of the tiles are used",
        f"          {packing['steps']:,} steps of {packing['batch_size']:,} sequences",
    ]


def _bars(unit: str, counts: Sequence[tuple[str, int]]) -> list[str]:
    most = max((count for _, count in counts), default=0)
    return [f"{name:>21} {unit} {count:>12,} {'█' * -(-48 * count // most)}" for name, count in counts]


def _wrap(start: str, text: str) -> str:
    """Wraps a text after `start`; messages are wrapped because they must not be cut."""
    text = printable(" ".join(text.split()))
    return textwrap.fill(text, COLUMNS, initial_indent=start, subsequent_indent=" " * len(start))


def _shorten(lines: str) -> str:
    """Makes lines safe for a terminal, and shortens lines that are still too long in the middle."""
    shown = printable(lines).split("\n")
    return "\n".join(line if len(line) <= COLUMNS else f"{line[: COLUMNS - 43]}...{line[-40:]}" for line in shown)
