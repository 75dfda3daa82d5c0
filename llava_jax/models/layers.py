"""The pieces that the vision tower and the decoder share: linear maps, norms, attention, a scanned stack of layers."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from llava_jax.sharding import ROWS, constrain

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass of a layer stack finds saved, and what it computes again.

- `none`: every intermediate value is saved; nothing is computed again.
- `dots`: the results of all matrix products, attention scores included; the elementwise work is computed again.
- `minimal`: the results of products with weights; attention's inside and the elementwise work are computed again.
- `full`: the input of each layer; every layer's forward pass is computed again.
"""

normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """`[..., *inputs] -> [..., *outputs]` by a kernel of shape `inputs + outputs`, computed in the input's dtype."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, rngs: nnx.Rngs,
                 init: Callable = normal):
        shape = (math.prod(inputs), math.prod(outputs))
        self.axes = len(inputs)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32).reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.axes)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 and returned in the input's dtype."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis, in float32 up to the scale (as LLaMA does)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention of N query heads over K key-value heads (N a multiple of K), softmax in float32.

    `mask` is True where a query may look. A query that may look nowhere gets the mean of all values, not NaN.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


def stack(layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters have a leading layer axis, for `scan`."""
    return jax.vmap(layer)(rngs.split(count))


def scan(layers: nnx.Module, x: Array, *xs: Array, call: Callable, remat: str = "none") -> tuple[Array, Array | None]:
    """Runs `x, y = call(layer, x, *xs[layer])` over stacked layers; returns the last `x` and the stacked `y`."""
    if remat not in REMAT:
        raise ValueError(f"remat: unknown policy {remat!r}; choose one of {', '.join(REMAT)}")

    def body(x, layer_and_xs):
        layer, xs = layer_and_xs
        return call(layer, constrain(x, ROWS), *xs)

    if remat != "none":
        # The scan is a barrier already; prevent_cse would only add work.
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (layers, xs))
