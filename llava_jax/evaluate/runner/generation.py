"""Puts the questions of a benchmark to a model, many at once, and says how far it is."""

import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_jax.errors import UserError
from llava_jax.evaluate.runner.answer_file import NOT_ASKED, Line, to_answer
from llava_jax.evaluate.tasks.base import Answer, Question, Task
from llava_jax.image_files import open_image
from llava_jax.inference.llava import ImageSource, Llava, PromptTooLong, Request
from llava_jax.models.llava import LlavaConfig
from llava_jax.text import templates

READERS = 16  # threads that check images
SCORE_AFTER, SCORING_SHARE = 5.0, 0.02  # seconds between two running scores, and the most of the time they may take


Shown = Callable[[Question], Sequence[ImageSource]]
"""What the model sees with a question: its images, or those of a baseline."""

OWN: Shown = attrgetter("images")


class Generation(NamedTuple):
    """The answer to a question, by its number in the list; `metadata` is for the answer's line.

    A question that is longer than the model's context has an empty answer, and the reason under NOT_ASKED.
    """

    number: int
    text: str
    metadata: Mapping[str, Any]


def check_questions(questions: Iterable[Question], source: str, config: LlavaConfig, shown: Shown = OWN) -> None:
    """Raises UserError that names the first question that cannot be put to a model with this `config`, and `source`.

    Every image is read once, so that a damaged one is known before the first answer, not after hours.
    """
    asked: dict[str | bytes, Any] = {}
    for question in questions:
        images, marks = shown(question), question.text.count(templates.IMAGE)
        if marks not in (0, len(images)):
            raise UserError(f"{source}, question {question.id!r}: its text has {marks} {templates.IMAGE} marks for "
                            f"{len(images)} images")
        try:
            question.text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{source}, question {question.id!r}: its text has half a surrogate pair, which is no "
                            "character") from None
        for image in images:
            asked.setdefault(image, question.id)
    missing = [image for image in asked if isinstance(image, str) and not os.path.isfile(image)]
    if missing:
        raise UserError(f"{source}, question {asked[missing[0]]!r}: {missing[0]}: no such image; {len(missing):,} of "
                        f"{len(asked):,} images are missing")

    def fault(image: str | bytes) -> UserError | None:
        try:
            config.processor(open_image(image, config.exif))
        except UserError as error:
            return error
        return None

    pool = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))
    try:
        found = tqdm(pool.map(fault, asked), "images", len(asked), leave=False, disable=not sys.stderr.isatty())
        faults = [(image, error) for image, error in zip(asked, found, strict=True) if error]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the images in hand alone
    if faults:
        image, error = faults[0]
        raise UserError(f"{source}, question {asked[image]!r}: {error}; {len(faults):,} of {len(asked):,} images "
                        "cannot be used") from error


def generate(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
             shown: Shown = OWN) -> Iterator[Generation]:
    """Every question's answer, written greedily, in the order in which they are ready."""
    why: dict[int, Mapping[str, Any]] = {}
    ready: deque[Generation] = deque()
    fresh = iter(range(len(questions)))
    texts: list[list[str]] = [[] for _ in questions]
    again: deque[tuple[int, Question]] = deque()
    asked: list[int] = []

    def take(number: int, text: str) -> None:
        texts[number].append(text)
        result = task.follow_up(questions[number], texts[number])
        if isinstance(result, Question):
            again.append((number, result))
        else:
            ready.append(Generation(number, result, why.get(number, {})))

    def requests() -> Iterator[Request]:
        asked.clear()
        while True:
            # What an answer leads to goes first, so that little is lost when a run is killed.
            number, question = again.popleft() if again else (next(fresh, None), None)
            if number is None:
                return
            request = _request(question or questions[number], task, shown)
            if error := too_long(llava, request):
                why[number] = {NOT_ASKED: error}
                if question:  # what was said before it stays
                    take(number, "")
                else:
                    ready.append(Generation(number, "", why[number]))
                continue
            asked.append(number)
            yield request

    while True:
        for place, completion in llava.batch_unordered(requests(), batch_size):
            take(asked[place], completion.text.strip())
            while ready:
                yield ready.popleft()
        while ready:
            yield ready.popleft()
        if not again:
            return


def choose(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
           shown: Shown = OWN) -> Iterator[Generation]:
    """Of every question's choices the likeliest, by the sum of its tokens' log-probabilities."""
    asked: list[int] = []
    ready: deque[Generation] = deque()

    def pairs() -> Iterator[tuple[Request, Sequence[str]]]:
        for number, question in enumerate(questions):
            request = _request(question, task, shown)
            if error := too_long(llava, request, question.choices):
                ready.append(Generation(number, "", {NOT_ASKED: error}))
                continue
            asked.append(number)
            yield request, question.choices

    for place, scores in llava.log_likelihoods(pairs(), batch_size):
        best = max(range(len(scores)), key=scores.__getitem__)
        choices = questions[asked[place]].choices
        yield Generation(asked[place], choices[best], {"log_likelihoods": dict(zip(choices, scores, strict=True))})
        while ready:
            yield ready.popleft()
    yield from ready


def ask(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
        shown: Shown = OWN) -> list[Answer]:
    """The answers of `generate` in the order of the questions, without a file of them."""
    found = {said.number: said.text for said in generate(llava, task, questions, batch_size, shown)}
    return [Answer(question.id, found[number], question.text) for number, question in enumerate(questions)]


def _request(question: Question, task: Task, shown: Shown) -> Request:
    return Request(question.text, shown(question), question.max_new_tokens or task.max_new_tokens,
                   stop=question.stop, assistant_prefix=question.assistant_prefix, verbatim=True)


def too_long(llava: Llava, request: Request, choices: Sequence[str] = ()) -> str:
    """Why the model's context has no room for the request, and for each of `choices` behind it; "" if it has."""
    prefix = request.assistant_prefix or templates.get(llava.template).gap
    try:
        llava.prompt_tokens(request)
        for choice in choices:
            llava.prompt_tokens(dataclasses.replace(request, assistant_prefix=prefix + choice))
    except PromptTooLong as error:
        return f"its prompt has {error.tokens:,} tokens, and the model's context holds {error.limit:,}"
    return ""


class RunningScore:
    """Scores the answers so far, now and then: their mean as `text`.

    Only the questions up to the first one without an answer are scored, because some benchmarks depend on the order.

    Args:
      task, data: the benchmark and its data. Without a task there is no score.
      questions: all questions of this process.
      lines: the line of each question's answer, None where there is none yet.
    """

    def __init__(self, task: Task | None, data: str, questions: Sequence[Question], lines: Sequence[Line | None]):
        self.task, self.data, self.questions, self.lines = task, data, questions, list(lines)
        self.text = ""
        self._missing = sum(line is None for line in lines)
        self._next, self._first = time.monotonic() + SCORE_AFTER, 0

    def add(self, number: int, line: Line) -> None:
        """Adds an answer, and scores again if the last time was long enough ago."""
        self.lines[number] = line
        self._missing -= 1
        if self.task and (time.monotonic() >= self._next or not self._missing):
            self._score()

    def _score(self) -> None:
        start = time.monotonic()
        while self._first < len(self.lines) and self.lines[self._first] is not None:
            self._first += 1
        answers = [to_answer(line) for line in self.lines[: self._first]]
        try:
            items = self.task.score(self.data, self.questions[: self._first], answers).items if answers else ()
        except ValueError:  # these alone have no score
            items = ()
        scores = [item.score for item in items if item.score is not None]
        if scores:
            self.text = f"{100 * sum(scores) / len(scores):.1f} % right so far"
        self._next = start + max(SCORE_AFTER, (time.monotonic() - start) / SCORING_SHARE)
