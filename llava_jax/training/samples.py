"""What the model in training answers to a few fixed questions."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

from llava_jax import config
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.images import open_image
from llava_jax.inference.llava import Llava, Request
from llava_jax.models.llava import Parameters
from llava_jax.training.start import Run

SHOWN = 4
LONGEST = 48  # tokens
TRIED = 100  # records


class Samples:
    """The first questions of a stage's validation data (of its training data where it has none), with their answers."""

    def __init__(self, run: Run, stage: config.Stage):
        self.run = run
        self.model = dataclasses.replace(run.model, template=stage.data.template or run.model.template)
        self.llava: Llava | None = None
        self.requests, self.expected = [], []
        source = open_mixture(stage.data.validation or stage.data.path, stage.data.image_root).sources[0]
        for i in range(min(len(source), TRIED)):
            with contextlib.suppress(ValueError, OSError):  # a bad row, which the training data's policy deals with
                record = source[i]
                question, answer = _first_round(record.turns)
                images = [open_image(path) for path in record.images[: question.count("<image>")]]
                self.requests.append(Request(question, images, max_new_tokens=LONGEST))
                self.expected.append(answer)
            if len(self.requests) == SHOWN:
                break

    def answer(self, parameters: Parameters) -> list[dict[str, str]]:
        """Question, expected and given answer of each record's first round, greedily."""
        if self.llava is None:
            self.llava = Llava(self.model, parameters, self.run.tokenizer, self.run.dtype)
        self.llava.parameters = parameters
        answers = self.llava.batch(self.requests)
        return [{"question": request.messages, "expected": expected, "answer": answer.text}
                for request, expected, answer in zip(self.requests, self.expected, answers, strict=True)]


def _first_round(turns: Sequence[dict[str, str]]) -> tuple[str, str]:
    """The first question and its answer; UserError if there is none."""
    for question, answer in itertools.pairwise(turns):
        if question["from"] == "human":
            return question["value"], answer["value"]
    raise UserError("no question with an answer")
