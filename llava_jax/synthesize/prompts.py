"""Prompts for a teacher that is a language model: a folder of plain texts, combined with an image's context.

A folder holds one folder per kind in KINDS, in the layout that LLaVA published: system_message.txt, and worked
examples NNN_caps.txt (the teacher's input) and NNN_conv.txt (the answer it should give). questions.txt beside them
lists ways to ask, one a line, of which every record draws one; questions.ko.txt lists Korean ones, and so on.

Text that all images share comes first, so that a provider's prompt cache can keep it.
"""

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

from llava_jax.annotations.context import Context
from llava_jax.data.records import check_text
from llava_jax.endpoint.request import ChatRequest
from llava_jax.errors import UserError, user_path
from llava_jax.files import read_text
from llava_jax.synthesize.language import language_name

KINDS = ("conversation", "detail_description", "complex_reasoning")
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
    """The prompts of some kinds in one language.

    Attributes:
      shared: System message and worked examples of each kind.
    """

    language: str
    shared: dict[str, Messages]

    @classmethod
    def load(cls, folder: str = "", language: str = "en", kinds: tuple[str, ...] = KINDS) -> "Prompts":
        """Loads the project's own prompts, or those in `folder`.

        For another language than English, the system message ends with a request for it. The worked examples stay as
        they are. Raises UserError, one line, for an unknown language, for a missing or empty kind or file, and for an
        incomplete example.
        """
        name = language_name(language)
        folder = folder or OWN
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder of prompts")
        shared = {}
        for kind in kinds:
            demand = ""
            if language != "en":
                demand = "\n\n" + LANGUAGE[kind].format(language=name)
                demand += "" if kind == "detail_description" else f" {FORMAT}"
            shared[kind] = _read_kind(os.path.join(folder, kind), demand)
        return cls(language, shared)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.shared)

    def messages(self, kind: str, context: Context) -> Messages:
        """Returns the system message, the worked examples and the image's context, as {"role", "content"}.

        For conversations the context is the captions alone, as in the paper.
        """
        image = context.captions_text if kind == "conversation" else context.text
        return (*self.shared[kind], {"role": "user", "content": image})

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of the messages without images."""
        return hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptedTeacher:
    """Makes the requests for a language model. An `Endpoint` sends them."""

    model: str
    prompts: Prompts
    parameters: dict[str, Any]

    @property
    def prompts_hash(self) -> str:
        return self.prompts.hash

    def request(self, kind: str, context: Context, attempt: int = 0) -> ChatRequest:
        return ChatRequest(self.prompts.messages(kind, context), self.parameters, attempt)


def read_questions(name: str, language: str = "en", folder: str = "", file: str = "") -> tuple[str, ...]:
    """Reads ways to ask for a detailed description, or for a brief one if `name` is "pairs".

    They come from `file` if given, otherwise from the user's `folder`, otherwise from the project, which has English
    and Korean ones. A file holds one question a line. Raises UserError, one line.
    """
    if file:
        return _read_pool(file)
    own_name = f"questions{'' if language == 'en' else f'.{language}'}.txt"
    for root in (folder, OWN):
        path = os.path.join(root, name, own_name)
        if root and os.path.isfile(path):
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
