"""Noun phrases of captions, by a light chunker of this project or by spaCy.

Both chunkers use the same notion of a phrase: a noun with everything in front of it that belongs to it (adjectives,
participles, numbers, other nouns, an owner with 's), in lower case. Leading determiners ("the", "his", "some") are
dropped. Words are separated by single spaces, and hyphens have no spaces ("t - shirt" is "t-shirt"). Coordinated nouns
are two phrases; adjectives that share a noun are one phrase ("red and white flowers"). Text after the noun does not
belong to the phrase. Pronouns and bare numbers are no phrases.

The light chunker maps every word of a caption to one letter, and finds phrases in the string of letters with regular
expressions.
"""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import UserError

Chunker = Callable[[Sequence[str]], list[list[str]]]
"""A picklable function from captions to the distinct phrases of every caption, in order."""


def open_chunker(name: str, spacy_model: str = "") -> Chunker:
    """Returns the chunker "light" or "spacy". Raises UserError if spaCy or its pipeline is missing."""
    if name == "spacy":
        chunker = SpacyChunker(spacy_model)
        chunker([""])  # raises an error now, not in a worker
        return chunker
    return light_chunker


def light_chunker(captions: Sequence[str]) -> list[list[str]]:
    """Finds the distinct noun phrases of every caption by word lists, endings and patterns."""
    return [light_phrases(caption) for caption in captions]


def light_phrases(caption: str) -> list[str]:
    """Finds the distinct noun phrases of one caption."""
    words = split_words(caption)
    tags = "".join(map(_tag_of.__getitem__, words))
    if "E" in tags:
        tags = _VERB_OF_ONE.sub(r"\1V", tags)
    tags = _MODIFIER.sub("J", _NAME.sub("N", _VERB.sub("V", tags)))
    found = [join_words(words[match.start() : match.end()]) for match in _PHRASE.finditer(tags)]
    return list(dict.fromkeys(found))


@dataclasses.dataclass
class SpacyChunker:
    """Finds noun phrases with a spaCy pipeline.

    `model` is the name of an installed pipeline, or a folder that contains one at any depth (what `nlp.to_disk` writes,
    or an unpacked wheel or tar.gz). Nothing is downloaded. Every process loads the pipeline at its first call. Raises
    UserError, one line, if spaCy is missing, or if the pipeline is missing or has no parser.
    """

    model: str
    _pipeline: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        if self._pipeline is None:
            self._pipeline = _load_spacy(self.model)
        unused = [name for name in ("ner", "lemmatizer") if name in self._pipeline.pipe_names]
        texts = [text.encode("utf-8", "replace").decode() for text in captions]  # spaCy fails on half a surrogate pair
        return [noun_chunks(doc) for doc in self._pipeline.pipe(texts, batch_size=256, disable=unused)]

    def __getstate__(self) -> dict:
        return {"model": self.model, "_pipeline": None}


def noun_chunks(doc: Any) -> list[str]:
    """Returns the distinct phrases of a parsed spaCy `Doc`."""
    found = []
    for chunk in doc.noun_chunks:
        words = [] if chunk.root.pos_ == "PRON" else split_words(chunk.text)
        kept = [number for number, word in enumerate(words) if _tag_of[word] not in "., "]
        while kept and _tag_of[words[kept[0]]] in "DEFR":
            kept = kept[1:]
        if kept:
            found.append(join_words(words[kept[0] : kept[-1] + 1]))
    return list(dict.fromkeys(found))


def split_words(text: str) -> list[str]:
    """Splits a text into lower-case words, 's, and single signs."""
    text = text.lower()
    if not text.isascii():
        text = _MARKS.sub("", unicodedata.normalize("NFC", text)).replace("\u2019", "'")
    if "'" in text:
        text = _OWNER.sub(r" 's ", text)
    if " - " in text:
        text = _SPACED_HYPHEN.sub("-", text)
    return _WORD.findall(text)


def join_words(words: Iterable[str]) -> str:
    return " ".join(words).replace(" 's", "'s").replace(" ,", "")


def _load_spacy(model: str) -> Any:
    try:
        import spacy
    except ImportError:
        raise UserError("spaCy is not installed: pip install 'llava_jax[spacy]', or use --chunker light") from None
    if not model:
        raise UserError("--chunker spacy needs --spacy-model: the name of an installed pipeline, or a folder with one")
    if os.path.isfile(model):
        unpack = "unzip" if model.endswith((".whl", ".zip")) else "tar -xf"
        raise UserError(f"{model}: give a folder, not an archive ({unpack} it, and name the folder that it becomes)")
    folder = model
    if os.path.isdir(model):
        folders = sorted(path for path, _, files in os.walk(model) if "config.cfg" in files)
        if not folders:
            raise UserError(f"{model}: no spaCy pipeline in this folder (there is no config.cfg in it)")
        folder = folders[0]
    try:
        pipeline = spacy.load(folder)
    except (OSError, ValueError) as error:
        reason = "" if folder == model else f" ({' '.join(str(error).split())[:200]})"
        raise UserError(
            f"{model}: spaCy cannot load this pipeline{reason}; python -m spacy download en_core_web_sm gets one, or "
            "unpack its wheel and name that folder"
        ) from None
    doc = pipeline("A dog sleeps.")
    if not (doc.has_annotation("DEP") and doc.has_annotation("POS")):
        raise UserError(f"{model}: noun phrases need a pipeline with tagger and parser, such as en_core_web_sm")
    return pipeline


# ---- words ----

_MARKS = re.compile("[\u0300-\u036f]")
_OWNER = re.compile(r"(?<=\w)\s*'\s*s\b|(?<=s)\s?'(?=\s+[^\W\d_])")
_SPACED_HYPHEN = re.compile(r"(?<=[^\W_]) - (?=[^\W_])")
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\d+(?:[.,]\d+)+|[^\W_]+(?:[-'&][^\W_]+)*|'s|\S")

# Every word has one letter:
#   E  a, an      F  the, his, ...      D  other determiners      R  pronouns      W  who, while, before, ...
#   P  prepositions, particles and adverbs, which end a phrase                     T  to, can, will, ...
#   C  and, or    ,  comma              .  other signs            S  's            M  numbers
#   A  adverbs that stand before adjectives                       J  adjectives
#   N  nouns, and any unknown word    L  their plurals            H  persons ("actor"), who are subjects
#   B  is, has    V  verbs              d  words in -ed           e  those that nouns go with ("snow covered")
#   g  words in -ing                    h  those that stand before nouns ("smiling"); "back" and "inside" behave alike
# Words that are verbs and nouns, by which of both they are more often:
#   b  "walk"     z  "walks"            c  "sign"                 y  "signs"


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb[-1] == "y" and verb[-2] not in "aeou" else verb + "s"


def read_word_lists() -> dict[str, list[str]]:
    """Reads english_words.txt: the words of every list by its tag."""
    lists: dict[str, list[str]] = {}
    words: list[str] = []
    for line in Path(__file__).with_name("english_words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            words = lists[line[3:]] = []
        elif not line.startswith("# "):
            words += line.split()
    return lists


class _Tags(dict):
    """Maps words to letters. A word that is in no list gets its letter by its ending, once."""

    def __init__(self):
        super().__init__()
        lists = read_word_lists()
        for tag, base, third in (("verb", "V", "V"), ("verb_first", "b", "z"), ("noun_first", "c", "y")):
            self |= {_third_person(verb): third for verb in lists[tag]} | dict.fromkeys(lists[tag], base)
        self |= dict.fromkeys(lists["past"], "V") | dict.fromkeys(lists["participle"], "d") | {",": ","}
        for letter, words in lists.items():
            if len(letter) == 1:
                self |= dict.fromkeys(words, letter)
        self._adjective_endings = tuple(lists["adjective_ending"])

    def __missing__(self, word: str) -> str:
        letter = self._by_ending(word)
        if len(word) < 30:  # what is longer is hardly a word, and will not come again
            self[word] = letter
        return letter

    def _by_ending(self, word: str) -> str:
        if not word[0].isalnum():
            return "."
        if word[0].isdigit():
            return "M" if word.replace(".", "").replace(",", "").isdigit() else "J"  # "19th", "3d", "2-bedroom"
        if "-" in word:
            last = word.rpartition("-")[2]
            return "N" if last in ("up", "in", "out", "off") else self[last] if self[last] in "NLHcy" else "J"
        if word.endswith("ed") and len(word) > 3:
            return "d"
        if word.endswith("ing") and len(word) > 4:
            return "g"
        if word.endswith("ly") and len(word) > 4:
            return "A"
        if word.endswith(self._adjective_endings) and len(word) > 5 and not word.endswith("fish"):
            return "J"
        if word.endswith(("woman", "man")):
            return "H"
        return "L" if word.endswith("s") and not word.endswith(("ss", "us", "is")) else "N"


_tag_of = _Tags()

# ---- patterns over the letters; each replaces the letters of single words, so that positions stay ----

_THE = "DEF"
_ONE, _MANY = "NHbc", "Lzy"
_NOUN = _ONE + _MANY
_BEFORE = _NOUN + "JMdeghA"  # what can follow a word that stands before a noun
# A word is a verb after "to" and the like, after a noun where no other noun is likely, and where a determiner follows.
_VERB = re.compile(
    f"(?<=T)[bc]|(?<=R)[zybc]|(?<=[HW])[zy]|(?<=B)[bc](?=[PTW.]|$)"
    f"|(?<=[{_NOUN}MA])z|z(?=[{_THE}R])"
    f"|(?<=[{_NOUN}])y(?=[{_THE}RJMgNH{_MANY}]|c(?![{_THE}PA]))"
    f"|(?<=[{_MANY}W])b|(?<=[{_NOUN}JC])[bc](?=[{_THE}R])|^b(?=[{_THE}R])"
    f"|(?<=[Ly])c(?=[PA]|CV)|(?<=L)b(?=CV)"
    f"|(?<=[{_ONE}])L(?=[{_THE}R])"
)
# "a hand waves", "a hand trembles": after a singular noun, a word in -s is a verb.
_VERB_OF_ONE = re.compile(f"(E[AJMde]*[{_ONE}]+)(?:y|L(?![S{_NOUN}]))")
# A participle or 1930's before a noun.
_MODIFIER = re.compile(
    f"(?:(?<=[{_THE}JSMPCWTV.,])|^|(?<=[{_THE}PVC,.]A)|(?<=^A))d(?=[{_BEFORE}])"
    f"|(?<!B)e(?=[{_BEFORE}])"
    f"|(?:(?<=[PCWV.,Ad])|^)h(?=[{_BEFORE}])"
    "|(?<=M)S"
)
# "the making of", "a catch", "a can", "a smiling man"
_NAME = re.compile(f"(?<=[{_THE}JSM])[gh]|(?<=[EF])[VT]|(?<=[EF]J)V")
# The numbers bound the time that a text of any length takes.
_CORE = f"(?:A{{,3}}[JM](?:[C,](?=A{{,3}}[JM]))?|[{_NOUN}]){{,15}}[{_NOUN}]"
# "the half of": an adjective with no noun after it is one, if it has a determiner.
_PHRASE = re.compile(f"{_CORE}(?:S{_CORE})*|(?<=[EF])[AJ]{{,6}}J(?![C,JM])")
