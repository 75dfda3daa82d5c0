"""Defines the public model, `Llava`: loads a checkpoint, answers requests, scores continuations."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import image_size, open_image, turn_upright
from llava_jax.images import Layout
from llava_jax.inference.detokenizer import Completion, Detokenizer
from llava_jax.inference.engine import Engine, Prompt
from llava_jax.inference.grouping import group_batches, image_opener
from llava_jax.inference.scoring import scoring_rows
from llava_jax.inference.shapes import batch_key
from llava_jax.models.llava import (
    AttentionChoice,
    LlavaConfig,
    Parameters,
    abstract_params,
    choose_attention,
    from_params,
)
from llava_jax.models.quantized import store_kernel
from llava_jax.parallel.sharding import parameter_shardings
from llava_jax.text import agreement, templates
from llava_jax.text.encode import IMAGE_TOKEN_ID, PromptTooLong, encode_prompt, eos_ids_and_texts
from llava_jax.text.literal import LiteralText
from llava_jax.text.tokenizer import StreamDecoder, Tokenizer
from llava_jax.video import Video, as_video, decode_frames, sampled_frames
from llava_jax.weights import peft
from llava_jax.weights.checkpoint import load_source, open_checkpoint

ImageSource = Image.Image | str | os.PathLike | bytes | Video
Messages = str | Sequence[Mapping[str, str]]

STREAM_STEPS = 4
"""Number of tokens between two pieces of a stream. Fewer look smoother, more use the device better."""


@dataclass(frozen=True)
class Request:
    """The arguments of `Llava.generate` as one value. Raises UserError if a number is out of range.

    Args:
      assistant_prefix: text that the answer is forced to start with, appended right after the template's assistant
        tag; include a leading space if you need one. The completion is what the model adds to it.
      verbatim: keep outer whitespace of the texts and write a bare `<image>`, as LLaVA's benchmark scripts do.
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
        # A single image or string is wrapped because iterating over it would split it.
        images = (self.images,) if isinstance(self.images, ImageSource) else self.images
        object.__setattr__(self, "images", tuple(map(as_video, images)))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (the most likely token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if "" in self.stop:
            raise UserError("stop contains an empty string, which ends every answer at once")


class Llava:
    """A model with its tokenizer and its conversation template.

    Attributes:
      config: the model's `LlavaConfig`.
      processor: its `ImageProcessor`.
      tokenizer: its `Tokenizer`.
      template: name of its conversation template (text/templates.py).
      dtype: dtype of its computation.
      attention: attention implementations of its decoder and vision tower (models/attention.py).
      parameters: arrays by path. They can be replaced by others of the same shapes.
      adapters: LoRA adapters by name, the first of which has number 1 in `lora.select_adapters`. Values are parameters
        of the adapter's own projector, which replace the base's; {} if it has none.
    """

    def __init__(self, config: LlavaConfig, parameters: Parameters, tokenizer: Tokenizer, dtype: str = "float32",
                 mesh: jax.sharding.Mesh | None = None, attention: str = "auto"):
        self.config = config
        self.processor = config.processor
        self.tokenizer = tokenizer
        self.template = config.template
        self.dtype = dtype
        self.adapters: dict[str, Parameters] = {}
        self.attention = _choose_attention(attention, mesh, config, dtype)
        graph, _ = abstract_params(config, dtype, self.attention)
        self._logits = jax.jit(lambda parameters, *inputs: from_params(graph, parameters)(*inputs))
        self._literal = LiteralText(config.template, tokenizer)
        eos_ids, self._stop = eos_ids_and_texts(config.template, tokenizer)
        self._engine = Engine(graph, parameters, eos_ids, mesh)

    @property
    def engine(self) -> Engine:
        """Its jitted functions, with the model's graph, parameters, layers and mesh."""
        return self._engine

    @property
    def parameters(self) -> Parameters:
        return self._engine.parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._engine.parameters = parameters

    def model(
        self,
        tokens: Int[Array, "B T"],
        tiles: Float[Array, "B I H W 3"] | UInt8[Array, "B I H W 3"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        visual_index: Int[Array, "B T"] | Int[Array, "B T 4"] | None = None,
        visual_weight: Float[Array, "B T 4"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of the next token at every position, float32, jitted.

        Args:
          tokens: every visual token's position has IMAGE_TOKEN_ID.
          tiles: float32, as `ImageProcessor.normalise` returns them, or uint8; None for text alone.
          positions: 0, 1, 2 ... by default.
          segment_ids: a token attends to its own segment only. By default a row is one segment.
          visual_index, visual_weight: features that replace the visual tokens (`LlavaModel.hidden`). By default the
            k-th feature of a row's tiles replaces its k-th visual token.
        """
        return self._logits(self.parameters, tokens, tiles, positions, segment_ids, visual_index, visual_weight)

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
          messages: a question, or [{"role": "user" | "assistant" | "system", "content": str | parts}, ...].
            Marks of tokens in them, such as `</s>`, are ordinary text. An image is an `<image>` in a string, or a part.
          images: PIL images, paths or bytes of files, one for each `<image>` in the messages, in order. If the
            messages have no `<image>`, all images come before the first user message. A path that ends as a video's
            (`clip.mp4`), or a `Video`, is a video with one `<image>`, sampled as `config.video` says.
          max_new_tokens: maximum number of tokens of the answer. The model's context may leave room for fewer.
          temperature: 0 chooses the most likely token; above 0 tokens are drawn. Higher values draw more evenly.
          top_p: draws only from the most likely tokens that together have this probability.
          stop: texts that end the answer, in addition to the template's. They are not part of its text.
          seed: the same request with the same seed draws the same answer, alone or in a batch.

        Raises UserError for invalid messages, images that do not match them, a missing or unreadable image, and a
        number out of range. Raises PromptTooLong for a prompt that leaves no room for an answer.
        """
        request = Request(messages, images, max_new_tokens, temperature, top_p, stop, seed)
        return self.batch([request])[0]

    def stream(self, messages: Messages, images: Sequence[ImageSource] = (), **settings) -> Iterator[str]:
        """Yields the text of `generate` in pieces, as it is written. The arguments are the same.

        No piece splits a character or shows part of a stop string.
        """
        request = Request(messages, images, **settings)
        prompt = self._prompt(request, *self._encode(request), self._tiles(request.images))
        pieces = self._engine.generate([prompt], [self.detokenizer(request.stop, prompt.max_new_tokens)],
                                       STREAM_STEPS)
        return (piece for (piece,) in pieces if piece)

    def batch(self, requests: Iterable[Request | Mapping], batch_size: int = 8) -> list[Completion]:
        """Answers many requests (or dicts of its fields), up to `batch_size` of them at once.

        Requests of similar length and number of images share a batch. An answer equals that of the request alone, up
        to the rounding of matrix products in another order, which in bfloat16 may decide between near ties.
        """
        pairs = self.batch_unordered(requests, batch_size)
        return [completion for _, completion in sorted(pairs, key=lambda pair: pair[0])]

    def batch_unordered(self, requests: Iterable[Request | Mapping],
                        batch_size: int = 8) -> Iterator[tuple[int, Completion]]:
        """Answers any number of requests: yields pairs of a request's index and its answer, as they are finished.

        Requests are read as far ahead as the next batches need. Threads open their images meanwhile.
        """
        with image_opener(self._tiles) as open_tiles:

            def rows():
                for index, request in enumerate(map(_as_request, requests)):
                    tokens, layouts = self._encode(request)
                    yield (batch_key(sum(layout.tiles for layout in layouts), len(tokens)),
                           (index, request, tokens, layouts, open_tiles(request.images)))

            for batch, size in group_batches(rows(), batch_size):
                prompts = [self._prompt(*inputs, tiles.result()) for _, *inputs, tiles in batch]
                answers = [self.detokenizer(row[1].stop, prompt.max_new_tokens)
                           for row, prompt in zip(batch, prompts, strict=True)]
                for _ in self._engine.generate(prompts, answers, rows=size):
                    pass
                for (index, *_), prompt, answer in zip(batch, prompts, answers, strict=True):
                    yield index, Completion(answer.text, answer.tokens, answer.finish_reason, prompt.tokens.tolist())

    def log_likelihood(self, request: Request | Mapping, continuations: Sequence[str]) -> list[float]:
        """Returns for each continuation the sum of its tokens' natural log-probabilities.

        A continuation is appended where the model would write it, as in training (`ASSISTANT: Yes`), or right after the
        request's `assistant_prefix`. The end of its turn is not counted. Sampling settings are ignored.
        """
        return next(self.log_likelihoods([(request, continuations)]))[1]

    def log_likelihoods(
        self, pairs: Iterable[tuple[Request | Mapping, Sequence[str]]], batch_size: int = 8
    ) -> Iterator[tuple[int, list[float]]]:
        """Runs `log_likelihood` for any number of requests: yields pairs of index and result, as they are finished."""
        counts: dict[int, int] = {}
        partial: dict[int, dict[int, float]] = collections.defaultdict(dict)
        gap = templates.get(self.template).gap
        with image_opener(self._tiles) as open_tiles:

            def rows():
                for index, (request, continuations) in enumerate(pairs):
                    request = _as_request(request)
                    if not continuations or "" in continuations:
                        raise UserError("log_likelihood needs at least one continuation, and none may be empty")
                    counts[index], tiles = len(continuations), open_tiles(request.images)
                    prefix, (prompt, layouts) = request.assistant_prefix or gap, self._encode(request)
                    texts = [self.prompt_tokens(dataclasses.replace(request, assistant_prefix=prefix + text)).tolist()
                             for text in continuations]
                    for row in scoring_rows(prompt.tolist(), texts):
                        yield (batch_key(sum(layout.tiles for layout in layouts), len(row.tokens)),
                               (index, row, layouts, tiles))

            for batch, size in group_batches(rows(), batch_size):
                _, scored_rows, layouts, tiles = zip(*batch, strict=True)
                scored = self._engine.score(scored_rows, [future.result() for future in tiles], layouts, size)
                for (index, *_), scores in zip(batch, scored, strict=True):
                    partial[index] |= scores
                    if len(partial[index]) == counts[index]:
                        yield index, [score for _, score in sorted(partial.pop(index).items())]

    def encode(self, messages: Messages, images: Sequence[ImageSource] = ()) -> dict[str, np.ndarray]:
        """Returns the arguments of `model` for a prompt: `tokens` [1, T], with images also `tiles` and `visual_index`.

        `tiles` is uint8 [1, I, H, W, 3]. `visual_index` is int32 [1, T], -1 at the positions of text. If the processor
        `is_weighted`, it is [1, T, 4], and there is `visual_weight` float32 [1, T, 4].
        """
        request = Request(messages, images)
        tokens, layouts = self._encode(request)
        if not layouts:
            return {"tokens": tokens[None]}
        tiles, visual = self._tiles(request.images), self.processor.no_visual_tokens(tokens.shape)
        for name, values in self.processor.visual_tokens(layouts, 0, len(tiles)).items():
            visual[name][tokens == IMAGE_TOKEN_ID] = values
        return {name: value[None] for name, value in ({"tokens": tokens, "tiles": tiles} | visual).items()}

    def prompt_tokens(self, request: Request) -> Int[np.ndarray, "T"]:
        """Returns the ids of a request's prompt.

        Raises UserError if images and marks differ, and PromptTooLong if no room is left for an answer.
        """
        return self._encode(request)[0]

    def encode_chat(self, messages: Sequence[Mapping], layouts: Sequence[Layout]) -> Int[np.ndarray, "T"]:
        """Returns the ids of a chat of strangers, in which all text is text and images are parts alone.

        Args:
          messages: see `templates.read_messages`. Marks such as `<image>` or `</s>` in them are ordinary text
            (`literal.LiteralText`); an image is a part {"type": "image"}.
          layouts: layouts of the images, in order.

        Raises UserError for invalid messages and images that do not match them. Raises PromptTooLong for a prompt that
        leaves no room for an answer; a text of any length is refused before it is tokenized if it cannot fit.
        """
        counts = [len(layout.index) for layout in layouts]
        system, turns = templates.read_messages(messages)
        num_bytes = len((system or "").encode()) + sum(len(text.encode()) for _, text in turns)
        if num_bytes > self.config.text.max_length * self.tokenizer.longest_token:
            raise PromptTooLong(num_bytes // self.tokenizer.longest_token + sum(counts), sum(counts),
                                self.config.text.max_length)
        system, turns = templates.read_messages(messages, self._literal.cut, self._literal.cut)
        return self._check_room(encode_prompt(_as_chat(system, turns), self.template, self.tokenizer, counts,
                                              literal=self._literal))

    def _encode(self, request: Request) -> tuple[Int[np.ndarray, "T"], list[Layout]]:
        """Returns a prompt's ids and the layouts of its images, of which no more than their headers is read."""
        layouts = self.processor.layouts(list(map(self._size, request.images)))
        literal = None if request.verbatim else self._literal
        messages = as_messages(request.messages, len(layouts), literal)
        if self.config.video.time_text and len(layouts) == 1 and isinstance(request.images[0], Video):
            sampled = sampled_frames(request.images[0], self.config.video)
            messages = [message | {"content": sampled.add_times(message["content"])} for message in messages]
        tokens = encode_prompt(messages, self.template, self.tokenizer, [len(layout.index) for layout in layouts],
                               request.assistant_prefix, request.verbatim, literal)
        return self._check_room(tokens), layouts

    def _check_room(self, tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
        if len(tokens) >= self.config.text.max_length:
            raise PromptTooLong(len(tokens), int((tokens == IMAGE_TOKEN_ID).sum()), self.config.text.max_length)
        return tokens

    def _size(self, image: ImageSource) -> tuple[int, int] | int:
        """Returns what the layout depends on: an image's size, or a video's number of sampled frames."""
        if isinstance(image, Video):
            return len(sampled_frames(image, self.config.video).indices)
        if self.processor.is_fixed:
            return 1, 1
        if isinstance(image, Image.Image):
            return (turn_upright(image) if self.config.exif else image).size
        return image_size(image, self.config.exif)

    def _tiles(self, images: Sequence[ImageSource]) -> UInt8[np.ndarray, "I H W 3"]:
        processor, tiles = self.processor.for_images(sum(not isinstance(image, Video) for image in images)), []
        for image in images:
            if isinstance(image, Video):
                sampled = sampled_frames(image, self.config.video)
                tiles += [self.processor.tiles([[frame]]) for frame in decode_frames(image, sampled.indices)]
                continue
            if not isinstance(image, Image.Image):
                image = open_image(image, self.config.exif)
            elif self.config.exif:
                image = turn_upright(image)
            tiles.append(processor.tiles([image]))
        return np.concatenate([self.processor.tiles(()), *tiles])

    def _prompt(self, request: Request, tokens: Int[np.ndarray, "T"], layouts: list[Layout],
                tiles: UInt8[np.ndarray, "I H W 3"]) -> Prompt:
        [visual] = np.nonzero(tokens == IMAGE_TOKEN_ID)
        prefix_length = int(visual[-1]) + 1 if len(visual) else 0
        hashable = prefix_length and not any(isinstance(image, Image.Image) for image in request.images)
        return Prompt(
            tokens=tokens,
            tiles=tiles,
            layouts=layouts,
            max_new_tokens=min(request.max_new_tokens, self.config.text.max_length - len(tokens)),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            prefix_length=prefix_length,
            prefix_key=(tuple(request.images), tokens[:prefix_length].tobytes()) if hashable else None,
        )

    def detokenizer(self, stop: Sequence[str], max_new_tokens: int) -> Detokenizer:
        """Returns the detokenizer of one answer, which the template's end, or a string of `stop`, ends."""
        return Detokenizer(StreamDecoder(self.tokenizer), self._engine.eos_ids, (*self._stop, *stop), max_new_tokens)


def _as_request(request: Request | Mapping) -> Request:
    return request if isinstance(request, Request) else Request(**request)


def as_messages(messages: Messages, num_images: int, literal: LiteralText | None = None) -> list[dict[str, str]]:
    """Returns messages with a mark for each image: their own, or, if they have none, before the first turn.

    With `literal` their text is text: marks are cut, except for `<image>` in contents that are strings. Raises
    UserError if they have marks, but not `num_images` of them.
    """
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    cuts = (functools.partial(literal.cut, keep_images=True), literal.cut) if literal else ()
    system, turns = templates.read_messages(messages, *cuts)
    marks = sum(text.count(templates.IMAGE) for text in (system or "", *(text for _, text in turns)))
    if not marks and turns:
        role, text = turns[0]
        turns[0] = role, f"{templates.IMAGE}\n" * num_images + text
    elif marks != num_images:
        raise UserError(
            f"{num_images} images were given, but the messages have {marks} {templates.IMAGE} marks; each needs one"
        )
    return _as_chat(system, turns)


def _as_chat(system: str | None, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    system = [] if system is None else [("system", system)]
    return [{"role": role, "content": text} for role, text in (*system, *turns)]


def _choose_attention(name: str, mesh: jax.sharding.Mesh | None, config: LlavaConfig, dtype: str) -> AttentionChoice:
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return choose_attention(name, platform, config, dtype)


def load(path: str | os.PathLike, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None,
         template: str | None = None, attention: str = "auto", vision: str | os.PathLike | None = None,
         adapter: str | os.PathLike | None = None, adapters: Mapping[str, str | os.PathLike] | None = None,
         quantize: str | None = None) -> Llava:
    """Loads a model from a directory of any supported layout, which is detected from its files.

    Args:
      path: directory that `llava_jax.train`, `llava_jax.convert`, transformers or the original LLaVA has written.
      dtype: "bfloat16" or "float32", of parameters and computation. By default bfloat16 on TPU and GPU, else float32.
      mesh: devices that the parameters and rows are split over (`sharding.make_mesh`). None uses one device.
      template: name of the conversation template, if the model's files do not name the one that it was trained with.
      attention: xla, splash (TPU) or cudnn (GPU), in prefill as in training. auto uses the platform's and reports it.
      vision: folder of the vision tower that a LLaVA in the original layout names but does not contain.
      adapter: folder of LoRA adapters, of PEFT or of the original LLaVA, which are added unmerged. `path` may then be
        a decoder alone if the folder has the projector; `vision` is the folder of its vision tower.
      adapters: folders of LoRA adapters by names, of which `SlotEngine` uses another one in each slot. They share the
        base, but may have projectors of their own. The methods of Llava answer with the base.
      quantize: "int8" stores the kernels of the decoder's layers in 8 bits. They are quantised one by one while they
        are read, so that the memory never contains all of them in `dtype`.

    Raises UserError that names the file if something is missing, damaged or not supported, for a tokenizer with ids
    beyond the embedding, and for a parameter that the mesh does not divide.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype {dtype!r} is neither bfloat16 nor float32")
    if quantize not in (None, "int8"):
        raise UserError(f"quantize {quantize!r} is not int8")
    config, opened = open_checkpoint(path, template, vision=vision, adapter=adapter)
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{path}: a vision tower or language model alone; join two with llava_jax.convert first")
    folders, own = [peft.Adapter(folder) for folder in (adapters or {}).values()], []
    if folders:
        config, opened, own = peft.attach_several(folders, config, opened, path)
    sharding = None
    if mesh is not None:
        shardings = parameter_shardings({path: x.shape for path, x in abstract_params(config)[1].items()}, mesh)
        sharding = lambda path, shape: shardings[path]  # noqa: E731
    tokenizer = Tokenizer.load(path)
    agreement.check(config.template, tokenizer, config.text.vocab_size, str(path), trained=True,
                    visual_tokens=config.processor.features_per_tile, context=config.text.max_length)
    # Kernels for TPUs read layers of stacked matrices in place (models/streaming.py).
    in_kernels = _choose_attention(attention, mesh, config, dtype).decoder == "splash"
    kind = "int8_matrices" if quantize else "matrices" if in_kernels else None
    store = partial(store_kernel, kind=kind) if kind else lambda path, x: x
    parameters = load_source(path, opened, dtype, sharding, store)
    llava = Llava(config, parameters, tokenizer, dtype, mesh, attention)
    llava.adapters = {name: load_source(folder.directory, projector, dtype, sharding)
                      for name, folder, projector in zip(adapters or {}, folders, own, strict=True)}
    if jax.default_backend() != "cpu":  # where there is a choice
        agreement.say(f"attention {llava.attention}, {dtype}")
    return llava
