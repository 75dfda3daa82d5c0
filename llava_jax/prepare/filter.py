"""`prepare filter`: selects captions with the concept-balanced filter of annotations/concept_filter.py."""

import dataclasses
import os
from typing import Literal

from llava_jax.annotations.captions import CaptionFile
from llava_jax.annotations.concept_filter import find_phrases, select
from llava_jax.annotations.noun_phrases import open_chunker
from llava_jax.cli import Flag, printable
from llava_jax.errors import UserError
from llava_jax.prepare.filter_report import write_report
from llava_jax.prepare.options import DataArgument, OutArgument, WorkerOptions, require_at_least
from llava_jax.prepare.writing import check_absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter(WorkerOptions):
    """Selects captions so that rare concepts are covered and common ones do not prevail (CC3M to 595K in the paper).

    DATA has one caption per row: a JSON list or JSON lines of rows with a `caption` (metadata.json) or a conversation
    of one answer (chat.json), or lines of caption, tab, URL, as CC3M is published. OUT gets the selected rows as they
    are.
    """

    data: DataArgument
    """File to filter."""
    out: OutArgument
    """File to write, in the format of DATA."""
    report: str = ""
    """Page to write, with the frequencies of phrases before and after; default: OUT with the suffix .html."""
    min_frequency: int = 3
    """Minimum number of captions of a phrase. Rarer phrases are ignored."""
    max_per_phrase: int = 100
    """Maximum number of captions that are selected for one phrase."""
    seed: int = 0
    """Random seed for the selection among the captions of a phrase."""
    chunker: Literal["light", "spacy"] = "light"
    """Chunker for noun phrases: light (word lists and patterns) or spacy (a pipeline, which is much slower)."""
    spacy_model: str = ""
    """Installed pipeline (en_core_web_sm) or folder of an unpacked one, with --chunker spacy."""
    bad_rows: Literal["error", "skip"] = "error"
    """Treatment of rows without a caption: error stops, skip leaves them out."""
    overwrite: Flag = False
    """Whether to replace existing files."""

    def run(self) -> int:
        report = self.report or os.path.splitext(self.out)[0] + ".html"
        self._check(report)
        file = CaptionFile(self.data)
        chunker = open_chunker(self.chunker, self.spacy_model)
        phrases, bad = find_phrases(file, chunker, self.workers, self.bad_rows == "skip")
        kept = select(phrases, self.min_frequency, self.max_per_phrase, self.seed)
        if not kept.any():
            raise UserError(
                f"{self.data}: nothing is left of {len(kept):,} captions, for no phrase is in {self.min_frequency} of "
                "them; lower --min-frequency"
            )
        before, after = phrases.frequencies(), phrases.frequencies(kept)
        rare = int((before < self.min_frequency).sum())
        counts = {
            "captions": f"{len(kept) - len(bad):,}",
            **({"rows without a caption, left out": f"{len(bad):,}"} if bad else {}),
            "distinct noun phrases": f"{len(before):,}",
            f"of these in fewer than {self.min_frequency} captions, forgotten": f"{rare:,}",
            f"of these in more than {self.max_per_phrase} captions": f"{int((before > self.max_per_phrase).sum()):,}",
            "captions kept": f"{int(kept.sum()):,} ({kept.sum() / (len(kept) - len(bad)):.1%})",
        }
        file.write(self.out, kept)
        write_report(
            report, os.path.basename(self.data), counts, phrases.texts, before, after,
            self.min_frequency, self.max_per_phrase,
        )  # fmt: skip
        for name, value in counts.items():
            print(f"{name}: {value}")
        for row in list(bad)[:1]:
            print(printable(f"the first row without a caption is {file.where(row)}: {bad[row]}"))
        print(f"{self.out}, {report}")
        return 0

    def _check(self, report: str) -> None:
        require_at_least(1, self, "min_frequency", "max_per_phrase")
        require_at_least(0, self, "seed", "workers")
        if len({os.path.realpath(path) for path in (self.data, self.out, report)}) < 3:
            raise UserError(f"DATA, OUT and --report must be three files, not {self.data}, {self.out} and {report}")
        for path in (self.out, report):
            check_absent(path, self.overwrite)
