"""What a benchmark is: questions from its files, and scores from answers.

A task knows nothing about models. `runner.generation` asks a model the questions, and a file of answers from elsewhere
is scored in the same way.
"""

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava_jax.errors import UserError

TASKS = {
    "scenes": "llava_jax.evaluate.tasks.scenes:Scenes",
    "pope": "llava_jax.evaluate.tasks.pope:Pope",
    "mme": "llava_jax.evaluate.tasks.mme:Mme",
    "vqav2": "llava_jax.evaluate.tasks.vqa:VqaV2",
    "vizwiz": "llava_jax.evaluate.tasks.vqa:VizWiz",
    "gqa": "llava_jax.evaluate.tasks.gqa:Gqa",
    "textvqa": "llava_jax.evaluate.tasks.textvqa:TextVqa",
    "mmbench": "llava_jax.evaluate.tasks.mmbench:MMBench",
    "mmbench-cn": "llava_jax.evaluate.tasks.mmbench:MMBenchCN",
    "seed": "llava_jax.evaluate.tasks.seed:Seed",
    "mm-vet": "llava_jax.evaluate.tasks.mmvet:MMVet",
    "scienceqa": "llava_jax.evaluate.scienceqa.task:ScienceQA",
    "spatial": "llava_jax.evaluate.probes.spatial:Spatial",
    "multilingual": "llava_jax.evaluate.probes.multilingual:Multilingual",
    "llava-bench-coco": "llava_jax.evaluate.tasks.llava_bench:LlavaBenchCoco",
    "llava-bench-wild": "llava_jax.evaluate.tasks.llava_bench:LlavaBenchWild",
}
"""Name -> "module:class"; a module is imported when its benchmark is used."""

LETTER_INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 appends to a question, as its training data do (Improved Baselines with Visual Instruction Tuning)."""


EXAMPLES, QUOTED = 3, 60  # answers that a note quotes, and characters of each
NOT_A_PHRASE = "are no word or short phrase, which is all that an exact match finds"
EMPTY = "are empty, with nothing to judge"
LONGEST_PHRASE = 10  # words
_MARKUP = re.compile(r"\*\*|__|```|^[#(\[<\"']|[!?:]$")


@dataclass(frozen=True)
class Question:
    """One question as the model gets it.

    `text` has no mark for the image: images stand before it, as `<image>\\n`. No images: the model reads text alone.
    """

    id: str | int
    text: str
    images: tuple[str | bytes, ...] = ()  # paths, or the bytes of image files
    row: Mapping[str, Any] = field(default_factory=dict)  # the benchmark's own row
    choices: tuple[str, ...] = ()  # possible answers, to choose among by likelihood
    prompt: str | None = None  # what the answer's line says was asked, where that is not `text`
    fields: Mapping[str, Any] = field(default_factory=dict)  # what the answer's line holds besides
    assistant_prefix: str = ""  # text that the answer is forced to start with (`Request.assistant_prefix`)
    stop: tuple[str, ...] = ()  # texts that end the answer, in addition to the template's
    max_new_tokens: int | None = None  # None: the benchmark's


@dataclass(frozen=True)
class Answer:
    """One line of an answer file; `line` is all of it."""

    id: str | int
    text: str
    prompt: str = ""
    line: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredAnswer:
    """How one answer was scored: `score` 0..1, or None where nothing here can score it."""

    id: str | int
    score: float | None
    reference: str = ""
    parsed: str = ""  # what the scorer made of the answer
    category: str = ""


@dataclass(frozen=True)
class Scores:
    """`figures`: name -> value, unrounded, in the order of the published table; `main` names the published figure."""

    figures: Mapping[str, float]
    main: str
    items: Sequence[ScoredAnswer] = ()
    notes: Sequence[str] = ()


class Task:
    """A benchmark; subclasses override what they have.

    A benchmark's options are the fields of its class, a frozen dataclass; each has a default.
    """

    title: ClassVar[str]
    required_files: ClassVar[str]  # the files of its folder, and where they come from
    max_new_tokens: ClassVar[int] = 128
    uses_answer_order: ClassVar[bool] = False  # whether the score depends on the order of the answers
    uses_prompts: ClassVar[bool] = False  # whether the score depends on the prompts of the answers' lines
    required_packages: ClassVar[tuple[str, ...]] = ()  # packages that `write_submission` imports

    def load(self, data: str) -> list[Question]:
        """The questions of the folder (or file) `data`, in the order of its files.

        Raises UserError, one line each, for a file or image that is missing, and for files of
        another version or benchmark.
        """
        raise NotImplementedError

    def resolve_image_root(self, data: str) -> str:
        """The folder of the images; a page shows none from outside of it."""
        return data if os.path.isdir(data) else os.path.dirname(data)

    def question_path(self, data: str) -> str:
        """The file of the questions, as messages name it."""
        return data

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        """Raises UserError for a file that the score or upload of `questions` needs and `read` has not opened, so that
        it is told before hours of answers.
        """

    def follow_up(self, question: Question, texts: Sequence[str]) -> Question | str:
        """What comes after the model has said `texts`, one for each time it was asked, of this `question`.

        That is a Question with which it is asked again, under the same id; or, at the end, the text of its answer.
        """
        return texts[-1]

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Scores `answers`, which stand in the order of the answer file.

        There is one for each question, unless the user asked to score a part: then a missing one counts as the
        original's scorer counts it.
        """
        raise NotImplementedError

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """Writes what the benchmark's server takes into `folder`; returns the paths."""
        return []


def unparsed_notes(unread: Sequence[Answer], total: int, how: str) -> list[str]:
    """A note on the answers from which the rules of scoring read nothing, with a few of them. `how` says what they lack
    and how they count. Nothing if there are none.
    """
    if not unread:
        return []
    named = "; ".join(f"question {answer.id!r}: {quote(answer.text)}" for answer in unread[:EXAMPLES])
    return [f"{len(unread):,} of {total:,} answers {how} ({named})"]


def quote(text: str) -> str:
    """The start of a text in quotation marks, safe to print."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")


def is_short_phrase(text: str, form: str) -> bool:
    """Whether an answer is a word or a short phrase, the only kind that an exact match finds: one line of a few words
    with a Latin letter or digit, and no markup in `form`, the answer as it is compared.
    """
    return bool(re.search("[a-z0-9]", form)) and "\n" not in text.strip() and len(form.split()) <= LONGEST_PHRASE \
        and not _MARKUP.search(form)


def get_task(name: str) -> type[Task]:
    """The class of a benchmark; UserError that lists them all if there is none of that name."""
    if name not in TASKS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    return getattr(importlib.import_module(module), kind)
