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
    """Questions, of which one is drawn, and sentences of an answer, of which one of every list is drawn."""

    questions: list[str] = field(default_factory=list)
    sentences: list[list[str]] = field(default_factory=list)


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
        fields: dict[str, str] = dict(self.words.CONSTANTS)
        for key, value in fact.values.items():
            fields |= self.words.fields(key, value)
        fields = {key: text if key == "text" else _draw(text, rng) for key, text in fields.items()}
        entry = rng.choice(self.entries[what, fact.key])
        question = rng.choice(entry.questions) if entry.questions else ""
        answer = " ".join(rng.choice(lines) for lines in entry.sentences)
        question, answer = (self.words.finish(_draw(text, rng).format_map(fields)) for text in (question, answer))
        return question, answer

    def fill(self, key: str, rng: random.Random | None = None, **texts: object) -> tuple[str, str]:
        """Returns question and answer of a short answer, with `texts` as values of the fields.

        `rng` draws the question if the table has several. Nothing else is drawn, and capitals stay as they are.
        """
        [entry] = self.entries["short", key]
        question = rng.choice(entry.questions) if len(entry.questions) > 1 else "".join(entry.questions)
        answer = " ".join(lines[0] for lines in entry.sentences)
        return question.format_map(texts), answer.format_map(texts)


def _read(path: Path) -> dict[tuple[str, str], list[Phrasing]]:
    entries: dict[tuple[str, str], list[Phrasing]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if mark == "==":
            what, key = text.split(" ")
            entries.setdefault((what, key), []).append(entry := Phrasing())
        elif mark == "?":
            entry.questions.append(text)
        elif mark.isdigit():
            if int(mark) > len(entry.sentences):
                entry.sentences.append([])
            entry.sentences[-1].append(text)
    return entries


def _draw(text: str, rng: random.Random) -> str:
    """Draws one of every [a|b], from the inside out. A category may contain brackets."""
    drawn = 1
    while drawn:
        text, drawn = ALTERNATIVES.subn(lambda match: rng.choice(match[1].split("|")), text)
    return text
