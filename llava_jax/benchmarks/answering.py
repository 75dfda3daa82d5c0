"""Puts the questions of a benchmark to a model, many at once, and says how far it is."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_jax.benchmarks.answers import Line, to_answer
from llava_jax.benchmarks.bench import Answer, Bench, Question
from llava_jax.errors import UserError
from llava_jax.inference.llava import ImageSource, Llava, Request

SECONDS_PER_LINE = 60.0  # of progress, where there is no terminal
SCORE_AFTER, SCORING_SHARE = 5.0, 0.02  # seconds between two running scores, and the most of the time they may take


Shown = Callable[[Question], Sequence[ImageSource]]
"""What the model sees with a question: its images, or those of a baseline."""

OWN: Shown = attrgetter("images")


class Said(NamedTuple):
    """The answer to a question, by its number in the list; `metadata` is for the answer's line."""

    number: int
    text: str
    metadata: Mapping[str, Any]


def check_images(questions: Iterable[Question]) -> None:
    """UserError that names the first image that is not there, and says how many are not."""
    paths = dict.fromkeys(image for question in questions for image in question.images if isinstance(image, str))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{missing[0]}: no such image; {len(missing):,} of {len(paths):,} images are missing")


def generate(llava: Llava, bench: Bench, questions: Sequence[Question], batch_size: int = 16,
             shown: Shown = OWN) -> Iterator[Said]:
    """Every question's answer, written greedily, in the order in which they are ready."""
    fresh = iter(range(len(questions)))
    texts: list[list[str]] = [[] for _ in questions]
    again: deque[tuple[int, Question]] = deque()
    asked: list[int] = []

    def requests() -> Iterator[Request]:
        asked.clear()
        while True:
            # What an answer leads to goes first, so that little is lost when a run is killed.
            number, question = again.popleft() if again else (next(fresh, None), None)
            if number is None:
                return
            asked.append(number)
            yield _request(question or questions[number], bench, shown)

    while True:
        for place, completion in llava.each(requests(), batch_size):
            number = asked[place]
            texts[number].append(completion.text.strip())
            result = bench.follow_up(questions[number], texts[number])
            if isinstance(result, Question):
                again.append((number, result))
            else:
                yield Said(number, result, {})
        if not again:
            return


def choose(llava: Llava, bench: Bench, questions: Sequence[Question], batch_size: int = 16,
           shown: Shown = OWN) -> Iterator[Said]:
    """Of every question's choices the likeliest, by the sum of its tokens' log-probabilities."""
    pairs = ((_request(question, bench, shown), question.choices) for question in questions)
    for number, scores in llava.log_likelihoods(pairs, batch_size):
        best = max(range(len(scores)), key=scores.__getitem__)
        choices = questions[number].choices
        yield Said(number, choices[best], {"log_likelihoods": dict(zip(choices, scores, strict=True))})


def ask(llava: Llava, bench: Bench, questions: Sequence[Question], batch_size: int = 16,
        shown: Shown = OWN) -> list[Answer]:
    """The answers of `generate` in the order of the questions, without a file of them."""
    found = {said.number: said.text for said in generate(llava, bench, questions, batch_size, shown)}
    return [Answer(question.id, found[number], question.text) for number, question in enumerate(questions)]


def _request(question: Question, bench: Bench, shown: Shown) -> Request:
    return Request(question.text, shown(question), question.max_new_tokens or bench.max_new_tokens,
                   stop=question.stop, begun=question.begun, verbatim=True)


class Progress:
    """A bar on a terminal, else a line a minute: how many are answered, how long it still takes, how many are right.

    Args:
      bench, data: what scores the answers; `bench` None leaves the score out.
      questions: all of this process.
      lines: for each question the line of its answer, or None; of those that are there now, and take no time.
    """

    def __init__(self, bench: Bench | None, data: str, questions: Sequence[Question], lines: Sequence[Line | None]):
        self.bench, self.data, self.questions, self.lines = bench, data, questions, list(lines)
        self.done = self.found = sum(line is not None for line in lines)
        self.right, self.begun = "", time.monotonic()
        self.told, self.scored, self.first = self.begun, self.begun + SCORE_AFTER, 0
        self.bar = tqdm(total=len(questions), initial=self.found, unit=" answers", smoothing=0.05,
                        disable=not sys.stderr.isatty())

    def add(self, number: int, line: Line) -> None:
        """Another answer is written."""
        self.lines[number] = line
        self.done += 1
        now = time.monotonic()
        if self.bench and (now >= self.scored or self.done == len(self.lines)):
            self._score(now)
        self.bar.update()
        if self.bar.disable and now > self.told + SECONDS_PER_LINE:
            self.told = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """All of it in one line."""
        seconds, fresh = time.monotonic() - self.begun, self.done - self.found
        rate = fresh / seconds if seconds else 0.0
        parts = [f"{self.done:,} of {len(self.lines):,} answers", f"{rate:.1f} a second"]
        if rate:
            minutes, rest = divmod(round((len(self.lines) - self.done) / rate), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{rest:02} left")
        return ", ".join([*parts, *filter(None, [self.right])])

    def close(self) -> None:
        self.bar.close()

    def _score(self, now: float) -> None:
        """The mean score of the questions up to the first that has no answer: some benchmarks go by the order."""
        while self.first < len(self.lines) and self.lines[self.first] is not None:
            self.first += 1
        answers = [to_answer(line) for line in self.lines[: self.first]]
        try:
            items = self.bench.score(self.data, self.questions[: self.first], answers).items if answers else ()
        except ValueError:  # these alone have no score
            items = ()
        scores = [item.score for item in items if item.score is not None]
        if scores:
            self.right = f"{100 * sum(scores) / len(scores):.1f} % right so far"
            self.bar.set_postfix_str(self.right, refresh=False)
        self.scored = now + max(SCORE_AFTER, (time.monotonic() - now) / SCORING_SHARE)
