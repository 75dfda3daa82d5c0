"""English words for the categories of a data set: what a text may call them, and what that says about their number."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = ("red orange yellow green cyan blue purple pink black white grey brown beige gold silver turquoise tan "
           "violet golden maroon teal").split()  # fmt: skip
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:!?]")
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Meaning:
    """What a word may stand for. `categories`: any of these. `exact`: all of a category go by this word, so that a
    number of them is the number of boxes; otherwise (a man is a person) it is at most that. `loose`: the word is often
    used of what has no box ("plant"), so that its absence says nothing."""

    categories: frozenset[str]
    exact: bool = True
    loose: bool = False


class Vocabulary:
    """Words for `categories`; those of COCO with synonyms. Of categories that are a colour and a noun ("red circle")
    the noun alone is a word too, and where all are so, "object" is as well."""

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
        """Whether it is the name of one thing."""
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
    """Words in lower case, and punctuation by itself; hyphens part words."""
    return _WORD.findall(_plain(text))


def hyphened(text: str) -> frozenset[int]:
    """Indices of the words that a hyphen joins to the next one."""
    plain = _plain(text)
    words = enumerate(_WORD.finditer(plain))
    return frozenset(i for i, word in words if re.match("-[a-z]", plain[word.end() : word.end() + 2]))


def _plain(text: str) -> str:
    return text.lower().replace("’", "'").replace("n't", " not")


def plural(word: str) -> str:
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


def _words(text: str) -> tuple[tuple[str, ...], ...]:
    """`same | narrower | wider`, each words separated by commas."""
    return tuple(tuple(filter(None, map(str.strip, part.split(",")))) for part in f"{text}||".split("|")[:3])


SYNONYMS = {
    name: _words(text)
    for name, text in {
        "person": """human | man, woman, boy, girl, child, kid, baby, toddler, adult, lady, gentleman, guy,
            player, skier, surfer, snowboarder, skateboarder, rider, pedestrian, passenger, cyclist, biker,
            motorcyclist, policeman, fireman, catcher, umpire, chef, tourist, teenager, bride,
            groom, individual
            | batter, pitcher""",
        "bicycle": "bike, push bike",
        "car": "automobile | sedan, taxi, suv, minivan, police car",
        "motorcycle": "motorbike | scooter, moped",
        "airplane": "aeroplane, plane | jet, airliner, biplane || aircraft",
        "bus": "| double decker, minibus, school bus",
        "train": "| locomotive, freight train",
        "truck": "lorry | pickup, fire truck",
        "boat": "| ship, sailboat, canoe, kayak, yacht, ferry, rowboat",
        "traffic light": "traffic signal, stoplight",
        "fire hydrant": "hydrant",
        "bench": "| park bench",
        "bird": "| seagull, pigeon, duck, goose, parrot, swan, owl, eagle",
        "cat": "| kitten",
        "dog": "| puppy",
        "horse": "| pony, foal",
        "sheep": "| lamb",
        "cow": "cattle | calf, bull",
        "backpack": "rucksack",
        "umbrella": "| parasol",
        "handbag": "purse || bag",
        "tie": "necktie | bow tie",
        "suitcase": "|| luggage, bag",
        "skis": "ski, pair of skis",
        "sports ball": "|| ball",
        "baseball bat": "|| bat",
        "baseball glove": "|| glove, mitt",
        "tennis racket": "tennis racquet || racket, racquet",
        "wine glass": "|| glass",
        "cup": "| mug || glass",
        "sandwich": "| hamburger, burger",
        "broccoli": "piece of broccoli",
        "donut": "doughnut",
        "cake": "| birthday cake, cupcake",
        "chair": "| armchair || seat, stool",
        "couch": "sofa",
        "potted plant": "houseplant || plant, flower",
        "dining table": "|| table, desk",
        "tv": "television || screen, monitor",
        "laptop": "laptop computer || computer",
        "mouse": "computer mouse",
        "remote": "remote control",
        "keyboard": "computer keyboard",
        "cell phone": "cellphone, smartphone, mobile phone || phone",
        "oven": "|| stove",
        "sink": "|| basin",
        "refrigerator": "fridge",
        "vase": "|| pot",
        "scissors": "pair of scissors",
        "teddy bear": "| teddy || stuffed animal, toy",
        "hair drier": "hair dryer",
    }.items()
}  # fmt: skip

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
"""COCO's categories of things, in the order of their ids."""
