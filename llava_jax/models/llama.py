"""The LLaMA decoder, and its relatives that differ in sizes, biases and tied embeddings (Vicuna, Mistral, Qwen2)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.errors import UserError
from llava_jax.models.attention import Attend, attention, attention_heads_first, causal
from llava_jax.models.layers import Linear, RMSNorm, materialise, normal, scan, stack
from llava_jax.parallel.sharding import ROWS, constrain


@dataclass(frozen=True)
class RopeScaling:
    """Longer contexts by slower rotation: `linear` divides all positions by `factor`; `llama3` only slow waves."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"rope scaling: low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                            f"{self.high_freq_factor}")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder; the defaults are LLaMA 2 7B's."""

    vocab_size: int = 32000
    width: int = 4096
    intermediate_size: int = 11008
    layers: int = 32
    heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    max_length: int = 4096

    def __post_init__(self):
        if self.heads % self.num_kv_heads:
            raise UserError(f"decoder heads {self.heads} are not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"decoder head_dim {self.head_dim} is odd; rotary embedding needs pairs")


def rope_frequencies(config: LlamaConfig) -> Float[Array, "H/2"]:
    """Radians per position of each rotated pair, float32."""
    frequencies = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: waves shorter than the high bound stay, longer than the low bound slow down, between them a blend.
    turns = scaling.original_length * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


Turn = tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]
"""Cosine and sine of the angle by which each position turns each pair of a head, float32."""


def rotate(x: Float[Array, "B T N H"], turn: Turn) -> Float[Array, "B T N H"]:
    """Rotary position embedding over half-split pairs (i, i + H/2), in float32: bfloat16 cannot count past 256."""
    cos, sin = turn
    # A product with ones and zeros pairs the halves exactly; a TPU is slow at moving them instead.
    half = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * half, half], [-half, 0 * half]]), x.dtype)
    other = jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        query, key = (config.heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.query = Linear([config.width], query, bias=config.qkv_bias, rngs=rngs)
        self.key = Linear([config.width], key, bias=config.qkv_bias, rngs=rngs)
        self.value = Linear([config.width], key, bias=config.qkv_bias, rngs=rngs)
        self.out = Linear(query, [config.width], bias=config.out_bias, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = Linear([config.width], [config.intermediate_size], bias=config.mlp_bias, rngs=rngs)
        self.up = Linear([config.width], [config.intermediate_size], bias=config.mlp_bias, rngs=rngs)
        self.down = Linear([config.intermediate_size], [config.width], bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = materialise((name(self.gate(x), "gate"), name(self.up(x), "up")))
        return self.down(materialise(jax.nn.silu(gate) * up))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Turn,
        attend: Attend,
        cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]] | None = None,
        layer: Int[Array, ""] | int | None = None,
        slots: Int[Array, "B T"] | None = None,
        heads_first: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns the new `x` and keys and values: of these tokens, or all layers' with them written at `slots`."""
        h = materialise(self.attention_norm(x))
        query = name(rotate(self.attention.query(h), turn), "query")
        key = name(rotate(self.attention.key(h), turn), "key")
        value = name(self.attention.value(h), "value")
        written = key, value
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            at = (layer, rows, slice(None), slots) if heads_first else (layer, rows, slots)
            written = tuple(old.at[at].set(new) for old, new in zip(cache, written, strict=True))
            key, value = written[0][layer], written[1][layer]
        x = name(x + self.attention.out(attend(query, key, value)), "middle")
        return x + self.mlp(materialise(self.mlp_norm(x))), written


class Llama(nnx.Module):
    """Embeddings in, hidden states after the last norm out; `embed` and `head` are at its two ends."""

    def __init__(self, config: LlamaConfig, *, attention: str = "xla", remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        self.attention = attention
        self.remat = remat
        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.width), jnp.float32))
        self.layers = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Linear([config.width], [config.vocab_size], bias=False, rngs=rngs)

    def embed(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Embeddings of `tokens`; an id outside the vocabulary (an image's place) gets those of id 0."""
        known = (tokens >= 0) & (tokens < self.config.vocab_size)
        # Looked up in the whole table: a lookup in parts of its width would have to be put together again per token.
        table = constrain(self.embedding[...].astype(dtype), P())
        return constrain(table[jnp.where(known, tokens, 0)], ROWS)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        with_cache: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Causal hidden states; a token sees the tokens before it in its own segment.

        `with_cache` adds the keys and values, each `[L, B, T, K, H]`, with which `extend` goes on.
        """
        attend = causal(self.attention, x.shape[1], segment_ids)
        turn = self.turn(positions)

        def call(block, x):
            x, cache = block(x, turn, attend)
            return x, cache if with_cache else None

        x, cache = scan(self.layers, x, call=call, remat=self.remat)
        return (self.norm(x), cache) if with_cache else self.norm(x)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]],
        layers: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Hidden states of further tokens, whose keys and values are written into the cache at `positions`.

        `layers`: the same layers one by one, which on a CPU is faster than to scan over the stack of them; the cache is
        `[L, B, K, S, H]` then, so that a CPU need not move it for its products.
        """
        heads_first = layers is not None
        mask = jnp.arange(cache[0].shape[3 if heads_first else 2]) <= positions[..., None]
        turn = self.turn(positions)
        attend = functools.partial(attention_heads_first if heads_first else attention, mask=mask)

        # The cache is carried, not scanned over: so every layer writes to its place, and nothing is copied.
        def call(carry, block_and_layer):
            block, layer = block_and_layer
            x, cache = carry
            return block(constrain(x, ROWS), turn, attend, cache, layer, positions, heads_first), None

        if layers is None:
            (x, cache), _ = jax.lax.scan(call, (x, cache), (self.layers, jnp.arange(self.config.layers)))
        else:
            for i, block in enumerate(layers):
                (x, cache), _ = call((x, cache), (block, i))
        return self.norm(x), cache

    def turn(self, positions: Int[Array, "B T"]) -> Turn:
        """The rotations of positions, made once for all layers."""
        angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(self.config)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores over the vocabulary in float32; of the embedding's rows where the head is tied."""
        kernel = self.output_kernel().astype(x.dtype)
        return jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=jnp.float32)

    def output_kernel(self) -> Float[Array, "D V"]:
        """What makes scores of hidden states, as it is stored; the embedding's transpose where the head is tied."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]
