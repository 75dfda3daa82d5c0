"""Implements low-rank adapters (LoRA, arXiv:2106.09685) beside the kernels of linear maps.

A kernel K, as a matrix [in, out], becomes K + scale * lora_a @ lora_b with lora_a [in, rank] and lora_b [rank, out].
Adapters of stacked layers have the layer axis first. An adapter's parameters are `PATH/adapter/lora_a` and `lora_b`
for a linear map at PATH.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.models.cpu import matmul
from llava_jax.models.layers import Linear

if TYPE_CHECKING:
    from llava_jax.models.llava import LlavaConfig

TAKES_ADAPTER = re.compile(r"(vision|decoder)/layers/.*|projector/layers_\d+")
"""Paths of linear maps that may have an adapter: the loss reads the head's kernel, the patch embedding is an image
filter in other implementations."""
FACTOR = re.compile(r"(.*)/adapter/lora_[ab]")


@dataclass(frozen=True)
class LoraBank(Lora):
    """Several adapters of one base, concatenated along the rank. `select_adapters` chooses one for each row."""

    parts: tuple[tuple[int, float], ...] = ()
    """Rank and scale of each adapter. The first has number 1, because 0 is the base."""


class LoraAdapter(nnx.Module):
    """The low-rank map `scale * dropout(x) @ lora_a @ lora_b`.

    Attributes:
      dropout_key: random key of the dropout, in stacked layers one for each; None for no dropout. See `set_dropout`.
      row_scale: of a LoraBank, scales of each row's columns of `lora_a`, in stacked layers for each; None for the base.
        See `select_adapters`.
    """

    def __init__(self, lora: Lora, lora_a: Array, lora_b: Array):
        self.scale, self.dropout = lora.scale, lora.dropout
        self.parts = lora.parts if isinstance(lora, LoraBank) else ()
        self.lora_a, self.lora_b = nnx.Param(lora_a), nnx.Param(lora_b)
        self.dropout_key: Array | None = nnx.data(None)
        self.row_scale: Array | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        if self.parts:
            if self.row_scale is None:
                return jnp.zeros((*x.shape[:-1], self.lora_b.shape[-1]), x.dtype)
            # A row's scale is zero in the columns of other adapters, so that these add exactly zero.
            x = matmul(x, self.lora_a[...].astype(x.dtype)) * self.row_scale.astype(x.dtype)
            return matmul(x, self.lora_b[...].astype(x.dtype))
        if self.dropout_key is not None:
            # The backward pass of a rematerialised layer computes the mask again from the key.
            keep = _random_words(self.dropout_key, x.shape) >= np.uint32(round(self.dropout * 2**32))
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        x = matmul(x, self.lora_a[...].astype(x.dtype)) * self.scale
        return matmul(x, self.lora_b[...].astype(x.dtype))


def add_adapters(model: nnx.Module, lora: Lora, key: Array) -> None:
    """Adds adapters to the linear maps of a model that `lora.targets` match.

    Raises UserError if a target matches nothing, or a module that takes no adapter.
    """
    for path, linear in _targets(model, lora):
        kernel = linear.kernel.shape
        layers = kernel[:1] if "/layers/" in path else ()
        axes = len(layers) + linear.num_input_axes
        shapes = {"lora_a": (*layers, math.prod(kernel[len(layers) : axes]), lora.rank),
                  "lora_b": (*layers, lora.rank, math.prod(kernel[axes:]))}
        factors = {name: init_factor(key, f"{path}/adapter/{name}", shape) for name, shape in shapes.items()}
        linear.adapter = LoraAdapter(lora, **factors)


def _targets(model: nnx.Module, lora: Lora) -> Iterator[tuple[str, Linear]]:
    """Yields path and module of every linear map that gets an adapter."""
    linears = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)
               if isinstance(module, Linear)}
    parameters = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    # A linear map counts as one module: neither its kernel nor its bias is a target.
    names = linears.keys() | {path for path in parameters if path.rpartition("/")[0] not in linears}
    for pattern in lora.targets:
        matches = sorted(filter(re.compile(pattern).fullmatch, names))
        if wrong := [path for path in matches if not (path in linears and TAKES_ADAPTER.fullmatch(path))]:
            raise UserError(f"model.lora.targets: {pattern!r} matches {wrong[0]}, which takes no adapter")
        if not matches:
            maps = ", ".join(sorted(path for path in linears if TAKES_ADAPTER.fullmatch(path)))
            raise UserError(f"model.lora.targets: {pattern!r} matches no linear map; there are {maps}")
    for path, linear in linears.items():
        if any(re.fullmatch(pattern, path) for pattern in lora.targets):
            yield path, linear


def is_adapter(path: str) -> bool:
    """Returns whether a parameter path is that of an adapter."""
    return FACTOR.fullmatch(path) is not None


def init_factor(key: Array, path: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns initial values of an adapter's parameter, float32: zeros for lora_b, and as PEFT for lora_a.

    PEFT draws lora_a from torch's kaiming_uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)).
    """
    if path.endswith("lora_b"):
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(_path_key(key, path), shape, jnp.float32, -bound, bound)


def set_dropout(model: nnx.Module, key: Array) -> None:
    """Sets the keys of the adapters' dropout, which differ by path and layer. A model without `key` has no dropout."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoraAdapter) and module.dropout:
            own, a = _path_key(key, "/".join(map(str, path))), module.lora_a
            module.dropout_key = jax.random.split(own, a.shape[0]) if a.ndim == 3 else own


def select_adapters(module: nnx.Module, ids: Int[Array, "B"] | Int[Array, ""]) -> None:
    """Selects the adapter of each row by its number in a LoraBank; 0 is the base. One number counts for all rows.

    Rows are the first axis of the modules' inputs, which for the vision tower are tiles. Before the call, and without
    a LoraBank, all rows have the base.
    """
    for _, adapter in nnx.iter_modules(module):
        if isinstance(adapter, LoraAdapter) and adapter.parts:
            ends = np.cumsum([rank for rank, _ in adapter.parts])
            table = np.zeros((len(ends) + 1, ends[-1]), np.float32)
            for number, (end, (rank, scale)) in enumerate(zip(ends, adapter.parts, strict=True), 1):
                table[number, end - rank : end] = scale
            scales = jnp.asarray(table)[ids]
            scales = scales[:, None] if ids.ndim else scales
            a = adapter.lora_a
            adapter.row_scale = jnp.broadcast_to(scales, (a.shape[0], *scales.shape)) if a.ndim == 3 else scales


def _random_words(key: Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns a random word for each element: its index, hashed with both words of the key.

    It depends on the shape alone, not on the sharding. Threefry would take as long as the kernel's own matmul on a v6e
    (predicted), and minutes of compilation.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    first, second = jax.random.key_data(key)
    return _hash(_hash(index ^ first) ^ second)


def _hash(word: Array) -> Array:
    """Mixes the bits of words (the finaliser of MurmurHash3, a bijection)."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _path_key(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def describe(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describes which linear maps have adapters, given the shapes of all parameters by path."""
    maps = {match[1]: shape for path, shape in shapes.items() if (match := FACTOR.fullmatch(path))}
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in maps.values())
    count = sum(math.prod(shape) for path, shape in shapes.items() if is_adapter(path))
    return (f"LoRA of rank {lora.rank}, scale {lora.scale:g}, dropout {lora.dropout:g}: {matrices} matrices, "
            f"{count:,} parameters, in {', '.join(sorted(maps))}")


def without_adapters(config: "LlavaConfig", name: str = "") -> "LlavaConfig":
    """Returns a configuration with a note of its adapters, which may have a name, instead of `lora`."""
    if config.lora is None:
        return config
    lora = config.lora
    note = f"{name + ': ' if name else ''}rank {lora.rank}, alpha {lora.alpha:g}{', rsLoRA' if lora.rslora else ''}"
    return dataclasses.replace(config, lora=None, merged="; ".join(filter(None, [config.merged, note])))
