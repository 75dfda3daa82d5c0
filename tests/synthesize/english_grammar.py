"""Checks that articles, numbers and verbs of an English sentence about drawn shapes agree."""

import re

from llava_jax.annotations.drawn_scenes import COLOURS, SHAPES

MANY = r"\b(?:both|two|three|four|five|six|seven|eight|nine|ten)\b"
_NOUNS = "|".join([*SHAPES, "object", "corner"])
_ADJECTIVES = rf"(?:(?:large|small|free|more|{'|'.join(COLOURS)}) )*"
ONE_NAME, MANY_NAMES = rf"{_ADJECTIVES}(?:{_NOUNS})\b", rf"{_ADJECTIVES}(?:{_NOUNS.replace('cross', 'crosse')})s\b"
_ONE = rf"(?:(?:the|an?|one) {ONE_NAME}|one|that|this|nothing|nothing else|it|picture|colour)"
ERRORS = "|".join(
    (r"\ba [aeiou]", r"\ban [^aeiou]",
     rf"\b(?:an?|one|is no) {MANY_NAMES}", rf"(?:{MANY}|are no|(?<!one )\bmore|\bmany|\benough) {ONE_NAME}",
     rf"\bis {MANY}", rf"\bare (?:an?|one|the) {ONE_NAME}(?!,| and)",
     rf"(?:{MANY}|\bcolours|\bsides|\bthey) (?:is|has)\b", rf"{MANY_NAMES} (?!as\b|less\b)[a-z]+s\b",
     rf"(?<!and )\b{_ONE} (?:are|have|come|belong|share|outnumber)\b",
     rf"^(?:both )?the {ONE_NAME} and the {ONE_NAME} (?:is|has)\b")
)  # fmt: skip


def agrees(text):
    """Whether no known error is in a sentence, such as "There is two", "two object" and "a orange ring"."""
    return not re.search(ERRORS, re.sub(rf"^one from \w+ is \w+| of the (?:four )?{MANY_NAMES}", "", text.lower()))
