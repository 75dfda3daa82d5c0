"""A loaded model: text and images in, text out."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import open_image, turn_upright
from llava_jax.images import prepare
from llava_jax.inference.detokenizer import Completion, Detokenizer
from llava_jax.inference.engine import Engine, Job, shape
from llava_jax.inference.grouping import group_batches, image_opener
from llava_jax.inference.scoring import scoring_rows
from llava_jax.models.llava import LlavaConfig, Parameters, abstract_params, choose_attention, from_params
from llava_jax.parallel.sharding import parameter_shardings
from llava_jax.text import agreement, templates
from llava_jax.text.encode import IMAGE_TOKEN_ID, answer_ends, encode_prompt
from llava_jax.text.tokenizer import StreamDecoder, Tokenizer
from llava_jax.weights.checkpoint import load_checkpoint, read_config

ImageSource = Image.Image | str | os.PathLike | bytes
Messages = str | Sequence[Mapping[str, str]]

STREAM_STEPS = 4
"""Tokens between two pieces of a stream: few enough to look alive, enough to keep the device busy."""


class PromptTooLong(UserError):
    """A prompt that leaves no room for an answer in the model's context."""

    def __init__(self, tokens: int, visual: int, limit: int):
        super().__init__(f"the prompt has {tokens} tokens, {visual} of them for images, and the model's context holds "
                         f"{limit}: no room is left for an answer; shorten the conversation")
        self.tokens, self.limit = tokens, limit


@dataclass(frozen=True)
class Request:
    """What `Llava.generate` takes, as one value. UserError for a figure out of range.

    `assistant_prefix`: text that the answer is forced to start with, appended right after the template's assistant tag;
    include a leading space if you need one. The completion is what the model adds, without outer blanks.
    `verbatim` keeps outer blanks of the texts and writes a bare `<image>`, as LLaVA's benchmark scripts do.
    """

    messages: Messages
    images: Sequence[ImageSource] = ()
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    assistant_prefix: str = ""
    verbatim: bool = False

    def __post_init__(self):
        # A lone image or stop string is what people write first, and what iterating over would take apart.
        if isinstance(self.images, ImageSource):
            object.__setattr__(self, "images", (self.images,))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if "" in self.stop:
            raise UserError("stop holds an empty string, with which every answer ends at once")


class Llava:
    """A model with its tokenizer and its conversation template.

    Attributes:
      config: the model's `LlavaConfig`.
      tokenizer: its `Tokenizer`.
      template: the name of its conversation format, one of `text/templates.py`.
      attention: the implementations that its decoder and vision tower compute with (models/attention.py).
      parameters: its arrays by path; others of the same shapes can be put in their place.
    """

    def __init__(self, config: LlavaConfig, parameters: Parameters, tokenizer: Tokenizer, dtype: str = "float32",
                 mesh: jax.sharding.Mesh | None = None, attention: str = "auto"):
        self.config = config
        self.tokenizer = tokenizer
        self.template = config.template
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
        self.attention = choose_attention(attention, platform, config, dtype)
        graph, _ = abstract_params(config, dtype, self.attention)
        self._logits = jax.jit(lambda parameters, *inputs: from_params(graph, parameters)(*inputs))
        ends, self._stops = answer_ends(config.template, tokenizer)
        self._engine = Engine(graph, parameters, ends, mesh)

    @property
    def parameters(self) -> Parameters:
        return self._engine.parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._engine.parameters = parameters

    def model(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B I H W 3"] | UInt8[Array, "B I H W 3"] | None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Scores of the next token at every place, float32, jitted.

        `tokens`: every visual token's place holds IMAGE_TOKEN_ID, and the k-th such place of a row takes the k-th
        visual token of that row's images, in order. `images`: float32, normalised with CLIP's statistics, or uint8;
        None for text alone. `positions`: 0, 1, 2 ... when None. `segment_ids`: tokens see their own segment only; one
        segment when None.
        """
        return self._logits(self.parameters, tokens, images, positions, segment_ids)

    def generate(
        self,
        messages: Messages,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Completion:
        """Answers a question, or the last message of a conversation.

        Args:
          messages: a question, or [{"role": "user" | "assistant" | "system", "content": str}, ...].
          images: PIL images, paths or files' bytes, one for each `<image>` in the messages, in order. If the messages
            hold no `<image>`, all of them stand before the first user message.
          max_new_tokens: where less of the model's context is left, that is the limit.
          temperature: 0 takes the likeliest token; above 0 tokens are drawn, the more evenly the higher it is.
          top_p: draws only from the likeliest tokens that together have this probability.
          stop: texts that end the answer, in addition to the template's; they are not part of its text.
          seed: the same request with the same seed draws the same answer, alone or in a batch.

        Raises UserError for malformed messages, images that do not match them, a missing or unreadable image, and a
        figure out of range; PromptTooLong for a prompt that leaves no room for an answer.
        """
        request = Request(messages, images, max_new_tokens, temperature, top_p, stop, seed)
        return self.batch([request])[0]

    def stream(
        self,
        messages: Messages,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The text of `generate` in pieces, as it is written. No piece splits a character or shows part of a stop."""
        request = Request(messages, images, max_new_tokens, temperature, top_p, stop, seed)
        job = self._job(request, self.prompt_tokens(request), self._tiles(request.images))
        pieces = self._engine.run([job], [self._answer(request, job)], STREAM_STEPS)
        return (piece for (piece,) in pieces if piece)

    def batch(self, requests: Iterable[Request | Mapping], batch_size: int = 8) -> list[Completion]:
        """`generate` for many requests (or dicts of its arguments), up to `batch_size` of them at once.

        Requests of like length and number of images go together. An answer is the one that the request gets alone,
        up to the rounding of matrix products in another order: in bfloat16 that may tip a near tie.
        """
        pairs = self.batch_unordered(requests, batch_size)
        return [completion for _, completion in sorted(pairs, key=lambda pair: pair[0])]

    def batch_unordered(self, requests: Iterable[Request | Mapping],
                        batch_size: int = 8) -> Iterator[tuple[int, Completion]]:
        """`batch` for any number of requests: yields their numbers, from 0, and answers as these are made.

        Requests are read as far ahead as the next batches need; their images are opened meanwhile, in threads.
        """
        with image_opener(self._tiles) as opened:

            def waiting():
                for number, request in enumerate(requests):
                    request = request if isinstance(request, Request) else Request(**request)
                    prompt = self.prompt_tokens(request)
                    yield shape(len(request.images), len(prompt)), (number, request, prompt, opened(request.images))

            for rows, size in group_batches(waiting(), batch_size):
                jobs = [self._job(request, prompt, tiles.result()) for _, request, prompt, tiles in rows]
                answers = [self._answer(row[1], job) for row, job in zip(rows, jobs, strict=True)]
                for _ in self._engine.run(jobs, answers, rows=size):
                    pass
                for (number, *_), job, answer in zip(rows, jobs, answers, strict=True):
                    yield number, Completion(answer.text, answer.tokens, answer.finish_reason, job.tokens.tolist())

    def log_likelihood(self, request: Request | Mapping, continuations: Sequence[str]) -> list[float]:
        """How likely each of some answers is: the sum of the natural log-probabilities of its tokens.

        An answer stands where the model would write it, as in training (`ASSISTANT: Yes`), or right behind the
        request's `assistant_prefix`; the end of its turn is not counted. What the request says of sampling is not used.
        """
        return next(self.log_likelihoods([(request, continuations)]))[1]

    def log_likelihoods(
        self, pairs: Iterable[tuple[Request | Mapping, Sequence[str]]], batch_size: int = 8
    ) -> Iterator[tuple[int, list[float]]]:
        """`log_likelihood` for any number of requests: yields pairs of index and result."""
        counts: dict[int, int] = {}
        found: dict[int, dict[int, float]] = collections.defaultdict(dict)
        gap = templates.get(self.template).gap
        with image_opener(self._tiles) as opened:

            def waiting():
                for number, (request, continuations) in enumerate(pairs):
                    request = request if isinstance(request, Request) else Request(**request)
                    if not continuations or "" in continuations:
                        raise UserError("log_likelihood needs continuations, and each needs text")
                    prefix, tiles = request.assistant_prefix or gap, opened(request.images)
                    texts = [self.prompt_tokens(dataclasses.replace(request, assistant_prefix=prefix + text))
                             for text in continuations]
                    counts[number] = len(texts)
                    prompt = self.prompt_tokens(request).tolist()
                    for reading in scoring_rows(prompt, [text.tolist() for text in texts]):
                        yield shape(len(request.images), len(reading.tokens)), (number, reading, tiles)

            for rows, size in group_batches(waiting(), batch_size):
                scored = self._engine.score([reading for _, reading, _ in rows],
                                            [tiles.result() for _, _, tiles in rows], size)
                for (number, _, _), scores in zip(rows, scored, strict=True):
                    found[number] |= scores
                    if len(found[number]) == counts[number]:
                        yield number, [score for _, score in sorted(found.pop(number).items())]

    def prompt_tokens(self, request: Request) -> Int[np.ndarray, "T"]:
        """The prompt's ids. Raises UserError if images and marks differ, PromptTooLong if no room is left to answer."""
        messages = request.messages
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        messages = add_image_marks(messages, len(request.images))
        tokens = encode_prompt(messages, self.template, self.tokenizer, self.config.tokens_per_image,
                               request.assistant_prefix, request.verbatim)
        if len(tokens) >= self.config.text.max_length:
            raise PromptTooLong(len(tokens), int((tokens == IMAGE_TOKEN_ID).sum()), self.config.text.max_length)
        return tokens

    def _tiles(self, images: Sequence[ImageSource]) -> UInt8[np.ndarray, "I H W 3"]:
        side = self.config.vision.image_size
        exif = self.config.exif
        opened = [turn_upright(image) if exif and isinstance(image, Image.Image) else image for image in images]
        opened = [image if isinstance(image, Image.Image) else open_image(image, exif) for image in opened]
        tiles = [prepare(image, side, self.config.image_mode) for image in opened]
        return np.concatenate([np.zeros((0, side, side, 3), np.uint8), *tiles])

    def _job(self, request: Request, prompt: Int[np.ndarray, "T"], tiles: UInt8[np.ndarray, "I H W 3"]) -> Job:
        [visual] = np.nonzero(prompt == IMAGE_TOKEN_ID)
        begins = int(visual[-1]) + 1 if len(visual) else 0
        known = begins and all(isinstance(image, str | bytes | os.PathLike) for image in request.images)
        return Job(
            tokens=prompt,
            images=tiles,
            limit=min(request.max_new_tokens, self.config.text.max_length - len(prompt)),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            begins=begins,
            beginning=(tuple(request.images), prompt[:begins].tobytes()) if known else None,
        )

    def _answer(self, request: Request, job: Job) -> Detokenizer:
        return Detokenizer(StreamDecoder(self.tokenizer), self._engine.ends, (*self._stops, *request.stop), job.limit)


def add_image_marks(messages: Sequence[Mapping[str, str]], count: int) -> list[dict[str, str]]:
    """The messages with a mark for each of `count` images: their own, or, if they have none, before the first turn."""
    system, turns = templates.read_messages(messages)
    marks = sum(text.count(templates.IMAGE) for text in (system or "", *(text for _, text in turns)))
    if not marks and turns:
        role, text = turns[0]
        turns[0] = role, f"{templates.IMAGE}\n" * count + text
    elif marks != count:
        raise UserError(
            f"{count} images were given, but the messages have {marks} {templates.IMAGE} marks; each needs one"
        )
    system = [] if system is None else [("system", system)]
    return [{"role": role, "content": text} for role, text in (*system, *turns)]


def load(path: str | os.PathLike, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None,
         template: str | None = None, attention: str = "auto") -> Llava:
    """Opens a model directory of any supported layout, told from its files.

    Args:
      path: a directory as `llava_jax.train`, `llava_jax.convert` or transformers writes it.
      dtype: "bfloat16" or "float32", of parameters and computation; by default bfloat16 on TPU and GPU, else float32.
      mesh: devices that share the parameters and the rows of a batch (`sharding.make_mesh`); None takes one device.
      attention: xla, splash (TPU) or cudnn (GPU), as in training; auto takes the platform's and says which.
      template: name of the conversation template, where the model's files do not tell the one it was trained with.

    Raises UserError that names the file for whatever is missing, broken or not supported, for a tokenizer with ids
    beyond the embedding, and for a parameter that does not divide by the mesh.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype {dtype!r} is neither bfloat16 nor float32")
    config = read_config(path, template)
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{path}: a vision tower or language model alone; join two with llava_jax.convert first")
    sharding = None
    if mesh is not None:
        shardings = parameter_shardings({path: x.shape for path, x in abstract_params(config)[1].items()}, mesh)
        sharding = lambda path, shape: shardings[path]  # noqa: E731
    tokenizer = Tokenizer.load(path)
    agreement.check(config.template, tokenizer, config.text.vocab_size, str(path), trained=True,
                    visual_tokens=config.tokens_per_image, context=config.text.max_length)
    config, parameters = load_checkpoint(path, dtype=dtype, template=template, sharding=sharding)
    llava = Llava(config, parameters, tokenizer, dtype, mesh, attention)
    if jax.default_backend() != "cpu":  # where there is a choice
        agreement.say(f"attention {llava.attention}, {dtype}")
    return llava
