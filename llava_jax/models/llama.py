"""Implements the LLaMA decoder. Vicuna, Mistral and Qwen2 differ only in sizes, biases and tied embeddings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jax.lax import optimization_barrier
from jaxtyping import Array, Float, Int

from llava_jax.errors import UserError
from llava_jax.models import tpu
from llava_jax.models.attention import Attend, causal
from llava_jax.models.cpu import attention_heads_first
from llava_jax.models.dot_product import apply_rope, attention
from llava_jax.models.layers import Linear, RMSNorm, layer_of, normal, scan, stack
from llava_jax.parallel.sharding import ROWS, constrain, lookup

Cache = tuple[Array, ...]
"""Keys and values of all layers: `[L, B, S, K, H]` each, or a SlotCache."""

AttendCache = Callable[[Array, Array, Array, Cache, Array | int], tuple[Array, Cache]]
"""`query, key, value, cache, layer -> attention's result, and the cache with key and value`."""


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for longer contexts, as transformers' `rope_scaling`."""

    kind: str
    """Type: `linear` divides all frequencies by `factor`, `llama3` only the low ones."""
    factor: float
    low_freq_factor: float = 1.0
    """Number of rotations in `original_length` up to which llama3 divides a frequency by `factor`."""
    high_freq_factor: float = 4.0
    """Number of rotations in `original_length` from which llama3 keeps a frequency."""
    original_length: int = 8192
    """Number of positions that the model was pre-trained on (original_max_position_embeddings)."""

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"rope scaling: low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                            f"{self.high_freq_factor}")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder. The defaults are those of LLaMA 2 7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias, as in Qwen2."""
    out_bias: bool = False
    """Whether the output projection of attention has a bias."""
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    """Whether the embedding's transpose is the kernel of the logits."""
    max_length: int = 4096
    """Maximum number of positions (max_position_embeddings)."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"decoder num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"decoder head_dim {self.head_dim} is odd; rotary embedding needs pairs")


def rope_frequencies(config: LlamaConfig) -> Float[Array, "H/2"]:
    """Returns the angle in radians by which one position rotates each pair, float32."""
    frequencies = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3 keeps frequencies above the high bound, divides those below the low bound, and interpolates in between.
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_tables(
    config: LlamaConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Returns cosine and sine of the angle by which each position rotates each pair of a head, float32."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


class LlamaAttention(nnx.Module):
    """Parameters of grouped-query attention. `LlamaBlock` computes with them."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        query, key = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.q_proj = Linear([config.hidden_size], query, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear([config.hidden_size], key, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear([config.hidden_size], key, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(query, [config.hidden_size], bias=config.out_bias, rngs=rngs, splits_input=True)


class LlamaMlp(nnx.Module):
    """The gated MLP `down_proj(silu(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate_proj = Linear([config.hidden_size], [config.intermediate_size], bias=config.mlp_bias, rngs=rngs)
        self.up_proj = Linear([config.hidden_size], [config.intermediate_size], bias=config.mlp_bias, rngs=rngs)
        self.down_proj = Linear([config.intermediate_size], [config.hidden_size], bias=config.mlp_bias, rngs=rngs,
                                splits_input=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = name(self.gate_proj(x), "gate_proj"), name(self.up_proj(x), "up_proj")
        if tpu.device_kind().startswith("TPU"):
            return tpu.gated_down(self.down_proj, gate, up)
        gate, up = optimization_barrier((gate, up))
        return self.down_proj(optimization_barrier(tpu.gated(gate, up)))


class LlamaBlock(nnx.Module):
    """One layer of the decoder: attention and MLP, each after a norm and with a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMlp(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T 1 H"],
        sin: Float[Array, "B T 1 H"],
        attend: Attend | AttendCache,
        cache: Cache | None = None,
        layer: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Applies the block. Returns the new `x`, and keys and values.

        Without `cache`, these are the keys and values of `x`. With it, `attend` is an AttendCache, and they are the
        cache of all layers that it returns.
        """
        h = optimization_barrier(self.attention_norm(x))
        parts = self.attention
        # Named before they are split into heads, because XLA would save arrays of heads in another layout.
        query, key, value = (
            linear.split(name(linear.flat(h), label))
            for linear, label in ((parts.q_proj, "q_proj"), (parts.k_proj, "k_proj"), (parts.v_proj, "v_proj")))
        if cache is None:
            # The kernel for TPUs rotates queries and keys itself. Without a cache the rotated keys are not computed.
            attended, written = attend(query, key, value), (apply_rope(key, cos, sin), value)
        else:
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
            attended, written = attend(query, key, value, cache, layer)
        x = name(x + self.attention.o_proj(attended), "attention_residual")
        return x + self.mlp(optimization_barrier(self.mlp_norm(x))), written


def _attend_cache(positions: Int[Array, "B T"], shape: tuple[int, ...], heads_first: bool) -> AttendCache:
    """Returns attention to all earlier positions of a cache of this shape, in which row i belongs to sequence i."""
    mask = jnp.arange(shape[3 if heads_first else 2]) <= positions[..., None]
    rows = jnp.arange(shape[1])[:, None]

    def attend(query, key, value, cache, layer):
        index = (layer, rows, slice(None), positions) if heads_first else (layer, rows, positions)
        cache = tuple(old.at[index].set(new) for old, new in zip(cache, (key, value), strict=True))
        read = attention_heads_first if heads_first else attention
        return read(query, cache[0][layer], cache[1][layer], mask), cache

    return attend


class Llama(nnx.Module):
    """The decoder, from embeddings to hidden states after the last norm. Call `embed` before and `logits` after it."""

    def __init__(self, config: LlamaConfig, *, attention: str = "xla", remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        self.attention = attention
        self.remat = remat
        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32))
        self.layers = stack(lambda rngs: LlamaBlock(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        sizes = [config.hidden_size], [config.vocab_size]
        self.lm_head = None if config.tie_word_embeddings else Linear(*sizes, bias=False, rngs=rngs)

    def embed(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Returns embeddings. An id outside the vocabulary, such as a visual token's, gets the embedding of id 0."""
        in_vocabulary = (tokens >= 0) & (tokens < self.config.vocab_size)
        return lookup(self.embedding[...].astype(dtype), jnp.where(in_vocabulary, tokens, 0))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        with_cache: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns hidden states after the last norm. A token attends to itself and earlier tokens of its segment.

        `with_cache` adds the keys and values, each `[L, B, T, K, H]`, which `extend` continues.
        """
        cos, sin = rope_tables(self.config, positions)
        attend = causal(self.attention, x.shape[1], segment_ids, (cos, sin))

        def call(block, x):
            x, cache = block(x, cos, sin, attend)
            return x, cache if with_cache else None

        x, cache = scan(self.layers, x, call=call, remat=self.remat)
        return (self.norm(x), cache) if with_cache else self.norm(x)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache,
        layers: Sequence[LlamaBlock] | None = None,
        attend: AttendCache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns hidden states of further tokens, and the cache with their keys and values written at `positions`.

        `layers`: the same layers as separate modules, which a CPU runs faster than a scan over their stack. The cache
        is then `[L, B, K, S, H]`, because XLA for CPUs multiplies it in this order without a copy. `attend`: writes
        and reads another kind of cache (models/slot_cache.py).
        """
        cos, sin = rope_tables(self.config, positions)
        attend = attend or _attend_cache(positions, cache[0].shape, heads_first=layers is not None)

        # The cache is carried, not scanned over, because then every layer updates it in place.
        def call(carry, block_and_layer):
            block, layer = block_and_layer
            x, cache = carry
            return block(constrain(x, ROWS), cos, sin, attend, cache, layer), None

        numbers = jnp.arange(self.config.num_layers)
        if layers is None and self.attention == "splash":  # on a TPU
            (x, cache), _ = jax.lax.scan(lambda carry, layer: call(carry, (layer_of(self.layers, layer), layer)),
                                         (x, cache), numbers)
        elif layers is None:
            (x, cache), _ = jax.lax.scan(call, (x, cache), (self.layers, numbers))
        else:
            for i, block in enumerate(layers):
                (x, cache), _ = call((x, cache), (block, i))
        return self.norm(x), cache

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns logits over the vocabulary, float32."""
        kernel = self.output_kernel().astype(x.dtype)
        return jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=jnp.float32)

    def output_kernel(self) -> Float[Array, "D V"]:
        """Returns the kernel from hidden states to logits, in its stored dtype: the embedding's transpose if tied."""
        return self.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
