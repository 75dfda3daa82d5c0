"""Reviews: a judge's scores of a reference answer and a candidate's answer, and their summary.

A model's score is the mean of its scores over the mean of the reference's, in percent, over all questions or those of a
category (Visual Instruction Tuning, section 5.1).
"""

import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from llava_jax.cli import Flag, printable
from llava_jax.endpoint.wording import find_refusal
from llava_jax.errors import UserError
from llava_jax.evaluate.runner.tables import markdown
from llava_jax.evaluate.tasks.base import MAX_EXAMPLES, quote
from llava_jax.files import matches_schema, read_json_lines

ALL = "all"
ORDER = ("conv", "detail", "complex")
"""Categories in the order of the published tables."""
MIN_SCORE, MAX_SCORE = 1, 10
"""Range of the scores that a judge is asked for. Published reviews have 0 as well."""
TOO_MANY_FAILED = 4
"""Exit code."""
SEPARATOR = "=" * 33
"""Line that the published summary prints after each file."""

Review = Mapping[str, Any]
"""A line of a file of reviews: {id, question_id, answer1_id, answer2_id, category, content, tuple}.

`tuple` has the scores of the reference and of the candidate."""


class Unscored(UserError):
    """Raised for a judge's reply without scores. `reason`: empty, refused, cut_off, out_of_range or unreadable."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def parse_as_published(text: str) -> list[float]:
    """Returns the scores in the first line as LLaVA's scripts read them, [-1, -1] if they read none.

    Commas are blanks, and one blank separates: `8 7` and `8,7` have scores, `8, 7` has none. Any number is a score.
    """
    try:
        first, second = text.split("\n")[0].replace(",", " ").split(" ")
        return [float(first), float(second)]
    except ValueError:
        return [-1, -1]


_LABEL = r"(?:the )?(?:assistant|answer|response|model)(?:['’]s)? ?#?"
_FIRST, _SECOND = (rf"{_LABEL}{which}(?:['’]s)?(?: (?:score|rating))? ?(?:[:=-]|is)? ?"
                   for which in ("(?:1|A)", "(?:2|B)"))
_PREFIX = (rf"(?:the )?(?:(?:final|overall) )?(?:scores?|ratings?)(?: (?:for|of) {_LABEL}1 and (?:{_LABEL})?2"
           r"(?:,? respectively)?,?)? ?(?:are|is)? ?[:=]? ?")
_NUMBER = r"([0-9]{1,4}(?:\.[0-9]*)?)(?: ?/ ?10(?![0-9.])| out of 10)?\.?"
PAIR = re.compile(
    rf"[\[(]?(?:{_PREFIX})?[\[(]?(?:{_FIRST})?{_NUMBER}[\])]?(?: ?(?:[,;|&]|,? ?and) ?| )(?:{_SECOND})?[\[(]?{_NUMBER}"
    r"[\])]?[.,;]?",
    re.IGNORECASE,
)
"""Regular expression of a line with two scores and only names besides.

Examples: `8 7`, `8, 7`, `8/10 7/10`, `Scores: 8 and 7`, `Assistant 1: 8, Assistant 2: 7`."""
THINKING = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


def parse_scores(text: str, finish_reason: str = "stop") -> tuple[float, float]:
    """Returns the two scores of a judge's reply. Raises Unscored if there are none, or if they are ambiguous.

    The first line, or the first two, must match PAIR, with Markdown allowed. Otherwise all matching lines of the reply
    must have the same scores. An incomplete last line does not count. Both scores must be from 1 to 10.
    """
    lines = [" ".join(re.sub(r"[*`#]+", " ", line).split()) for line in THINKING.sub("", text).split("\n")]
    lines = [line for line in lines if line]
    if finish_reason == "length" and not text.endswith("\n"):  # the last may be "8 1" of "8 10"
        lines = lines[:-1]
    found = PAIR.fullmatch(lines[0]) or PAIR.fullmatch(" ".join(lines[:2])) if lines else None
    if not found:
        pairs = {match.groups(): match for match in map(PAIR.fullmatch, lines) if match}
        found = next(iter(pairs.values())) if len(pairs) == 1 else None
    if found:
        scores = float(found[1]), float(found[2])
        if all(MIN_SCORE <= score <= MAX_SCORE for score in scores):
            return scores
        raise Unscored("out_of_range", f"{found[1]} and {found[2]}, of {MIN_SCORE} to {MAX_SCORE}")
    if finish_reason == "content_filter":
        raise Unscored("refused", "the server's content filter stopped the reply")
    if finish_reason == "length":
        raise Unscored("cut_off", f"no scores before the limit of tokens: {text[:60]!r}")
    if not text.strip():
        raise Unscored("empty", "the reply is empty")
    if refusal := find_refusal(text):
        raise Unscored("refused", refusal)
    raise Unscored("unreadable", f"no two scores: {text[:60]!r}")


@dataclass(frozen=True)
class Figure:
    """Summary of some reviews."""

    ratio: float  # candidate's mean over the reference's, in percent
    reference: float  # ten times the mean
    candidate: float  # ten times the mean
    count: int  # number of reviews


def scored(reviews: Iterable[Review]) -> list[Review]:
    """Returns the reviews with two scores from 0 to 10. A score of -1 means that the judgement failed."""
    return [review for review in reviews if all(0 <= score <= MAX_SCORE for score in _pair(review))]


def failure_notes(reviews: Sequence[Review], compat: bool) -> list[str]:
    """Returns a note that counts and quotes reviews without scores, or nothing."""
    scored_ids = set(map(id, scored(reviews)))
    failed = [review for review in reviews if id(review) not in scored_ids]
    named = "; ".join(f"question {review['question_id']!r}: {quote(str(review.get('content', '')))}"
                      for review in failed[:MAX_EXAMPLES])
    how = "count as they are in both means" if compat else "are left out"
    return [f"{len(failed):,} of {len(reviews):,} judgements failed, and {how} ({named})"] * bool(failed)


def summarize(reviews: Iterable[Review]) -> dict[str, Figure]:
    """Returns unrounded figures by category, in the order of the published tables, and `all`.

    Reviews without scores are left out.
    """
    figures = {}
    for category, pairs in _by_category(scored(reviews)).items():
        reference, candidate = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
        if reference == 0:
            raise UserError(_no_ratio(category))
        figures[category] = Figure(100 * candidate / reference, 10 * reference, 10 * candidate, len(pairs))
    return dict(sorted(figures.items(), key=lambda item: _position(item[0])))


def summarize_as_published(reviews: Iterable[Review]) -> dict[str, Figure]:
    """Returns figures by category and `all`, in alphabetical order, with the arithmetic of LLaVA's summary.

    A score of -1 is not treated differently. Means are rounded to three decimals, figures to one. Raises UserError
    for a division by zero.
    """
    figures = {}
    for category, pairs in sorted(_by_category(reviews).items()):
        reference, candidate = (round(mean, 3) for mean in np.asarray(pairs).mean(0).tolist())
        if reference == 0:
            raise UserError(_no_ratio(category))
        figures[category] = Figure(
            round(candidate / reference * 100, 1), round(reference * 10, 1), round(candidate * 10, 1), len(pairs))
    return figures


def _no_ratio(category: str) -> str:
    return f"the reference's scores of {category!r} have a mean of 0: there is no ratio"


def published_lines(name: str, figures: Mapping[str, Figure]) -> str:
    """Returns the lines of LLaVA's summary for a file: name, and ratio, reference and candidate by category."""
    lines = [f"{category} {figure.ratio} {figure.reference} {figure.candidate}" for category, figure in figures.items()]
    return "\n".join([config_name(name), *lines, SEPARATOR])


def config_name(path: str) -> str:
    return os.path.basename(path).replace("gpt4_text_", "").replace(".jsonl", "")


def table(rows: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Returns a Markdown table from name of a row -> category -> cell."""
    names = sorted({category for cells in rows.values() for category in cells}, key=_position)
    return markdown([[corner, *map(short, names)],
                     *([name, *(cells.get(column, "") for column in names)] for name, cells in rows.items())])


def short(category: str) -> str:
    """Returns a category without the prefix in reviews of In-the-Wild."""
    return category.removeprefix("llava_bench_")


def read_reviews(path: str) -> list[Review]:
    """Returns the lines of a file of reviews, ours or the original's. Raises UserError for another file."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file of reviews")
    reviews = []
    for number, row in read_json_lines(path):
        pair = _pair(row)
        if not (matches_schema(pair, [int | float]) and len(pair) == 2
                and matches_schema(row, {"question_id": int | str})
                and isinstance(row.get("category", ""), str) and all(abs(score) < 1e300 for score in pair)):
            raise UserError(f"{path}, line {number}: not a review, which has question_id, category and tuple, a list "
                             "of two scores")
        reviews.append(row)
    if not reviews:
        raise UserError(f"{path}: the file has no reviews")
    return reviews


@dataclass(frozen=True)
class SummarizeReviews:
    """Summarizes files of reviews, written by `judge` or by LLaVA's scripts.

    Failed judgements, which LLaVA's scripts mark with scores of -1, are left out and counted. If they are too many, the
    exit code is 4. --compat prints what LLaVA's summary prints, where they lower both means. For several files of
    reviews of the same answers, it also prints their mean, which is what LLaVA published."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files of reviews, or folders. The files of a folder are chosen as LLaVA's summary does."""
    compat: Flag = False
    """Whether to use the arithmetic of LLaVA's summary, and print its lines."""
    ignore: tuple[str, ...] = ()
    """Ids of questions to leave out, such as questions about images with people."""
    select: tuple[str, ...] = ()
    """Texts that a file's name must contain."""
    version: str = ""
    """Version of the judge: 0613 for files with that in their name, 0314 for all other files."""
    max_failed: float = 0.05
    """Maximum share of failed judgements in a file; above it the exit code is 4."""

    def run(self) -> int:
        paths = [path for path in sorted(self._paths()) if self._wanted(config_name(path))]
        if not paths:
            raise UserError("there are no files of reviews that are wanted; name them, or their folder")
        code, runs = 0, []
        for path in paths:
            reviews = [review for review in read_reviews(path) if str(review["question_id"]) not in self.ignore]
            try:
                figures = (summarize_as_published if self.compat else summarize)(reviews)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            runs.append((path, reviews))
            notes = failure_notes(reviews, self.compat)
            if self.compat:
                print(printable(published_lines(path, figures)))
                print(printable("".join(f"{path}: {note}\n" for note in notes)), end="", file=sys.stderr)
                continue
            failed = len(reviews) - len(scored(reviews))
            left_out = f", {failed:,} without scores left out" * bool(failed)
            print(printable(f"{path}: {len(reviews):,} reviews{left_out}"))
            print(printable("".join(f"- {note}\n" for note in notes) + describe(figures)))
            if failed > self.max_failed * len(reviews):
                why = f"more than --max-failed {self.max_failed:g} of the judgements failed"
                print(f"{printable(path)}: {why}", file=sys.stderr)
                code = TOO_MANY_FAILED
        for same in _of_the_same_answers(runs):
            # --compat prints on stdout what LLaVA's summary prints, and nothing else.
            print(printable(describe_mean(same)), file=sys.stderr if self.compat else sys.stdout)
        return code

    def _paths(self) -> Iterable[str]:
        for path in self.files:
            if not os.path.isdir(path):
                yield path
                continue
            for name in os.listdir(path):
                if name.endswith(".jsonl") and ("review" in path
                                                or name.startswith(("gpt4_text", "reviews_", "review_"))):
                    yield os.path.join(path, name)

    def _wanted(self, name: str) -> bool:
        if any(part not in name for part in self.select):
            return False
        return self.version in ("", "0613" if "0613" in name else "0314")


def describe_mean(files: Mapping[str, Sequence[Review]]) -> str:
    """Returns a table of the mean of several files with its deviation, and of the mean with LLaVA's rounding."""
    rows = {}
    for name, summary in (("score", summarize), ("as published", summarize_as_published)):
        try:
            runs = [summary(reviews) for reviews in files.values()]
        except UserError:  # without a ratio
            continue
        rows[name] = {category: _mean([run[category].ratio for run in runs if category in run]) for category in runs[0]}
    return f"the mean of {len(files)} files: {', '.join(files)}\n" + table(rows, "% of the reference")


def _of_the_same_answers(files: Sequence[tuple[str, Sequence[Review]]]) -> list[dict[str, Sequence[Review]]]:
    """Groups files that review the same answers. A file may lack failed judgements."""
    groups: list[tuple[dict, dict[str, Sequence[Review]]]] = []
    for path, reviews in files:
        answers = {str(review["question_id"]): review.get("answer2_id") for review in reviews}
        for known, same in groups:
            shared = known.keys() & answers.keys()
            if shared and all(known[id] == answers[id] for id in shared):
                known.update(answers)
                same[path] = reviews
                break
        else:
            groups.append((answers, {path: reviews}))
    return [same for _, same in groups if len(same) > 1]


def _mean(ratios: Sequence[float]) -> str:
    return f"{statistics.fmean(ratios):.1f}" + f" ± {statistics.stdev(ratios):.1f}" * (len(ratios) > 1)


def describe(figures: Mapping[str, Figure]) -> str:
    """Returns a table of one summary."""
    return table({
        "score": {category: f"{figure.ratio:.1f}" for category, figure in figures.items()},
        "reference": {category: f"{figure.reference:.1f}" for category, figure in figures.items()},
        "candidate": {category: f"{figure.candidate:.1f}" for category, figure in figures.items()},
        "judged": {category: str(figure.count) for category, figure in figures.items()},
    }, "% of the reference")


def _by_category(reviews: Iterable[Review]) -> dict[str, list[Sequence[float]]]:
    pairs = defaultdict(list)
    for review in reviews:
        for category in (*([review["category"]] if "category" in review else []), ALL):
            pairs[category].append(_pair(review))
    return pairs


def _pair(review: Review) -> Sequence[float]:
    """Returns the scores of a review. A review without a category may have the key `score` instead of `tuple`."""
    return review.get("tuple" if "tuple" in review or "category" in review else "score")


def _position(category: str) -> tuple[int, str]:
    """Returns the position of a category in the published tables."""
    if category == ALL:
        return len(ORDER) + 1, ""
    name = short(category)
    return (ORDER.index(name), "") if name in ORDER else (len(ORDER), name)
