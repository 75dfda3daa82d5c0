"""The tasks of a run: requests to a teacher about images, and verdicts on its answers.

A task is an image and a kind of record. Its requests and the verdict on an answer depend on the settings and the inputs
alone. The output of a run can therefore be made from its log of answers at any time: a killed run continues, and a
better parser or a stricter rule costs nothing.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import tyro

from llava_jax.annotations.context import AnnotationSource, Context, open_contexts
from llava_jax.cli import Flag
from llava_jax.endpoint.client import without_password
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.errors import UserError
from llava_jax.files import parse_json, read_json, require_fields
from llava_jax.synthesize import evidence, parse
from llava_jax.synthesize.evidence import Evidence
from llava_jax.synthesize.parse import Turn
from llava_jax.synthesize.prompts import KINDS, PromptedTeacher, Prompts, read_questions
from llava_jax.synthesize.rules import RulesTeacher
from llava_jax.text.templates import IMAGE

T = TypeVar("T")

COUNTS = {"conversation": "conversation", "detail_description": "detail", "complex_reasoning": "complex"}
"""Name of the option with the number of images, by kind."""
LOG, SETTINGS = "answers.jsonl", "settings.json"
"""Files in a run's folder: all answers so far, and the settings of the last command."""


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """Teacher, images and kinds of records. Call `check` before use."""

    source: Annotated[AnnotationSource, tyro.conf.arg(name="")]
    """Captions and boxes of the images."""
    out: str = "data/instruct"
    """Folder for the answers and the records. The same command continues a stopped run."""
    teacher: Literal["openai", "rules"] = "openai"
    """Author of the answers: openai is any server with OpenAI's chat API; rules need boxes, but no model and no
    server."""
    model: str = ""
    """Name of the model on the server. There is no default, because models come and go."""
    base_url: str = ""
    """Address of the server's API, such as http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL, or OpenAI's own."""
    language: str = "en"
    """Language of the records: a code such as en, ko, fr."""
    prompts: str = ""
    """Folder with your own prompts: KIND/system_message.txt, KIND/NNN_caps.txt and KIND/NNN_conv.txt."""
    questions: str = ""
    """File with requests for a detailed description, one a line."""
    conversation: int | None = None
    """Number of images, drawn by seed, with a conversation; default: all, 0 for none."""
    detail: int | None = None
    """Number of images, drawn by seed, with a detailed description; default: all, 0 for none."""
    complex: int | None = None
    """Number of images, drawn by seed, with complex reasoning; default: all, 0 for none."""
    short: Flag = False
    """Whether conversations have answers of a word or two, as the VQA data of LLaVA-1.5 (--teacher rules)."""
    seed: int = 0
    """Random seed for the images, the questions for descriptions, the position of <image>, and the merged order."""
    attempts: int = 3
    """Maximum number of requests of a task whose answers are rejected for their content."""
    drop_contradictions: Flag = False
    """Whether to reject answers that contradict captions or boxes (English). Otherwise flagged.jsonl lists them."""
    max_new_tokens: int = 2048
    """Maximum number of tokens of an answer, hidden reasoning included."""
    temperature: float | None = None
    """Sampling temperature; sent only if given, because many models refuse it."""
    parameters: str = ""
    """Further parameters of the request as a JSON object, such as '{"reasoning_effort": "low"}'."""

    @property
    def request_parameters(self) -> dict[str, Any]:
        """Parameters of the requests. Raises UserError if `parameters` is no JSON object, or has an invalid limit."""
        further = parse_json(self.parameters or "{}", f"--parameters {self.parameters}: not a JSON object")
        try:
            json.dumps(further, allow_nan=False)
        except ValueError as error:
            raise UserError(f"--parameters {self.parameters}: {error}") from None
        for name in {"max_tokens", "max_completion_tokens"} & set(further):
            if type(further[name]) is not int or further[name] < 1:
                raise UserError(f"--parameters: {name} is {further[name]!r:.40}: it must be a whole number above 0")
        if reserved := {"model", "messages", "stream", "n"} & set(further):
            raise UserError(f"--parameters: {sorted(reserved)[0]} cannot be set")
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"max_completion_tokens": self.max_new_tokens, **temperature, **further}

    def check(self) -> None:
        """Raises UserError, one line, for invalid values and for prompts that cannot be read."""
        self.check_values()
        _open_teacher(self)
        _read_questions(self)

    def check_values(self) -> None:
        """Raises UserError for invalid values, without reading any file."""
        minimum = dict.fromkeys(("seed", *COUNTS.values()), 0) | {"attempts": 1, "max_new_tokens": 1}
        for name in minimum:
            value = getattr(self, name)
            if value is not None and value < minimum[name]:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {minimum[name]}")
        if not any(self.count(kind) != 0 for kind in KINDS):
            raise UserError("--conversation, --detail and --complex are all 0: there is nothing to make")
        if self.teacher == "openai" and not self.model:
            raise UserError("name the teacher with --model NAME, or take --teacher rules, which needs none")
        if self.short and self.teacher != "rules":
            raise UserError("--short says nothing to a teacher that is a model; leave it out")
        if self.teacher == "rules":
            for name in ("model", "base_url", "prompts", "temperature", "parameters"):
                if getattr(self, name) not in ("", None):
                    raise UserError(f"--{name.replace('_', '-')} says nothing to --teacher rules; leave it out")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be a number from 0")
        _ = self.request_parameters  # raises UserError

    def count(self, kind: str) -> int | None:
        """Returns the number of images of a kind; None means all."""
        return getattr(self, COUNTS[kind])

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if self.count(kind) != 0)

    @property
    def log(self) -> str:
        return os.path.join(self.out, LOG)

    def as_json(self) -> dict[str, Any]:
        """Returns the settings with absolute paths, and without a password in the address."""
        fields = dataclasses.asdict(self)
        fields["base_url"] = without_password(self.base_url)
        for name in ("out", "prompts", "questions"):
            fields[name] = fields[name] and os.path.abspath(fields[name])
        for name in ("captions", "instances", "data"):
            path = fields["source"][name]
            fields["source"][name] = os.path.abspath(path) if path and "://" not in path else path
        return fields

    @classmethod
    def load(cls, folder: str) -> "SynthesisSettings":
        """Reads the settings of the run in `folder`, which may have been moved. Raises UserError."""
        path = os.path.join(folder, SETTINGS)
        if not os.path.exists(path):
            raise UserError(f"{folder}: no synthesis has run there (there is no {SETTINGS})")
        try:
            fields = read_json(path)
            require_fields(fields, {"source": dict, "teacher": str, "model": str, "language": str}, path)
            source = _read_fields(AnnotationSource, fields["source"], "source")
            settings = _read_fields(cls, fields | {"source": source, "out": folder}, path)
            settings.check_values()
        except UserError as error:
            what = str(error).removeprefix(f"{path}: ")
            raise UserError(f"{path}: not what a synthesis writes ({what}); run its command again") from None
        return settings


def _read_fields(kind: type[T], fields: dict[str, Any], name: str) -> T:
    """Makes a dataclass from a file's fields. Raises UserError that starts with `name` if a field is invalid."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(fields.keys() - hints.keys()):
        raise UserError(f"{name}: unknown field {unknown[0]!r:.60}")
    for field, value in fields.items():
        choices = typing.get_args(hints[field])
        if typing.get_origin(hints[field]) is Literal:
            if value not in choices:
                raise UserError(f"{name}: {field!r} is {value!r:.60}; it can be {', '.join(choices)}")
            continue
        kinds = choices or (hints[field],)
        require_fields(fields, {field: (*kinds, int) if float in kinds else kinds}, name)
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


class Verdict(NamedTuple):
    """The verdict on an answer, which is accepted if there is no reason against it."""

    turns: tuple[Turn, ...]  # without <image>; () if the answer could not be parsed
    reason: str  # one of parse.REASONS, "contradiction" or "request_failed", or ""
    detail: str
    evidence: Evidence | None

    @property
    def accepted(self) -> bool:
        return not self.reason


class Outcome(NamedTuple):
    """The state of a task."""

    verdict: Verdict | None  # on the accepted or the last answer; None before the first answer
    answers: tuple[tuple[str, Response], ...]  # all answers so far with their keys; the accepted one is the last
    done: bool  # whether an answer is accepted, or all attempts are used up


@dataclasses.dataclass(frozen=True)
class SynthesisTask:
    """An image, and a kind of record to make of it."""

    kind: str
    context: Context
    question: str | None  # of a description; the teacher writes the questions of other kinds
    synthesis: "Synthesis" = dataclasses.field(repr=False, compare=False)

    @property
    def name(self) -> tuple[str, str]:
        return self.kind, self.context.id

    def request(self, attempt: int) -> ChatRequest:
        return self.synthesis.teacher.request(self.kind, self.context, attempt)

    def key(self, attempt: int) -> str:
        """Returns the key of the answer in the log."""
        return self.request(attempt).key(self.synthesis.teacher.model)

    def verdict(self, response: Response) -> Verdict:
        """Returns the verdict on an answer. It depends on the task and the answer alone."""
        settings, turns, found = self.synthesis.settings, (), None
        try:
            turns = parse.parse(self.kind, response.text, response.finish_reason, self.question, settings.language)
            found = evidence.check(turns, self.context, self.synthesis.contexts.categories, settings.language)
            if found.findings and settings.drop_contradictions:
                first = found.findings[0]
                raise parse.Reject("contradiction", f"{first.kind}: {first.claim!r}, but {first.against}")
        except parse.Reject as reject:
            return Verdict(turns, reject.reason, reject.detail, found)
        return Verdict(turns, "", "", found)

    def outcome(self, log: Mapping[str, Response]) -> Outcome:
        """Returns the state of the task by the answers in the log."""
        verdict, answers = None, ()
        for attempt in range(self.synthesis.attempts):
            key = self.key(attempt)
            if key not in log:
                return Outcome(verdict, answers, False)
            answers = (*answers, (key, log[key]))
            verdict = self.verdict(answers[-1][1])
            if verdict.accepted:
                break
        return Outcome(verdict, answers, True)

    def to_record(self, turns: tuple[Turn, ...]) -> dict[str, Any]:
        """Returns a record of LLaVA's JSON. The seed puts `<image>` before or after the first question."""
        first, *rest = turns
        before = random.Random(f"{self.synthesis.settings.seed} place {self.kind} {self.context.id}").random() < 0.5
        value = f"{IMAGE}\n{first['value']}" if before else f"{first['value']}\n{IMAGE}"
        conversation = [{"from": "human", "value": value}, *rest]
        return {"id": self.context.id, "image": self.context.image, "conversations": conversation}


class Synthesis(Sequence[SynthesisTask]):
    """The tasks of a run, by image in the order of the source. Every SynthesisTask is made on access.

    Raises UserError, one line, if prompts or images cannot be read, or if there are too few images.
    """

    def __init__(self, settings: SynthesisSettings):
        self.settings = settings
        self.teacher, self.questions = _open_teacher(settings), _read_questions(settings)
        # Rules give the same answer again.
        self.attempts = 1 if settings.teacher == "rules" else settings.attempts
        self.contexts = open_contexts(settings.source)
        if isinstance(self.teacher, RulesTeacher):
            self.teacher.check(self.contexts.categories)
        # int64 [tasks, 2]: index of the image, and of the kind
        self._index = np.argwhere(np.stack([self._draw(kind) for kind in KINDS], axis=1))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> SynthesisTask:
        image, number = self._index[index].tolist()
        kind, context, question = KINDS[number], self.contexts[image], None
        if kind == "detail_description":
            draw = random.Random(f"{self.settings.seed} question {context.id}")
            question = draw.choice(self.questions)
        return SynthesisTask(kind, context, question, self)

    def count(self, kind: str) -> int:
        """Returns the number of tasks of a kind."""
        return len(self._of(kind))

    def drawn(self, seed: int, kinds: Sequence[str] = KINDS) -> Iterator[SynthesisTask]:
        """Yields all tasks of these kinds in random order, alternating between the kinds."""
        orders = [self._of(kind).tolist() for kind in kinds]
        for kind, order in zip(kinds, orders, strict=True):
            random.Random(f"{seed} drawn {kind}").shuffle(order)
        for turn in itertools.zip_longest(*orders):
            yield from (self[index] for index in turn if index is not None)

    def _of(self, kind: str) -> np.ndarray:
        """Returns the indices of the tasks of a kind."""
        return np.flatnonzero(self._index[:, 1] == KINDS.index(kind))

    def _draw(self, kind: str) -> np.ndarray:
        """Returns whether the kind is made of each image, bool [images]."""
        wanted, num_images = self.settings.count(kind), len(self.contexts)
        if wanted is None:
            return np.ones(num_images, bool)
        if wanted > num_images:
            raise UserError(f"--{COUNTS[kind]} {wanted}: there are only {num_images:,} images")
        chosen = np.zeros(num_images, bool)
        chosen[random.Random(f"{self.settings.seed} {kind}").sample(range(num_images), wanted)] = True
        return chosen


def _open_teacher(settings: SynthesisSettings) -> PromptedTeacher | RulesTeacher:
    if settings.teacher == "rules":
        return RulesTeacher(settings.language, settings.seed, settings.short)
    prompts = Prompts.load(settings.prompts, settings.language, settings.kinds)
    return PromptedTeacher(settings.model, prompts, settings.request_parameters)


def _read_questions(settings: SynthesisSettings) -> tuple[str, ...]:
    """Returns ways to ask for a detailed description, if the run makes any."""
    if "detail_description" not in settings.kinds:
        return ()
    return read_questions("detail_description", settings.language, settings.prompts, settings.questions)
