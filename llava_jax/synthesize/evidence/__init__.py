"""Contradictions between answers and the captions and boxes of their image.

The check finds objects that nothing supports, and numbers, positions, relations and colours that contradict the boxes
or, for colours, the captions. Patterns read the text, so much of free text is not checked; what is flagged is likely to
be wrong (scripts/bench_evidence.py measures how likely). Only English is checked.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from llava_jax.annotations.context import Context
from llava_jax.annotations.vocabulary import COCO, Vocabulary
from llava_jax.synthesize.evidence.checker import EvidenceChecker
from llava_jax.synthesize.evidence.claims import all_claims

__all__ = ["COCO", "Evidence", "Finding", "check"]


class Contradiction(NamedTuple):
    """A claim that the image contradicts.

    Attributes:
      kind: object, count, attribute, position or relation.
      claim: The sentence.
      against: Content of captions and boxes that contradicts it.
    """

    kind: str
    claim: str
    against: str


class Evidence(NamedTuple):
    """The result of a check.

    Attributes:
      claims: Number of claims that could be checked.
      checked: Whether the language can be checked.
    """

    findings: tuple[Contradiction, ...] = ()
    claims: int = 0
    checked: bool = True

    @property
    def score(self) -> float:
        """Fraction of claims that are not contradicted; 1 without claims."""
        return 1 - len(self.findings) / max(self.claims, 1)


def check(
    turns: Sequence[dict[str, str]], context: Context, categories: Iterable[str], language: str = "en"
) -> Evidence:
    """Compares the answers of a record with its image.

    Args:
      turns: The conversation as parse.py returns it, human first.
      categories: All categories of the data set, because an object without a box is a contradiction only if its
        category has boxes elsewhere.

    Captions and boxes both count, whatever the teacher saw.
    """
    if language != "en":
        return Evidence(checked=False)
    vocabulary = _vocabulary(tuple(categories))
    checker = EvidenceChecker(context, vocabulary)
    findings: dict[Contradiction, None] = {}
    checked = 0
    for claim in all_claims(turns, vocabulary):
        verdict = checker(claim)
        checked += verdict is not None
        if verdict:
            findings[Contradiction(*verdict)] = None
    return Evidence(tuple(findings), checked)


@lru_cache(maxsize=4)
def _vocabulary(categories: tuple[str, ...]) -> Vocabulary:
    return Vocabulary(categories)
