"""Computes scaled dot-product attention and rotary position embedding in plain XLA operations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes scaled dot-product attention of N query heads over K key-value heads, with softmax in float32.

    N is a multiple of K. `mask` is True where a query attends to a key. A query that attends to no key gets the mean of
    all values, not NaN.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 H"], sin: Float[Array, "B T 1 H"]
) -> Float[Array, "B T N H"]:
    """Applies rotary position embedding to the pairs (i, i + H/2), in float32 because bfloat16 rounds the angles."""
    # A matmul with 1, -1 and 0 swaps the halves exactly, and on a TPU faster than moving them between lanes.
    half = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * half, half], [-half, 0 * half]]), x.dtype)
    swapped = jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
