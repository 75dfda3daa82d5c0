"""A table of a language's phrases, read from a text file, and sentences made of them."""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from llava_jax.annotations import english, korean
from llava_jax.errors import UserError
from llava_jax.synthesize.rules.facts import Fact

LANGUAGES = {"en": english, "ko": korean}
ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


@dataclass
class Phrasing:
    """Questions, of which one is drawn, and sentences of an answer, of which one of every list is drawn.

    `short` is the answer in a word or two to the first question, or "".
    """

    questions: list[str] = field(default_factory=list)
    sentences: list[list[str]] = field(default_factory=list)
    short: str = ""


class PhraseTable:
    """Phrases of "en" or "ko". Raises UserError for another language."""

    def __init__(self, language: str):
        if language not in LANGUAGES:
            raise UserError(f"the rules teacher writes {' and '.join(LANGUAGES)}, not {language!r}")
        self.words: ModuleType = LANGUAGES[language]
        name = self.words.__name__.rpartition(".")[2]
        self.entries = _read(Path(__file__).with_name(f"{name}.txt"))

    def say(self, what: str, fact: Fact, rng: random.Random) -> tuple[str, str]:
        """Draws a question (empty for a description) and its answer.

        Raises UserError if an object has no name in the language.
        """
        entry, fields = rng.choice(self.entries[what, fact.key]), self._fields(fact, rng)
        question = rng.choice(entry.questions) if entry.questions else ""
        answer = " ".join([rng.choice(lines) for lines in entry.sentences])
        return self._fill(question, fields), self._fill(answer, fields)

    def say_short(self, fact: Fact) -> tuple[str, str]:
        """Returns the first question and its short answer. Nothing is drawn, so that every fact has one wording.

        Raises KeyError for a fact whose question has no short answer.
        """
        entry, fields = self.entries["conversation", fact.key][0], self._fields(fact)
        if not entry.short:
            raise KeyError(fact.key)
        return self._fill(entry.questions[0], fields), entry.short.format_map(fields)

    def question(self, key: str, rng: random.Random) -> str:
        """Draws a request for a "caption" or a "description"."""
        return rng.choice(self.entries["question", key][0].questions)

    def _fields(self, fact: Fact, rng: random.Random | None = None) -> "Fields":
        texts = dict(self.words.CONSTANTS)
        for key, value in fact.values.items():
            texts.update(self.words.fields(key, value))
        return Fields(texts, rng)

    def _fill(self, text: str, fields: "Fields") -> str:
        return self.words.finish(_draw(text, fields.rng).format_map(fields))


class Fields(dict):
    """The fields of a fact. A field's alternative is drawn when a phrase first needs it."""

    def __init__(self, texts: dict[str, str], rng: random.Random | None):
        self.texts, self.rng = texts, rng

    def __missing__(self, name: str) -> str:
        text = self.texts[name]
        self[name] = text = text if name == "text" else _draw(text, self.rng)  # a caption stays as it is
        return text


def _read(path: Path) -> dict[tuple[str, str], list[Phrasing]]:
    entries: dict[tuple[str, str], list[Phrasing]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if mark == "==":
            what, *keys = text.split(" ")
            started = {key: Phrasing() for key in keys}
            for key, entry in started.items():
                entries.setdefault((what, key), []).append(entry)
            current = list(started.values())
        elif mark == "--":
            current = [started[text]]
        for entry in current if mark in ("?", "=") or mark.isdigit() else ():
            if mark == "?":
                entry.questions.append(text)
            elif mark == "=":
                entry.short = text
            else:
                if int(mark) > len(entry.sentences):
                    entry.sentences.append([])
                entry.sentences[-1].append(text)
    return entries


def _draw(text: str, rng: random.Random | None) -> str:
    """Draws one of every [a|b], from the inside out; the first without `rng`. A category may contain brackets."""
    drawn = "|" in text
    while drawn:
        text, drawn = ALTERNATIVES.subn(
            lambda match: rng.choice(match[1].split("|")) if rng else match[1].partition("|")[0], text)
    return text
