"""English words for the categories of a data set, with their meaning for the number of objects."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("red orange yellow green cyan blue purple pink black white grey brown beige gold silver turquoise tan "
           "violet golden maroon teal").split()  # fmt: skip
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:!?]")
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Meaning:
    """The meaning of a word.

    Attributes:
      categories: Categories that the word can mean.
      exact: Whether the word fits all objects of a category, so that its number is the number of boxes. Otherwise the
        number is at most that, as with "man" for a person.
      loose: Whether the word is often used of objects without a box ("plant"), so that a missing box proves nothing.
    """

    categories: frozenset[str]
    exact: bool = True
    loose: bool = False


class Vocabulary:
    """Words for `categories`, with synonyms for COCO's.

    For categories of a colour and a noun ("red circle") the noun alone is a word too. If all categories are of that
    kind, "object" is a word as well.
    """

    def __init__(self, categories: Iterable[str]):
        self.meanings: dict[tuple[str, ...], Meaning] = {}
        names = list(dict.fromkeys(categories))
        coloured = [name for name in names if name.partition(" ")[0] in COLOURS and " " in name]
        self.coloured = frozenset(coloured)
        for name in names:
            self._add(name.partition(" ")[2] if name in self.coloured else name, name)
        if len(coloured) == len(names):
            for name in names:
                self._add("object", name)
        for name, kinds in SYNONYMS.items():
            if name in names:
                itself = frozenset([name])
                same, narrower, wider = Meaning(itself), Meaning(itself, False), Meaning(itself, False, loose=True)
                for meaning, words in zip((same, narrower, wider), kinds, strict=True):
                    for word in words:
                        self._join(word, meaning)
        for word, members in HYPERNYMS.items():
            if found := frozenset(members) & frozenset(names):
                self._join(word, Meaning(found, exact=False))
        self.longest = max(map(len, self.meanings), default=0)

    def is_singular(self, word: str) -> bool:
        """Whether a word names a single object."""
        return (word,) in self.meanings and not word.endswith("s")

    def _add(self, word: str, category: str) -> None:
        self._join(word, Meaning(frozenset([category])))

    def _join(self, word: str, meaning: Meaning) -> None:
        for form in {word, plural(word)}:
            key = tuple(split(form))
            known = self.meanings.get(key)
            self.meanings[key] = meaning if known is None else Meaning(
                known.categories | meaning.categories, known.exact and meaning.exact, known.loose or meaning.loose
            )  # fmt: skip


def split(text: str) -> list[str]:
    """Splits a text into lower-case words and single punctuation marks. Hyphens separate words."""
    return _WORD.findall(_plain(text))


def hyphenated_indices(text: str) -> frozenset[int]:
    """Returns the indices of words that a hyphen joins to the next one."""
    plain = _plain(text)
    words = enumerate(_WORD.finditer(plain))
    return frozenset(i for i, word in words if re.match("-[a-z]", plain[word.end() : word.end() + 2]))


def _plain(text: str) -> str:
    return text.lower().replace("’", "'").replace("n't", " not")


def plural(word: str) -> str:
    """Returns the plural of a noun: "people", "pairs of skis", "fire hydrants"."""
    if word.startswith(("pair of ", "piece of ")):
        return word.replace(" of", "s of", 1)
    *front, last = word.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search("[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif not last.endswith(("skis", "scissors")):
        last += "es" if last.endswith(("s", "sh", "ch", "x")) else "s"
    return " ".join([*front, last])


_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice",
              "sheep": "sheep", "knife": "knives", "calf": "calves", "goose": "geese", "cattle": "cattle",
              "policeman": "policemen", "fireman": "firemen", "lady": "ladies", "people": "people"}  # fmt: skip


def read_synonyms() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Reads english_synonyms.txt. It has three lists for each category: equal, narrower and wider words."""
    synonyms = {}
    for line in Path(__file__).with_name("english_synonyms.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, text = line.partition(": ")
            parts = f"{text}||".split("|")[:3]
            synonyms[name] = tuple(tuple(filter(None, map(str.strip, part.split(",")))) for part in parts)
    return synonyms


SYNONYMS = read_synonyms()
HYPERNYMS = {
    "animal": "bird cat dog horse sheep cow elephant bear zebra giraffe".split(),
    "vehicle": "bicycle car motorcycle airplane bus train truck boat".split(),
}

COCO = tuple("""
    person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench
    |bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis
    |snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup
    |fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch
    |potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink
    |refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n    ", "").split("|"))
"""COCO's categories, in the order of their ids."""
