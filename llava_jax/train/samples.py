"""What the model in training answers to a few fixed questions."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import jax

from llava_jax import config
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.inference.llava import Llava, Request
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import allgather_object
from llava_jax.text.encode import encode_prompt
from llava_jax.text.templates import IMAGE
from llava_jax.train.setup import TrainContext

SHOWN = 4
LONGEST = 48  # tokens
TRIED = 100  # records


class Samples:
    """The first questions of a stage's validation data (of its training data where it has none), with their answers.

    All processes call the methods: each reads the questions, and all answer those that every one of them could read.
    """

    def __init__(self, run: TrainContext, stage: config.Stage):
        self.run = run
        self.model = dataclasses.replace(run.model, template=stage.data.template or run.model.template)
        self.llava: Llava | None = None
        source = open_mixture(stage.data.validation or stage.data.path, stage.data.image_root).sources[0]
        read: dict[int, tuple[Request, str]] = {}
        for i in range(min(len(source), TRIED)):
            with contextlib.suppress(UserError):  # a bad row, which the policy of the data deals with
                record = source[i]
                messages, answer = _first_round(record.turns)
                marks = sum(message["content"].count(IMAGE) for message in messages)
                images = [open_image(image, stage.data.exif, stage.data.max_pixels) for image in record.images[:marks]]
                self._require_room(messages)
                read[i] = Request(messages, images, max_new_tokens=LONGEST), answer
            if len(read) == SHOWN:
                break
        everywhere = set.intersection(*map(set, allgather_object("the questions of the samples", list(read))))
        self.pairs = [read[i] for i in sorted(everywhere)]

    def answer(self, parameters: Parameters) -> list[dict[str, str]]:
        """Question, expected and given answer of each record's first round, greedily."""
        if self.llava is None:
            # Alone, the few rows need not be shared out.
            mesh = self.run.mesh if jax.process_count() > 1 else None
            # Without a mesh XLA would have to divide a kernel over the devices of the parameters, which it cannot.
            attention = self.run.recipe.model.attention if mesh or self.run.mesh.size == 1 else "xla"
            self.llava = Llava(self.model, parameters, self.run.tokenizer, self.run.dtype, mesh, attention)
        self.llava.parameters = parameters
        answers = self.llava.batch([request for request, _ in self.pairs])
        return [{"question": request.messages[-1]["content"], "expected": expected, "answer": answer.text}
                for (request, expected), answer in zip(self.pairs, answers, strict=True)]

    def _require_room(self, messages: Sequence[dict[str, str]]) -> None:
        """Raises UserError for a question that leaves no room for an answer."""
        model = self.model
        tokens = encode_prompt(messages, model.template, self.run.tokenizer, model.processor.features_per_tile)
        if len(tokens) >= model.text.max_length:
            raise UserError("the question is too long")


def _first_round(turns: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The messages that ask the first question, with the system text, and its answer. UserError if there is none."""
    for question, answer in itertools.pairwise(turns):
        if question["from"] == "human":
            system = [{"role": "system", "content": turn["value"]} for turn in turns[:1] if turn["from"] == "system"]
            return [*system, {"role": "user", "content": question["value"]}], answer["value"]
    raise UserError("no question with an answer")
