"""The LLaMA decoder, and its relatives that differ in sizes, biases and tied embeddings (Vicuna, Mistral, Qwen2)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llava_jax.models.layers import Linear, RMSNorm, attention, normal, scan, stack
from llava_jax.sharding import ROWS, constrain


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
            raise ValueError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder; the defaults are LLaMA 2 7B's."""

    vocab_size: int = 32000
    width: int = 4096
    mlp_width: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    max_length: int = 4096

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"decoder heads {self.heads} are not a multiple of kv_heads {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"decoder head_width {self.head_width} is odd; rotary embedding needs pairs")


def rope_frequencies(config: LlamaConfig) -> Float[Array, "H/2"]:
    """Radians per position of each rotated pair, float32."""
    frequencies = config.rope_theta ** -(jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
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


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T H/2"]) -> Float[Array, "B T N H"]:
    """Rotary position embedding over half-split pairs (i, i + H/2), in float32: bfloat16 cannot count past 256."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        query, key = (config.heads, config.head_width), (config.kv_heads, config.head_width)
        self.query = Linear([config.width], query, bias=config.qkv_bias, rngs=rngs)
        self.key = Linear([config.width], key, bias=config.qkv_bias, rngs=rngs)
        self.value = Linear([config.width], key, bias=config.qkv_bias, rngs=rngs)
        self.out = Linear(query, [config.width], bias=config.out_bias, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = Linear([config.width], [config.mlp_width], bias=config.mlp_bias, rngs=rngs)
        self.up = Linear([config.width], [config.mlp_width], bias=config.mlp_bias, rngs=rngs)
        self.down = Linear([config.mlp_width], [config.width], bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "B T H/2"],
        mask: Bool[Array, "B T S"],
        cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns the new `x` and the keys and values: of these tokens, or the cache with them written at `slots`."""
        h = self.attention_norm(x)
        query = rotate(self.attention.query(h), angles)
        key = rotate(self.attention.key(h), angles)
        value = self.attention.value(h)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache[0].at[rows, slots].set(key)
            value = cache[1].at[rows, slots].set(value)
        x = x + self.attention.out(attention(query, key, value, mask))
        return x + self.mlp(self.mlp_norm(x)), (key, value)


class Llama(nnx.Module):
    """Embeddings in, hidden states after the last norm out; `embed` and `head` are at its two ends."""

    def __init__(self, config: LlamaConfig, *, remat: str = "none", rngs: nnx.Rngs):
        self.config = config
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
        T = x.shape[1]
        mask = jnp.tril(jnp.ones((1, T, T), bool))
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)

        def call(block, x):
            x, cache = block(x, angles, mask)
            return x, cache if with_cache else None

        x, cache = scan(self.layers, x, call=call, remat=self.remat)
        return (self.norm(x), cache) if with_cache else self.norm(x)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Hidden states of further tokens, whose keys and values are written into the cache at `positions`."""
        mask = jnp.arange(cache[0].shape[2]) <= positions[..., None]
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)
        x, cache = scan(self.layers, x, *cache,
                        call=lambda block, x, *cache: block(x, angles, mask, cache, positions))
        return self.norm(x), cache

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores over the vocabulary in float32; of the embedding's rows where the head is tied."""
        if self.head is None:
            kernel = self.embedding[...].T
        else:
            kernel = self.head.kernel[...]
        return jnp.einsum("...D,DV->...V", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
