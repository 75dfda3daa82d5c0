"""Figures that others have published, with their sources. The data is published.json."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from llava_jax.errors import UserError
from llava_jax.evaluate.runner.tables import markdown


@dataclass(frozen=True)
class PublishedResult:
    """Published figures of a model, with the names and units of the task's Scores."""

    model: str
    figures: Mapping[str, float]
    source: str
    deviations: Mapping[str, float] = field(default_factory=dict)  # standard deviations over several runs of the judge

    def cell(self, figure: str) -> str:
        """Returns a figure with its deviation as text, "" without the figure."""
        if figure not in self.figures:
            return ""
        return f"{self.figures[figure]}" + (f" ± {self.deviations[figure]}" if figure in self.deviations else "")


@functools.cache
def published_results() -> Mapping[str, Sequence[PublishedResult]]:
    """Returns the rows of published.json by benchmark."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    sources = content["sources"]
    return {bench: [PublishedResult(**row | {"source": sources[row["source"]]}) for row in rows]
            for bench, rows in content["benchmarks"].items()}


@dataclass(frozen=True)
class ShowPublished:
    """Prints published figures of one benchmark or of all, with their sources."""

    bench: tyro.conf.Positional[str] = ""
    """Name of a benchmark; default: all."""

    def run(self) -> int:
        found = published_results()
        if self.bench and self.bench not in found:
            raise UserError(f"nothing published is known of {self.bench!r}; there is {', '.join(found)}")
        for bench in [self.bench] if self.bench else found:
            rows = found[bench]
            columns = list(dict.fromkeys(figure for row in rows for figure in row.figures))
            table = [["", *columns], *([row.model, *map(row.cell, columns)] for row in rows)]
            print(f"{bench}\n\n{markdown(table)}")
            print("\n".join(dict.fromkeys(f"  {row.source}" for row in rows)) + "\n")
        return 0
