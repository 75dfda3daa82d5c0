"""A task is a benchmark: it loads questions from the benchmark's files, and scores answers.

Tasks know nothing about models. `runner.generation` asks a model the questions of any task. A file of answers from
elsewhere is scored in the same way.
"""

import importlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava_jax.errors import UserError
from llava_jax.files import make_folder, write_file

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
"""Maps the name of a task to "module:class". A module is imported when its task is used."""

LETTER_INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""Instructions that LLaVA-1.5 appends to questions, as its training data do."""

MAX_EXAMPLES, MAX_QUOTED = 3, 60
"""Number of answers that a note quotes, and number of characters of a quotation."""

MAX_PHRASE_WORDS = 10
NOT_A_PHRASE = "are no word or short phrase, which is all that an exact match finds"
EMPTY = "are empty, with nothing to judge"
_MARKUP = re.compile(r"\*\*|__|```|^[#(\[<\"']|[!?:]$")


@dataclass(frozen=True)
class Question:
    """One question as the model gets it. The images come before the text, each with a line break after it."""

    id: str | int
    text: str
    images: tuple[str | bytes, ...] = ()  # paths, or contents of image files
    row: Mapping[str, Any] = field(default_factory=dict)  # row of the benchmark's file
    choices: tuple[str, ...] = ()  # possible answers, for choosing by likelihood
    prompt: str | None = None  # prompt in the answer's line; None: the text
    fields: Mapping[str, Any] = field(default_factory=dict)  # additional fields of the answer's line
    assistant_prefix: str = ""  # text that the answer is forced to start with
    stop: tuple[str, ...] = ()  # texts that end the answer, in addition to the template's
    max_new_tokens: int | None = None  # None: the task's

    @property
    def logged_prompt(self) -> str:
        """Prompt in the answer's line."""
        return self.text if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Answer:
    """One line of an answer file. `line` has all its fields."""

    id: str | int
    text: str
    prompt: str = ""
    line: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredAnswer:
    """The score of one answer, from 0 to 1, or None if the task cannot score it."""

    id: str | int
    score: float | None
    reference: str = ""
    parsed: str = ""  # answer as the scorer read it
    category: str = ""


@dataclass(frozen=True)
class Scores:
    """Unrounded figures in the order of the published table. `main` is the name of the published one."""

    figures: Mapping[str, float]
    main: str
    items: Sequence[ScoredAnswer] = ()
    notes: Sequence[str] = ()


class Task:
    """A benchmark. Subclasses override `load` and `score`, and other methods if necessary.

    The options of a benchmark are the fields of its class, a frozen dataclass. Each option has a default.
    """

    title: ClassVar[str]
    required_files: ClassVar[str]  # description of the files, and where they come from
    max_new_tokens: ClassVar[int] = 128
    uses_answer_order: ClassVar[bool] = False  # whether the score depends on the order of the answers
    uses_prompts: ClassVar[bool] = False  # whether the score depends on the prompts in the answers' lines
    required_packages: ClassVar[tuple[str, ...]] = ()  # packages that `submission` imports

    def load(self, data: str) -> list[Question]:
        """Returns the questions of the folder (or file) `data`, in the order of its files.

        Raises UserError for a missing file, or for files of another version or benchmark.
        """
        raise NotImplementedError

    def resolve_image_root(self, data: str) -> str:
        """Returns the folder of the images. A page shows no image from outside of it."""
        return data if os.path.isdir(data) else os.path.dirname(data)

    def question_path(self, data: str) -> str:
        """Returns the file of the questions, for messages."""
        return data

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        """Raises UserError if a file is invalid that scoring needs and `load` does not open."""

    def follow_up(self, question: Question, texts: Sequence[str]) -> Question | str:
        """Returns the next question after the model's answers `texts`, or the final text of the answer.

        A task with several rounds returns a Question with the same id until it has its answer.
        """
        return texts[-1]

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Scores answers in the order of their file.

        There is one answer per question. With --partial answers may be missing: they count as in the original scorer.
        """
        raise NotImplementedError

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns the files that the benchmark's server accepts: path in the results folder -> content."""
        return {}

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """Writes the files of `submission` to a folder, and returns their paths."""
        paths = []
        for name, content in self.submission(data, questions, answers).items():
            paths.append(os.path.join(folder, name))
            make_folder(os.path.dirname(paths[-1]))
            write_file(paths[-1], content)
        return paths


def get_task(name: str) -> type[Task]:
    """Returns the class of a task. Raises UserError with all names for an unknown one."""
    if name not in TASKS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def index_questions(questions: Sequence[Question], answers: Sequence[Answer], title: str = "") -> dict[Any, Question]:
    """Returns the questions by id. Raises UserError for an answer to another question."""
    by_id = {question.id: question for question in questions}
    for answer in answers:
        if answer.id not in by_id:
            raise UserError(f"{title}there is no question {answer.id!r}; these are answers to other questions")
    return by_id


def group_scores(scores: Iterable[tuple[Any, Iterable[Any]]]) -> dict[Any, list]:
    """Groups scores by name, in the order of first appearance. `scores` has each score with the names of its groups."""
    groups = defaultdict(list)
    for score, names in scores:
        for name in names:
            groups[name].append(score)
    return groups


def unparsed_notes(unparsed: Sequence[Answer], total: int, how: str) -> list[str]:
    """Returns a note that counts and quotes the answers that the scorer could not read, or nothing without any.

    `how` completes the sentence "3 of 100 answers ...".
    """
    if not unparsed:
        return []
    quoted = "; ".join(f"question {answer.id!r}: {quote(answer.text)}" for answer in unparsed[:MAX_EXAMPLES])
    return [f"{len(unparsed):,} of {total:,} answers {how} ({quoted})"]


def quote(text: str) -> str:
    """Returns the start of a text in quotation marks, safe to print."""
    return repr(text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "...")


def is_short_phrase(text: str, normalized: str) -> bool:
    """Whether an answer is a word or a short phrase, which is all that an exact match finds.

    That is one line of a few words with a Latin letter or digit, and no markup in `normalized`, the compared form.
    """
    return bool(re.search("[a-z0-9]", normalized)) and "\n" not in text.strip() \
        and len(normalized.split()) <= MAX_PHRASE_WORDS and not _MARKUP.search(normalized)
