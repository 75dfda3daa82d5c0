"""Answers held against the captions and boxes of their image.

Found are objects named that nothing supports, numbers, places, relations and colours that contradict the boxes or, for
colours, the captions. The text is read by patterns, so that much of free text is passed over; what is flagged is likely
to be wrong (scripts/bench_evidence.py measures how likely). English alone is read.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from llava_jax.annotations.context import Context
from llava_jax.annotations.vocabulary import COCO, Vocabulary
from llava_jax.synthesize.evidence.claims import all_claims
from llava_jax.synthesize.evidence.judge import EvidenceChecker

__all__ = ["COCO", "Evidence", "Finding", "check"]


class Contradiction(NamedTuple):
    """A claim that does not hold. `kind`: object, count, attribute, position or relation; `claim`: the sentence;
    `against`: what captions and boxes say."""

    kind: str
    claim: str
    against: str


class Evidence(NamedTuple):
    """`claims`: how many could be checked; `checked`: whether the language was one that is read."""

    findings: tuple[Contradiction, ...] = ()
    claims: int = 0
    checked: bool = True

    @property
    def score(self) -> float:
        """The part of the claims that hold; 1 where there are none."""
        return 1 - len(self.findings) / max(self.claims, 1)


def check(
    kind: str, turns: Sequence[dict[str, str]], context: Context, categories: Iterable[str], language: str = "en"
) -> Evidence:
    """Holds the answers of a record against its image. `turns`: as parse.py gives them, human first; `categories`: all
    of the data set, so that what has no box can be missed. Whatever the teacher of a `kind` was shown, captions and
    boxes both count."""
    if language != "en":
        return Evidence(checked=False)
    vocabulary = _vocabulary(tuple(categories))
    judge = EvidenceChecker(context, vocabulary)
    findings: dict[Contradiction, None] = {}
    checked = 0
    for claim in all_claims(turns, vocabulary):
        verdict = judge(claim)
        checked += verdict is not None
        if verdict:
            findings[Contradiction(*verdict)] = None
    return Evidence(tuple(findings), checked)


@lru_cache(maxsize=4)
def _vocabulary(categories: tuple[str, ...]) -> Vocabulary:
    return Vocabulary(categories)
