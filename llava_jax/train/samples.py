"""Answers a few fixed questions with the model in training."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import jax
from PIL import Image

from llava_jax import config
from llava_jax.data.examples import lay_out
from llava_jax.data.records import Medium, Record
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.inference.llava import Llava, Request
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import allgather_object
from llava_jax.text.encode import encode_prompt
from llava_jax.text.templates import IMAGE
from llava_jax.train.setup import TrainContext
from llava_jax.video import Video, decode_frames, sampled_frames

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
        self.model = dataclasses.replace(model, template=stage.data.template or model.template, video=stage.data.video)
        self.llava: Llava | None = None
        source = open_mixture(stage.data.validation or stage.data.path, stage.data.image_root).sources[0]
        read: dict[int, tuple[Request, str]] = {}
        for i in range(min(len(source), PROBE_RECORDS)):
            with contextlib.suppress(UserError):  # training raises or skips a bad row
                record = source[i]
                messages, answer = _first_round(record.turns)
                marks = sum(message["content"].count(IMAGE) for message in messages)
                self._require_room(record, marks, stage.data)
                images = [_opened(image, stage.data) for image in record.images[:marks]]
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

    def _require_room(self, record: Record, marks: int, data: config.Data) -> None:
        """Raises UserError if the first question, with `marks` images, leaves no room for an answer."""
        model = self.model
        record = dataclasses.replace(record, images=record.images[:marks], image_sizes=None)
        record, _, layouts = lay_out(record, model.processor, data.exif, data.max_pixels, data.video)
        tokens = encode_prompt(_first_round(record.turns)[0], model.template, self.context.tokenizer,
                               [len(layout.index) for layout in layouts])
        if len(tokens) >= model.text.max_length:
            raise UserError("the question is too long")


def _opened(image: Medium, data: config.Data) -> Image.Image | Video:
    """Returns an opened image, or a video of which every sampled frame can be decoded."""
    if not isinstance(image, Video):
        return open_image(image, data.exif, data.max_pixels)
    indices = sampled_frames(image, data.video, data.max_pixels).indices
    collections.deque(decode_frames(image, indices, data.max_pixels), maxlen=0)
    return image


def _first_round(turns: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Returns the messages of the first question, with the system text, and its answer. Raises UserError if missing."""
    for question, answer in itertools.pairwise(turns):
        if question["from"] == "human":
            system = [{"role": "system", "content": turn["value"]} for turn in turns[:1] if turn["from"] == "system"]
            return [*system, {"role": "user", "content": question["value"]}], answer["value"]
    raise UserError("no question with an answer")
