"""Answers a few fixed questions with the model in training."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import jax
from PIL import Image

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

NUM_SAMPLES = 4
"""Number of questions."""
MAX_NEW_TOKENS = 48
"""Maximum number of tokens of an answer."""
PROBE_RECORDS = 100
"""Number of first records from which the questions are chosen."""


class Samples:
    """First questions of a stage's validation data, or of its training data if it has none.

    All processes call the methods. Each reads the questions; all answer those that every process could read.
    """

    def __init__(self, context: TrainContext, stage: config.Stage):
        self.context = context
        model = context.model.with_image_mode(stage.data.image_mode)
        self.model = dataclasses.replace(model, template=stage.data.template or model.template)
        self.llava: Llava | None = None
        source = open_mixture(stage.data.validation or stage.data.path, stage.data.image_root).sources[0]
        read: dict[int, tuple[Request, str]] = {}
        for i in range(min(len(source), PROBE_RECORDS)):
            with contextlib.suppress(UserError):  # training raises or skips a bad row
                record = source[i]
                messages, answer = _first_round(record.turns)
                marks = sum(message["content"].count(IMAGE) for message in messages)
                images = [open_image(image, stage.data.exif, stage.data.max_pixels) for image in record.images[:marks]]
                self._require_room(messages, images)
                read[i] = Request(messages, images, max_new_tokens=MAX_NEW_TOKENS), answer
            if len(read) == NUM_SAMPLES:
                break
        on_all = set.intersection(*map(set, allgather_object("the questions of the samples", list(read))))
        self.pairs = [read[i] for i in sorted(on_all)]

    def answer(self, parameters: Parameters) -> list[dict[str, str]]:
        """Returns question, expected and given answer of the first round of each record. Decodes greedily."""
        if not self.model.processor.has_newline:  # the mode of this stage; other stages may have one
            parameters = {path: x for path, x in parameters.items() if path != "image_newline"}
        if self.llava is None:
            # One process needs no mesh for a few rows.
            mesh = self.context.mesh if jax.process_count() > 1 else None
            # Without a mesh XLA cannot partition an attention kernel over the devices of the parameters.
            attention = self.context.recipe.model.attention if mesh or self.context.mesh.size == 1 else "xla"
            self.llava = Llava(self.model, parameters, self.context.tokenizer, self.context.dtype, mesh, attention)
        self.llava.parameters = parameters
        answers = self.llava.batch([request for request, _ in self.pairs])
        return [{"question": request.messages[-1]["content"], "expected": expected, "answer": answer.text}
                for (request, expected), answer in zip(self.pairs, answers, strict=True)]

    def _require_room(self, messages: Sequence[dict[str, str]], images: Sequence[Image.Image]) -> None:
        """Raises UserError if a question leaves no room for an answer."""
        model = self.model
        counts = [len(layout.index) for layout in model.processor.layouts(images)]
        tokens = encode_prompt(messages, model.template, self.context.tokenizer, counts)
        if len(tokens) >= model.text.max_length:
            raise UserError("the question is too long")


def _first_round(turns: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Returns the messages of the first question, with the system text, and its answer. Raises UserError if missing."""
    for question, answer in itertools.pairwise(turns):
        if question["from"] == "human":
            system = [{"role": "system", "content": turn["value"]} for turn in turns[:1] if turn["from"] == "system"]
            return [*system, {"role": "user", "content": question["value"]}], answer["value"]
    raise UserError("no question with an answer")
