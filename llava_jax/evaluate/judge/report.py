"""Writes a judge's reviews, and their figures over runs and orders."""

import datetime
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llava_jax.endpoint.request import Response
from llava_jax.evaluate.judge.reviews import (
    Figure,
    Review,
    published_lines,
    short,
    summarize,
    summarize_as_published,
    table,
)
from llava_jax.evaluate.tasks.base import MAX_EXAMPLES, quote
from llava_jax.files import sha256_of, write_file, write_json

REVIEWS = "reviews"
"""Name of the folder of reviews."""
OWN_FILE = re.compile(r"reviews_\d+(_swapped)?\.jsonl")

Ratios = dict[str, float]
"""Candidate's score in percent of the reference's, by category."""


@dataclass
class JudgeReport:
    """Reviews by run (from 1) and order, failed judgements, and statistics of the replies."""

    compat: bool
    reviews: dict[tuple[int, bool], list[Review]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    judgements: int = 0
    models: Counter[str] = field(default_factory=Counter)
    fingerprints: set[str] = field(default_factory=set)
    tokens: Counter[str] = field(default_factory=Counter)
    created: list[int] = field(default_factory=list)

    def count(self, reply: Response) -> None:
        self.models[reply.model] += 1
        self.fingerprints.update([reply.fingerprint] if reply.fingerprint else [])
        self.tokens.update(prompt=reply.prompt_tokens, completion=reply.completion_tokens)
        self.created.append(reply.created)

    def add(self, run: int, swapped: bool, review: Review | None, failure: dict[str, Any]) -> None:
        reviews = self.reviews.setdefault((run, swapped), [])
        reviews += [review] if review else []
        self.failed += [failure] if failure else []
        self.judgements += 1

    def summary(self, reviews: Sequence[Review]) -> dict[str, Figure]:
        return summarize_as_published(reviews) if self.compat else summarize(reviews)

    def runs(self, swapped: bool) -> list[list[Review]]:
        return [reviews for (_, order), reviews in sorted(self.reviews.items()) if order == swapped]

    def by_order(self) -> dict[str, list[Ratios]]:
        """Returns name of a row of the table -> ratios of each run."""
        rows = {"reference first": [self._ratios(reviews) for reviews in self.runs(False)]}
        if self.runs(True):
            rows["candidate first"] = [self._ratios(reviews) for reviews in self.runs(True)]
            rows["difference"], rows["both orders"] = [], []
            for first, second in zip(self.runs(False), self.runs(True), strict=True):
                both = {review["question_id"] for review in first} & {review["question_id"] for review in second}
                a, b = (self._ratios([review for review in reviews if review["question_id"] in both])
                        for reviews in (first, second))
                rows["difference"].append({category: b[category] - a[category] for category in a})
                rows["both orders"].append(self._ratios([*first, *second]))
        return rows

    def _ratios(self, reviews: Sequence[Review]) -> Ratios:
        return {category: figure.ratio for category, figure in self.summary(reviews).items()}


def write_report(report: JudgeReport, folder: str, paths: Mapping[str, str], judge: Mapping[str, Any],
                 options: Mapping[str, Any]) -> str:
    """Writes judge.json, judge.md, failed.jsonl and the reviews. Returns the text to print."""
    rows = {name: _means(ratios) for name, ratios in report.by_order().items()}
    os.makedirs(os.path.join(folder, REVIEWS), exist_ok=True)
    for name in filter(OWN_FILE.fullmatch, os.listdir(os.path.join(folder, REVIEWS))):  # of a command with more runs
        os.unlink(os.path.join(folder, REVIEWS, name))
    runs, lines = [], []
    for (run, swapped), reviews in sorted(report.reviews.items()):
        name = f"{REVIEWS}/reviews_{run}{'_swapped' * swapped}.jsonl"
        _write_lines(os.path.join(folder, name), reviews)
        figures = report.summary(reviews)
        lines.append(published_lines(name, figures))
        runs.append({"file": name, "run": run, "swapped": swapped,
                     "figures": {short(category): asdict(figure) for category, figure in figures.items()}})
    _write_lines(os.path.join(folder, "failed.jsonl"), report.failed)
    reasons = Counter(failure["reason"] for failure in report.failed)
    content = {
        "bench": options["bench"],
        "figures": rows["reference first"][0],
        "deviations": rows["reference first"][1],
        "orders": {name: {"figures": means, "deviations": deviations} for name, (means, deviations) in rows.items()},
        "runs": runs,
        "judgements": report.judgements,
        "failed": len(report.failed),
        "failed_for": dict(reasons.most_common()),
        "judge": {**judge, "replied_as": dict(report.models), "fingerprints": sorted(report.fingerprints),
                  "replied": [_date(time) for time in (min(report.created), max(report.created))]
                  if report.created else []},
        "tokens": dict(report.tokens),
        "files": {kind: {"path": os.path.abspath(path), "sha256": sha256_of(path)} for kind, path in paths.items()},
        "options": dict(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(os.path.join(folder, "judge.json"), content)
    text = _markdown(rows, content, report.failed[:MAX_EXAMPLES])
    write_file(os.path.join(folder, "judge.md"), text + "\n")
    return "\n".join(lines) if report.compat else text


def _means(runs: Sequence[Ratios]) -> tuple[Ratios, Ratios]:
    """Returns the mean over the runs, and the standard deviation of a run (n - 1) if there are several."""
    values: dict[str, list[float]] = {}
    for ratios in runs:
        for category, ratio in ratios.items():
            values.setdefault(short(category), []).append(ratio)
    return ({category: statistics.fmean(found) for category, found in values.items()},
            {category: statistics.stdev(found) for category, found in values.items() if len(found) > 1})


def _markdown(rows: Mapping[str, tuple[Ratios, Ratios]], content: Mapping[str, Any],
              examples: Sequence[Mapping[str, Any]]) -> str:
    cells = {name: {category: f"{mean:{'+' * (name == 'difference')}.1f}"
                    + (f" ± {deviations[category]:.1f}" if category in deviations else "")
                    for category, mean in means.items()} for name, (means, deviations) in rows.items()}
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in content["failed_for"].items())
    counted = "count as -1 for both" if content["options"]["compat"] else "are left out"
    failed = f"; {content['failed']:,} failed and {counted} ({reasons})" if content["failed"] else ""
    judge = content["judge"]
    replied = ", ".join(judge["replied_as"]) or "nobody"
    named = "".join(f"- question {failure['question_id']!r}: {failure['reason']}: "
                    f"{quote(failure.get('content', failure['detail']))}\n" for failure in examples)
    deviations = "; ± is the standard deviation of a run (n - 1)" if rows["reference first"][1] else ""
    return (table(cells, f"{content['bench']}, % of the reference") + "\n"
            f"{content['judgements']:,} judgements by {judge['model']} (replied as {replied}){failed}{deviations}\n"
            f"{named}prompts {judge['prompts'][:12]}, {content['date']}")


def _write_lines(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))  # in ASCII, as LLaVA's scripts


def _date(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
