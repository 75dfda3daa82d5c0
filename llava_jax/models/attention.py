"""Chooses the attention implementation: plain XLA, Pallas kernels for TPUs (`splash`), or cuDNN for GPUs.

The choice (`resolve`) is explicit and never changes silently: an implementation that cannot run raises an error.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llava_jax.errors import UserError
from llava_jax.models import cpu, pallas
from llava_jax.models.dot_product import apply_rope, attention

NAMES = ("xla", "splash", "cudnn")

Attend = Callable[[Array, Array, Array], Array]
"""`query [B, T, N, H], key [B, S, K, H], value [B, S, K, H] -> [B, T, N, H]`."""


def resolve(name: str, platform: str) -> str:
    """Returns the implementation that `auto` means on a platform (tpu, gpu or cuda, cpu); other names are unchanged."""
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla") if name == "auto" else name


def causal(name: str, length: int, segment_ids: Int[Array, "B T"] | None = None,
           rope: tuple[Array, Array] | None = None) -> Attend:
    """Returns attention for sequences of `length` tokens, which attend to earlier tokens of their own segment.

    Args:
      name: one of NAMES. Raises UserError otherwise.
      length: number of tokens of a sequence.
      segment_ids: equal for the tokens of a segment, which are adjacent; None means one segment.
      rope: cosine and sine [B, T, 1, H], by which queries and keys are rotated first; None for no rotation.
    """
    _check(name)
    if name == "splash":
        starts = None if segment_ids is None else pallas.segment_starts(segment_ids)
        return functools.partial(pallas.splash_attention, starts=starts, rope=rope)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    attend = functools.partial(jax.nn.dot_product_attention, mask=mask[:, None], implementation="cudnn")
    if name == "xla":
        attend = lambda query, key, value: cpu.chunked_causal_attention(query, key, value, mask)  # noqa: E731
    if rope is None:
        return attend
    return lambda query, key, value: attend(apply_rope(query, *rope), apply_rope(key, *rope), value)


def bidirectional_attention(name: str, num_heads: int) -> Callable[[Array], Array]:
    """Returns attention of all tokens to all tokens, `[B, T, 3 N H] -> [B, T, N, H]`, for a vision tower.

    Its argument is the concatenation of queries, keys and values. Raises UserError if `name` is not in NAMES. A call
    raises UserError if `splash` does not support the size of a head.
    """
    _check(name)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn") if name == "cudnn" else attention

    def run(qkv: Float[Array, "B T 3NH"]) -> Float[Array, "B T N H"]:
        if name != "splash":
            return attend(*pallas.split_qkv(qkv, num_heads))
        if not pallas.supports_tower(size := qkv.shape[2] // 3, num_heads):
            raise UserError(f"attention splash: a vision tower of hidden_size {size} with {num_heads} heads has no "
                            "kernel; choose xla or auto")
        return pallas.bidirectional_attention(qkv, num_heads)

    return run


def _check(name: str) -> None:
    if name not in NAMES:
        raise UserError(f"attention {name!r} is not one of {', '.join(NAMES)}")
