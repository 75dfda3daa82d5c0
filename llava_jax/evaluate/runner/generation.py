"""Asks a model the questions of a task, many at once."""

import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_jax.errors import UserError
from llava_jax.evaluate.runner.answer_file import NOT_ASKED
from llava_jax.evaluate.tasks.base import Answer, Question, Task
from llava_jax.image_files import open_image
from llava_jax.inference.llava import ImageSource, Llava, Request
from llava_jax.models.llava import LlavaConfig
from llava_jax.text import templates
from llava_jax.text.encode import PromptTooLong

NUM_READERS = 16
"""Number of threads that check images."""

ImageChooser = Callable[[Question], Sequence[ImageSource]]
"""Returns the images that the model sees with a question: the question's own, or those of a baseline."""

OWN_IMAGES: ImageChooser = attrgetter("images")


class Generation(NamedTuple):
    """The answer to a question.

    A question longer than the model's context has an empty answer, and `metadata` has the reason as NOT_ASKED.
    """

    index: int  # position of the question in the list
    text: str
    metadata: Mapping[str, Any]  # for the answer's line


def check_questions(questions: Iterable[Question], source: str, config: LlavaConfig,
                    images_of: ImageChooser = OWN_IMAGES) -> None:
    """Raises UserError that names `source` and the first question that a model with this `config` cannot be asked.

    Every image is read once, so that a damaged one is reported before the first answer, not after hours.
    """
    asked: dict[str | bytes, Any] = {}
    for question in questions:
        images, marks = images_of(question), question.text.count(templates.IMAGE)
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

    def error_of(image: str | bytes) -> UserError | None:
        try:
            config.processor(open_image(image, config.exif))
        except UserError as error:
            return error
        return None

    pool = ThreadPoolExecutor(min(NUM_READERS, os.cpu_count() or 1))
    try:
        results = tqdm(pool.map(error_of, asked), "images", len(asked), leave=False, disable=not sys.stderr.isatty())
        errors = [(image, error) for image, error in zip(asked, results, strict=True) if error]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits only for images in progress
    if errors:
        image, error = errors[0]
        raise UserError(f"{source}, question {asked[image]!r}: {error}; {len(errors):,} of {len(asked):,} images "
                        "cannot be used") from error


def generate(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
             images_of: ImageChooser = OWN_IMAGES) -> Iterator[Generation]:
    """Yields the greedy answer to every question, in the order in which they are ready."""
    metadata: dict[int, Mapping[str, Any]] = {}
    ready: deque[Generation] = deque()
    unasked = iter(range(len(questions)))
    texts: list[list[str]] = [[] for _ in questions]
    follow_ups: deque[tuple[int, Question]] = deque()
    asked: list[int] = []

    def add(index: int, text: str) -> None:
        texts[index].append(text)
        result = task.follow_up(questions[index], texts[index])
        if isinstance(result, Question):
            follow_ups.append((index, result))
        else:
            ready.append(Generation(index, result, metadata.get(index, {})))

    def requests() -> Iterator[Request]:
        asked.clear()
        while True:
            # Follow-ups come first, so that little is lost when a run is killed.
            index, follow_up = follow_ups.popleft() if follow_ups else (next(unasked, None), None)
            if index is None:
                return
            request = make_request(follow_up or questions[index], task, images_of)
            if error := too_long(llava, request):
                metadata[index] = {NOT_ASKED: error}
                if follow_up:  # keeps the texts before it
                    add(index, "")
                else:
                    ready.append(Generation(index, "", metadata[index]))
                continue
            asked.append(index)
            yield request

    while True:
        for number, completion in llava.batch_unordered(requests(), batch_size):
            add(asked[number], completion.text.strip())
            while ready:
                yield ready.popleft()
        while ready:
            yield ready.popleft()
        if not follow_ups:
            return


def choose(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
           images_of: ImageChooser = OWN_IMAGES) -> Iterator[Generation]:
    """Yields the most likely choice of every question, by the sum of its tokens' log-probabilities."""
    asked: list[int] = []
    ready: deque[Generation] = deque()

    def pairs() -> Iterator[tuple[Request, Sequence[str]]]:
        for index, question in enumerate(questions):
            request = make_request(question, task, images_of)
            if error := too_long(llava, request, question.choices):
                ready.append(Generation(index, "", {NOT_ASKED: error}))
                continue
            asked.append(index)
            yield request, question.choices

    for number, scores in llava.log_likelihoods(pairs(), batch_size):
        best = max(range(len(scores)), key=scores.__getitem__)
        choices = questions[asked[number]].choices
        yield Generation(asked[number], choices[best], {"log_likelihoods": dict(zip(choices, scores, strict=True))})
        while ready:
            yield ready.popleft()
    yield from ready


def ask(llava: Llava, task: Task, questions: Sequence[Question], batch_size: int = 16,
        images_of: ImageChooser = OWN_IMAGES) -> list[Answer]:
    """Returns the answers of `generate` in the order of the questions, without a file."""
    generations = generate(llava, task, questions, batch_size, images_of)
    texts = {generation.index: generation.text for generation in generations}
    return [Answer(question.id, texts[index], question.text) for index, question in enumerate(questions)]


def make_request(question: Question, task: Task, images_of: ImageChooser = OWN_IMAGES) -> Request:
    return Request(question.text, images_of(question), question.max_new_tokens or task.max_new_tokens,
                   stop=question.stop, assistant_prefix=question.assistant_prefix, verbatim=True)


def too_long(llava: Llava, request: Request, choices: Sequence[str] = ()) -> str:
    """Returns the reason why the request, or a choice after it, exceeds the model's context; "" if all fit."""
    prefix = request.assistant_prefix or templates.get(llava.template).gap
    try:
        llava.prompt_tokens(request)
        for choice in choices:
            llava.prompt_tokens(dataclasses.replace(request, assistant_prefix=prefix + choice))
    except PromptTooLong as error:
        return f"its prompt has {error.tokens:,} tokens, and the model's context holds {error.limit:,}"
    return ""
