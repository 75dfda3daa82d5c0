"""English sentences with their mentions of objects marked, so that patterns can match statements about them."""

import re
from dataclasses import dataclass

from llava_jax.annotations.vocabulary import COLOURS, NUMBERS, Meaning, Vocabulary, hyphenated_indices, split

DETERMINERS = frozenset("""
    a an the this that these those his her its their my our your some any another each every several both all
    single""".split())
_AFTER_NUMBERS = frozenset("other several both all single".split())
"""Determiners that a number can precede: "two other dogs", but not "in room 2 a dog"."""
_NUMBERED = frozenset("chapter floor gate highway lane level number page platform room route track".split())
"""A number after these is a name: "route 12 buses"."""
_SIZES = ("large", "small", "big", "little")
_BEFORE_NO_NOUN = frozenset("""
    . , ; : ! ? is are was were be been being am has have had having do does did and or but so of in on at to from with
    by for as than that which who whom whose while where when there here it he she they him them i you we no not nor if
    then also too near above below behind under over beside between among along across around through into onto up down
    out off what how can could will would may might must should see sees seen seeing show shows shown find finds found
    hold holds holding count counts look looks lie lies take takes sit sits sitting stand stands standing wear wears
    wearing ride rides riding carry carries carrying use uses using play plays playing plus only
    just exactly""".split())
_AFTER_NOUN = _BEFORE_NO_NOUN | frozenset("""
    sat stood lay held wore rode ate ran walked flew hung left right higher lower closest nearest closer farther further
    far close next inside outside atop against past toward towards within without during after before until like full
    visible present available ready alone together either both all each himself herself itself themselves seem appear
    am 's made seen shown worn taken caught thrown hit built drawn hidden because since though although whereas whose
    belong now again today still share away""".split()) | frozenset(NUMBERS)
"""Words that may follow a noun in the singular, besides words that end like a verb or an adverb."""
_ADJECTIVES = frozenset("individual human adult".split())
"""Names of a person that are adjectives as well: "individual pieces"."""
_NO_VERBS = frozenset("crossing crossings seats sides doors towels toys pants seed".split())
"""Nouns that end like verbs, and after a name make it the name of another object."""
_VERBS = frozenset("skis ties books trains boats bears benches couches ducks sinks bats kites bikes".split())
"""Plurals that are verbs after a noun in the singular: "a man skis down"."""
_TAILS = frozenset("""
    stop station park parking court booth box boxes paper food house shop store race track tracks line lines door
    doors seat seats window windows driver owner lover rack holder handle handles top lane wash ride player players net
    field room frame sheet sheets cover covers stall lot show yard shelter path pen shaped sized case cases shelf
    shelves cloth dish riders tree stem sauce slice slices bath cage collar engine dock racing riding game match team
    stick wheel wheels tank fur lights tower face crossing pad rental repair terminal hangar stable stables trough
    market pot pots side shape""".split())
"""Nouns that after a name make it the name of another object: "bus stop"."""
_MANY = ("people", "men", "women", "children", "mice", "geese", "cattle", "policemen", "firemen")


_QUOTED = re.compile(r"[\"“][^\"“”]{0,80}[\"”]")


@dataclass(frozen=True)
class Mention:
    """An object that a sentence names, with the words in front of the name that belong to it.

    Attributes:
      text: The name with the words in front of it.
      named: Whether those words, or a plural, show that it is an object ("the train", not "to train").
      narrowed: Whether those words say more than number, colour and size ("young people"), so that there may be more.
    """

    text: str
    meaning: Meaning
    number: int | None
    colours: tuple[str, ...]
    named: bool
    narrowed: bool


@dataclass(frozen=True)
class Sentence:
    """A sentence.

    Attributes:
      marked: Words in lower case, with §0, §1, ... instead of the mentions.
    """

    text: str
    marked: str
    mentions: tuple[Mention, ...]


def sentences(text: str, vocabulary: Vocabulary) -> list[Sentence]:
    """Reads the sentences of a text. Quotes (a sign, a title) are dropped, because they claim nothing of the image."""
    text = _QUOTED.sub("\"...\"", text)
    return [read(part, vocabulary) for part in re.split(r"(?<=[.!?;])\s+|\n+", text) if part.strip()]


def read(text: str, vocabulary: Vocabulary, caption: bool = False) -> Sentence:
    """Reads one sentence. Of several names that start at a word, the longest counts.

    A `caption` supports answers and claims nothing, so more words count as names: "baby elephant" names a baby.
    """
    words, joined = split(text), None if caption else hyphenated_indices(text)
    marked: list[str] = []
    mentions: list[Mention] = []
    done = start = 0
    while start < len(words):
        end, meaning = _name(words, joined, start, vocabulary)
        if meaning:
            begin, mention = _mention(words, done, start, end, meaning)
            marked += [*words[done:begin], f"§{len(mentions)}"]
            mentions.append(mention)
            done = end
        start = end
    return Sentence(text.strip(), re.sub(r" (?=[.,;:!?])", "", " ".join(marked + words[done:])), tuple(mentions))


def numbers(text: str) -> list[int]:
    """Returns all numbers of a text, words or digits. "no" and "none" are 0."""
    return [number for word in split(text) if (number := _number(word)) is not None]


def colours(text: str) -> tuple[str, ...]:
    return tuple(_colour(word) for word in split(text) if _colour(word))


def _name(
    words: list[str], joined: frozenset[int] | None, start: int, vocabulary: Vocabulary
) -> tuple[int, Meaning | None]:
    """Returns the end and the meaning of the name that starts at `start`. `joined` is None for a caption."""
    for end in range(min(start + vocabulary.longest, len(words)), start, -1):
        meaning = vocabulary.meanings.get(tuple(words[start:end]))
        if not meaning:
            continue
        last, after = words[end - 1], words[end] if end < len(words) else "."
        verb = start and _is_many(last) and words[start - 1] in ("it", "he", "she", "that", "who", "to")
        verb = verb or start and last in _VERBS and vocabulary.is_singular(words[start - 1])
        # "man-made", "bus stop", "orange plate", "baby elephant" name something else.
        part = after in _TAILS
        if joined is not None:
            part = part or end - 1 in joined or not (_is_many(last) or _may_follow(last, after))
        if not verb and not part:
            return end, meaning
    return start + 1, None


def _may_follow(noun: str, word: str) -> bool:
    """Whether a word after a noun in the singular is no part of a longer name."""
    if word in _AFTER_NOUN or word in DETERMINERS or word in _VERBS:
        return True
    if noun in _ADJECTIVES:
        return False
    return word.endswith(("ing", "ed", "s", "ly")) and word not in _NO_VERBS


def _mention(words: list[str], done: int, start: int, end: int, meaning: Meaning) -> tuple[int, Mention]:
    """Returns the start and the mention of the name words[start:end]. It starts at `done` or later."""
    begin, found, unknown, number, determined = start, [], 0, None, False
    for at in range(start - 1, done - 1, -1):
        word = words[at]
        if _number(word) is not None and (
            words[at + 1] in DETERMINERS - _AFTER_NUMBERS or at and words[at - 1] in _NUMBERED
        ):
            break
        if word == "that" and words[at + 1] in DETERMINERS:
            break  # "it shows that the person"
        if word in DETERMINERS or (_number(word) is not None and word not in ("no", "none")):
            number = 1 if word == "single" else _number(word) if number is None else number
            determined, begin = True, at
        elif determined or word in _BEFORE_NO_NOUN - {"and"} or unknown > 2:
            break
        elif _colour(word):
            found.append(_colour(word))
        elif word == "and" and not (found and at and _colour(words[at - 1])):
            break
        elif word not in (*_SIZES, "and"):
            unknown += 1
    if not determined:  # words that are not known may belong to something else
        while begin > done and (_colour(words[begin - 1]) or words[begin - 1] in _SIZES):
            begin -= 1
        found, unknown = [_colour(word) for word in words[begin:start] if _colour(word)], 0
    many = _is_many(words[end - 1])
    named = (determined or many) and not (many and words[begin] in ("a", "an") and unknown)  # "a piano bears"
    return begin, Mention(" ".join(words[begin:end]), meaning, number, tuple(found), named, unknown > 0)


def _is_many(word: str) -> bool:
    return word in _MANY or (word.endswith("s") and not word.endswith(("ss", "us")))


def _number(word: str) -> int | None:
    if word in ("no", "none"):
        return 0
    return NUMBERS.index(word) if word in NUMBERS else int(word) if word.isdigit() and len(word) < 4 else None


def _colour(word: str) -> str:
    return word if word in COLOURS else {"gray": "grey", "blonde": "", "crimson": "red", "scarlet": "red"}.get(word, "")
