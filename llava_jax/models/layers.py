"""The pieces that the vision tower and the decoder share: linear maps, norms, a scanned stack of layers."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.parallel.sharding import ROWS, constrain

T = TypeVar("T")

policies = jax.checkpoint_policies
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

REMAT = {
    "none": None,
    "save_dots": policies.save_only_these_names(*PROJECTIONS, "attention_residual", "gate_proj", "up_proj"),
    "save_attention": policies.save_only_these_names(*PROJECTIONS, "attention"),
    "save_qkv": policies.save_only_these_names(*PROJECTIONS),
    "full": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input", *PROJECTIONS, "attention_residual"],
        offload_src="device", offload_dst="pinned_host"),
}
"""Rematerialisation policies of a layer stack, by what the forward pass saves for the backward pass.

- `none`: every intermediate value; nothing is recomputed.
- `save_dots`: results of matrix products with weights; attention and elementwise operations are recomputed.
- `save_attention`: queries, keys, values and the output of attention.
- `save_qkv`: queries, keys and values.
- `full`: the input of each layer; the forward pass of each layer is recomputed.
- `offload`: the input, queries, keys, values and the residual after attention, in the host's memory.
"""

normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """`[..., *inputs] -> [..., *outputs]` by a kernel of shape `inputs + outputs`, computed in the input's dtype."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, rngs: nnx.Rngs,
                 init: Callable = normal):
        self.axes, self.outputs = len(inputs), tuple(outputs)
        shape = (math.prod(inputs), math.prod(outputs))
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32).reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # As one matrix: XLA would copy gathered kernels and inputs of more dimensions to lay them out anew.
        if self.axes > 1:
            x = jax.lax.optimization_barrier(x.reshape(*x.shape[: x.ndim - self.axes], -1))
        x = matmul(x, self.kernel[...].astype(x.dtype).reshape(x.shape[-1], -1))
        if self.bias is not None:
            x = x + self.bias[...].astype(x.dtype).reshape(-1)
        return x.reshape(*x.shape[:-1], *self.outputs)


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """`x @ kernel`, whose backward pass suits the platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_cpu = (device.platform if device else jax.default_backend()) == "cpu"
    return _matmul_on_cpu(x, kernel) if on_cpu else x @ kernel


@jax.custom_vjp
def _matmul_on_cpu(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # JAX would make the kernel's gradient turned round, for which XLA for CPUs computes `g` again, column by column.
    x, kernel = saved
    rows = list(range(x.ndim - 1))
    return g @ kernel.T, jnp.tensordot(x, g, (rows, rows))


_matmul_on_cpu.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 and returned in the input's dtype."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"], stats: tuple[Array, Array] | None = None) -> Float[Array, "... D"]:
        """`stats`: the moments of `x`, if they have been computed before."""
        mean, variance = mean_and_variance(x) if stats is None else stats
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def mean_and_variance(x: Float[Array, "... D"]) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Mean and variance over the last axis, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    # In one pass over `x`, not two: the mean of the squares less the square of the mean.
    return mean, jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis, in float32 up to the scale (as LLaMA does)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def stack(layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters have a leading layer axis, for `scan`."""
    return jax.vmap(layer)(rngs.split(count))


def replicate_layers(layers: nnx.Module, count: int, dtype: jnp.dtype) -> nnx.Module:
    """The first `count` of stacked layers whole on every device: kernels as matrices of `dtype`."""

    def part(module):
        if not isinstance(module, Linear):
            return module[:count]
        module = copy.copy(module)
        kernel = module.kernel[...][:count].astype(dtype)
        inputs, outputs = kernel.shape[1 : 1 + module.axes], kernel.shape[1 + module.axes :]
        # Materialised, or XLA would gather all layers and copy those that are asked for.
        kernel = jax.lax.optimization_barrier(kernel.reshape(count, math.prod(inputs), math.prod(outputs)))
        module.kernel = nnx.Param(constrain(kernel, P()))
        module.bias = None if module.bias is None else nnx.Param(module.bias[...][:count])
        return module

    return jax.tree.map(part, layers, is_leaf=lambda module: isinstance(module, Linear))


def scan(layers: nnx.Module, x: T, *xs: Array, call: Callable, remat: str = "none") -> tuple[T, Array | None]:
    """Runs `x, y = call(layer, x, *xs[layer])` over stacked layers; returns the last `x` and the stacked `y`.

    `x`: an array of rows, or a tuple of such.
    """
    if remat not in REMAT:
        raise UserError(f"remat: unknown policy {remat!r}; choose one of {', '.join(REMAT)}")

    def body(x, layer_and_xs):
        layer, xs = layer_and_xs
        x = jax.tree.map(lambda part: checkpoint_name(constrain(part, ROWS), "block_input"), x)
        return call(layer, x, *xs)

    if remat != "none":
        # The scan is a barrier already; prevent_cse would only add work.
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (layers, xs))
