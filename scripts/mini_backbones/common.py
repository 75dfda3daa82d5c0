"""What the makers of the parts share: sizes, text to ids, a training loop, files."""

import json
import re
import time
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from safetensors.numpy import load_file, save_file

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations import korean
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Count, Name, Position
from llava_jax.annotations.vocabulary import plural
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import Parameters
from llava_jax.models.vit import VisionConfig
from llava_jax.weights import tables

BOS, EOS = 1, 2
WATCH_STEPS = 500
"""Steps between looks at what is being trained."""
VISION_STEPS, LANGUAGE_STEPS, LOOKUP_STEPS, LATE_STEPS = 1200, 9000, 1200, 2400
TUNING_STEPS, COMPARING_STEPS = 8000, 4000
VISION = VisionConfig(image_size=scenes.SIZE, patch_size=10, hidden_size=128, intermediate_size=384, num_layers=4,
                      num_heads=4)
LANGUAGE = LlamaConfig(
    vocab_size=1280,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    # Constant terms of queries and keys, with which heads can look a fixed distance back: `look_back` starts with some.
    qkv_bias=True,
    out_bias=True,
    tie_word_embeddings=True,
    max_length=512,
)


def annotate(objects) -> Context:
    """Returns captions and boxes of a scene that was never drawn."""
    return Context("", "", tuple(scenes.captions(objects)), tuple(thing.to_box() for thing in objects))


class Encoder:
    """Text to ids without BOS; remembers what it has seen, since the domain's sentences recur."""

    def __init__(self, folder: Path):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    @cached_property
    def facts(self) -> frozenset[int]:
        """Returns the pieces that begin a word for a size, colour, shape, place or number, in English or in Korean."""
        words = [*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES, *scenes.POSITIONS, *scenes.NUMBERS,
                 *map(plural, scenes.SHAPES), *"upper lower middle above below".split(),
                 *"higher up down upwards downwards one two three four".split()]
        for value in (*(Count(number, Name(shape, colour, size)) for number in range(1, 5) for shape in scenes.SHAPES
                        for colour in scenes.COLOURS for size in scenes.SIZES), *map(Position, scenes.POSITIONS)):
            words += korean.fields("n", value).values()
        words += [f"{place}에" for place in korean.PLACES.values()]  # may be one piece with its particle
        return frozenset(i for word in words for i in self(word)
                         if self.tokenizer.id_to_token(i).startswith("\u2581") and i != self.space)

    @property
    def comma(self) -> int:
        return self.tokenizer.token_to_id(",")

    @property
    def space(self) -> int:
        return self.tokenizer.token_to_id("\u2581")

    def word(self, text: str) -> int:
        [piece] = self(text)  # the domain's words are one piece each
        return piece


def start(parameters: Parameters, factors: dict[str, float]) -> Parameters:
    """The library's start (normal, 0.02) is made for wide models: matrices of narrow ones are scaled up."""
    scale = lambda path: next((f for pattern, f in factors.items() if re.fullmatch(pattern, path)), 1)  # noqa: E731
    return {path: value * scale(path) for path, value in parameters.items()}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a constant rate, and a linear decay in the last quarter."""
    return peak * min(step / 100, 1, (steps + 1 - step) / (0.25 * steps))


def adamw() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.98), optax.add_decayed_weights(0.01), optax.scale(-1))


def muon() -> optax.GradientTransformation:
    """Muon for the layers' kernels, with updates as large as Adam's (arXiv 2502.16982), and NAdam for all else."""
    return optax.contrib.muon(1.0, weight_decay=0.01, adam_b2=0.98, consistent_rms=0.2,
                              muon_weight_dimension_numbers=_kernel_axes)


def _kernel_axes(parameters: Parameters) -> dict:
    """Returns the axes that a kernel of stacked layers reduces, and those that it makes; None for all else."""
    heads = {"o_proj": ((1, 2), (3,)), "q_proj": ((1,), (2, 3)), "k_proj": ((1,), (2, 3)), "v_proj": ((1,), (2, 3))}
    axes = {path: heads.get(path.split("/")[-2], ((1,), (2,))) for path in parameters if path.endswith("/kernel")}
    return {path: optax.contrib.MuonDimensionNumbers(*axes[path]) if path in axes else None for path in parameters}


def train(name: str, loss, parameters: Parameters, batches, steps: int, peak: float, watch=None,
          rule: optax.GradientTransformation | None = None) -> Parameters:
    """Returns trained parameters. `batches(step)` gives what `loss` takes beside them; `watch` looks on now and then.

    `rule` makes updates for a learning rate of 1, by default `adamw`.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), rule or adamw())

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, batch, rate):
        value, gradient = jax.value_and_grad(loss)(parameters, batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return jax.tree.map(lambda p, update: p + rate * update, parameters, updates), state, value

    state, began = optimizer.init(parameters), time.perf_counter()
    for number in range(1, steps + 1):
        rate = learning_rate(number, steps, peak)
        parameters, state, value = step(parameters, state, batches(number), np.float32(rate))
        if number % 50 == 0 or number == steps:
            seconds = time.perf_counter() - began
            print(f"{name} step {number}/{steps} loss {float(value):.3f} {seconds:.0f} s", flush=True)
        if watch and (number % WATCH_STEPS == 0 or number == steps):
            watch(number, parameters)
    return parameters


def save(folder: Path, parameters: Parameters, config: dict) -> None:
    """Writes a part alone in Hugging Face's layout, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(value) for path, value in parameters.items()}
    tensors = {}
    for name, place in _tensor_names(parameters).items():
        array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer]
        tensors[name] = np.ascontiguousarray(place.transform.to_hf(array))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def load(folder: Path, parameters: Parameters) -> Parameters:
    """Returns what `save` wrote, for parameters of these shapes."""
    tensors, arrays = load_file(folder / "model.safetensors"), {k: np.array(v) for k, v in parameters.items()}
    for name, place in _tensor_names(parameters).items():
        array = arrays[place.path][... if place.layer is None else place.layer]
        array[...] = place.transform.from_hf(tensors[name], array.shape)
    return {path: jnp.asarray(array) for path, array in arrays.items()}


def _tensor_names(parameters: Parameters) -> dict:
    """Returns the place of each tensor of Hugging Face's layout, by its name in a file of the part alone."""
    places = tables.tensor_mappings({path: value.shape for path, value in parameters.items()})
    return {re.sub("vision_tower.|language_model.", "", name): place for name, place in places.items()}


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
