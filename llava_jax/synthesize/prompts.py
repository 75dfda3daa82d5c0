"""What is sent to the teacher: a folder of plain texts, put together for an image.

A folder holds one folder per kind, named as in KINDS, in the layout that the original published: system_message.txt,
and worked examples NNN_caps.txt (what the teacher is given) and NNN_conv.txt (what it should answer). Beside these may
be questions.txt: ways to ask, one a line, of which each record takes one at random; questions.ko.txt are those in
Korean, and so on.

Everything that is the same for all images comes first, so that a provider's prompt cache can keep it.
"""

import dataclasses
import hashlib
import json
import os
import re

from llava_jax.annotations.context import Context
from llava_jax.data.records import check_text
from llava_jax.errors import UserError, user_path
from llava_jax.files import read_text
from llava_jax.synthesize.language import language_name

KINDS = ("conversation", "detail_description", "complex_reasoning")
ASKED = ("detail_description", "pairs")  # whose questions are drawn from a pool, not written by the teacher
EXAMPLE = re.compile(r"(.+)_(?:caps|conv)\.txt")
OWN = os.path.join(os.path.dirname(__file__), "prompts")

LANGUAGE = {
    "conversation": "Write the questions and the answers in {language}.",
    "detail_description": "Write the description in {language}.",
    "complex_reasoning": "Write the question and the answer in {language}.",
}
FORMAT = 'The words "Question:" and "Answer:" and the lines "===" stay as they are, in English.'

Messages = tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of some kinds in one language."""

    language: str
    stable: dict[str, Messages]  # of each kind: system message and worked examples
    pools: dict[str, tuple[str, ...]]  # of each kind in ASKED

    @classmethod
    def load(
        cls, folder: str = "", language: str = "en", kinds: tuple[str, ...] = KINDS, questions: str = ""
    ) -> "Prompts":
        """The project's own prompts, or those in `folder`. `questions`: a file of ways to ask for a detailed
        description, in place of the pool.

        In another language than English the system message ends with the demand for it; the worked examples stay as
        they are. A pool that a user's folder lacks is the project's. Raises UserError, one line,
        for a kind, file or pool that is missing or empty, an example that is half there, and unknown languages.
        """
        name = language_name(language)
        folder = folder or OWN
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder of prompts")
        stable = {}
        for kind in kinds:
            demand = ""
            if language != "en":
                demand = LANGUAGE[kind].format(language=name)
                demand = f"\n\n{demand}" if kind == "detail_description" else f"\n\n{demand} {FORMAT}"
            stable[kind] = _read_kind(os.path.join(folder, kind), demand)
        pools = {kind: read_questions(kind, language, folder, questions) for kind in kinds if kind in ASKED}
        return cls(language, stable, pools)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.stable)

    def messages(self, kind: str, context: Context) -> Messages:
        """{"role", "content"}: the system message, the worked examples, and last the image; of conversations the
        teacher sees captions alone, as in the paper."""
        image = context.captions_text if kind == "conversation" else context.text
        return (*self.stable[kind], {"role": "user", "content": image})

    def questions(self, kind: str) -> tuple[str, ...]:
        """The pool of a kind whose questions the teacher does not write."""
        return self.pools[kind]

    @property
    def hash(self) -> str:
        """sha256, in hex, of all that messages are made of but the image."""
        return hashlib.sha256(json.dumps(self.stable, sort_keys=True).encode()).hexdigest()


def read_questions(name: str, language: str = "en", folder: str = "", file: str = "") -> tuple[str, ...]:
    """A pool of ways to ask: `name` is "detail_description", or "pairs" for a brief description.

    Taken from `file`, else from the user's `folder`, else the project's, which has English and Korean. A file holds
    one question a line. Raises UserError, one line.
    """
    if file:
        return _read_pool(file)
    own_name = f"questions{'' if language == 'en' else f'.{language}'}.txt"
    for place in (folder, OWN):
        path = os.path.join(place, name, own_name)
        if place and os.path.isfile(path):
            return _read_pool(path)
    raise UserError(f"there are no questions in {language_name(language)} for {name}: write a file of them, one a "
                     "line, and name it with --questions")


def _read_kind(folder: str, demand: str) -> Messages:
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; a folder of prompts holds one per kind of data")
    messages = [{"role": "system", "content": _read(os.path.join(folder, "system_message.txt")) + demand}]
    with user_path(folder):
        names = os.listdir(folder)
    for example in sorted({match[1] for match in map(EXAMPLE.fullmatch, names) if match}):
        for part, role in (("caps", "user"), ("conv", "assistant")):
            messages.append({"role": role, "content": _read(os.path.join(folder, f"{example}_{part}.txt"))})
    return tuple(messages)


def _read_pool(path: str) -> tuple[str, ...]:
    lines = [" ".join(line.split()) for line in _read(path).splitlines()]
    questions = tuple(dict.fromkeys(line for line in lines if line))
    if any("<image>" in question for question in questions):
        raise UserError(f"{path}: a question holds <image>; leave it out, every record gets its own")
    return questions


def _read(path: str) -> str:
    text = read_text(path, encoding="utf-8-sig").strip()
    if not text:
        raise UserError(f"{path}: the file is empty")
    return check_text(text, f"{path}: the text")
