"""Defines the layers that the vision tower and the decoder share: linear maps, norms, a scanned stack of layers."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.lax import optimization_barrier
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.errors import UserError
from llava_jax.models.cpu import matmul
from llava_jax.models.quantized import QuantizedKernel, quantized_matmul
from llava_jax.models.streaming import LayerKernel, is_matrices, layer_matmul
from llava_jax.parallel.sharding import ROWS, constrain

T = TypeVar("T")

policies = jax.checkpoint_policies
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

REMAT = {
    "none": None,
    "save_dots": policies.save_only_these_names(
        *PROJECTIONS, "attention", "attention_residual", "gate_proj", "up_proj"),
    "save_attention": policies.save_only_these_names(*PROJECTIONS, "attention"),
    "save_qkv": policies.save_only_these_names(*PROJECTIONS),
    "full": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input", *PROJECTIONS, "attention_residual"],
        offload_src="device", offload_dst="pinned_host"),
}
"""Rematerialisation policies of a layer stack, by what the forward pass saves for the backward pass.

- `none`: every intermediate value; nothing is recomputed.
- `save_dots`: results of matrix products with weights, and the output of attention; elementwise operations are
  recomputed.
- `save_attention`: queries, keys, values and the output of attention.
- `save_qkv`: queries, keys and values.
- `full`: the input of each layer; the forward pass of each layer is recomputed.
- `offload`: the input, queries, keys, values and the residual after attention, in host memory.
"""

normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """A linear map `[..., *inputs] -> [..., *outputs]` with a kernel of shape `inputs + outputs`, in the input's dtype.

    The kernel is an array or, if it is frozen and has a layer axis, a QuantizedKernel; in `layer_of`, a LayerKernel.
    `adapter`, if set, is a module `[..., D] -> [..., F]` over flattened axes, whose result is added before the bias:
    a low-rank update beside the kernel, for example. `replicate_layers` and `fuse` keep it.
    """

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], *, bias: bool, rngs: nnx.Rngs,
                 init: Callable = normal, splits_input: bool = False):
        """`splits_input`: whether the mesh's axis `tensor` splits the inputs, not the outputs."""
        self.num_input_axes, self.outputs, self.splits_input = len(inputs), tuple(outputs), splits_input
        shape = (math.prod(inputs), math.prod(outputs))
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32).reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None
        self.adapter: Callable | None = nnx.data(None)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Flattened to matrices, because XLA would copy gathered kernels and inputs of more axes to another layout.
        if self.num_input_axes > 1:
            x = optimization_barrier(x.reshape(*x.shape[: x.ndim - self.num_input_axes], -1))
        return self.split(self.flat(x))

    def flat(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Computes the map between flattened axes."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, QuantizedKernel):
            y = quantized_matmul(x, kernel)
        elif isinstance(kernel, LayerKernel):
            y = layer_matmul(x, kernel, self.splits_input)
        else:
            y = matmul(x, kernel.astype(x.dtype).reshape(x.shape[-1], -1))
        if self.adapter is not None:
            y = y + self.adapter(x)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype).reshape(-1)
        return y

    def split(self, y: Float[Array, "... F"]) -> Float[Array, "..."]:
        """Splits the flattened axis of `flat`'s result into the output axes."""
        return y.reshape(*y.shape[:-1], *self.outputs)


class FusedAdapters(nnx.Module):
    """Adapters of fused linear maps: their results are concatenated, with zeros for a map without adapter."""

    def __init__(self, linears: Sequence[Linear]):
        self.sizes = tuple(math.prod(linear.outputs) for linear in linears)
        self.adapters = nnx.List([linear.adapter for linear in linears])

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        return jnp.concatenate([
            jnp.zeros((*x.shape[:-1], size), x.dtype) if adapter is None else adapter(x)
            for size, adapter in zip(self.sizes, self.adapters, strict=True)], axis=-1)


def fuse(linears: Sequence[Linear]) -> Linear:
    """Fuses stacked linear maps of the same input, all with bias, into one with their outputs concatenated."""

    def concatenate(arrays: list[nnx.Param], axes: int) -> nnx.Param:
        flat = [x[...].reshape(*x.shape[:-axes], -1) for x in arrays]
        return nnx.Param(jnp.concatenate(flat, axis=-1))

    fused = copy.copy(linears[0])
    axes = len(fused.outputs)
    fused.kernel = concatenate([linear.kernel for linear in linears], axes)
    fused.bias = concatenate([linear.bias for linear in linears], axes)
    fused.outputs = fused.bias.shape[1:]
    if any(linear.adapter is not None for linear in linears):
        fused.adapter = FusedAdapters(linears)
    return fused


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 and returned in the input's dtype."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: Float[Array, "... D"], stats: tuple[Array, Array] | None = None) -> Float[Array, "... D"]:
        """Normalises `x`. `stats`: its mean and variance, if already computed."""
        mean, variance = mean_and_variance(x) if stats is None else stats
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def mean_and_variance(x: Float[Array, "... D"]) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Returns mean and variance over the last axis, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    # The mean of squares minus the squared mean, because it reads `x` once, not twice.
    return mean, jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis, in float32 up to the scale (as LLaMA does)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def stack(layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """Stacks `count` layers as one module whose parameters have a leading layer axis, for `scan`."""
    return jax.vmap(layer)(rngs.split(count))


def layer_of(stack: nnx.Module, index: Int[Array, ""]) -> nnx.Module:
    """Returns one of stacked layers. Kernels that are stacked matrices are not sliced, but read in place (LayerKernel).
    """

    def select(module):
        if not isinstance(module, Linear):
            return module[index]
        module = jax.tree.map(lambda x: x, module)  # flax forbids to change a module of an outer trace
        kernel = module.kernel.get_value()
        module.kernel = nnx.Param(LayerKernel(kernel, index) if is_matrices(kernel) else
                                  jax.tree.map(lambda x: x[index], kernel))
        module.bias = None if module.bias is None else nnx.Param(module.bias[...][index])
        module.adapter = jax.tree.map(lambda x: x[index], module.adapter)
        return module

    return jax.tree.map(select, stack, is_leaf=lambda module: isinstance(module, Linear))


def replicate_layers(layers: nnx.Module, count: int, dtype: jnp.dtype) -> nnx.Module:
    """Replicates the first `count` of stacked layers on every device, with kernels as matrices of `dtype`."""

    def replicate(module):
        if not isinstance(module, Linear):
            return module[:count]
        module = copy.copy(module)
        kernel = module.kernel[...][:count].astype(dtype)
        axes = 1 + module.num_input_axes
        kernel = kernel.reshape(count, math.prod(kernel.shape[1:axes]), math.prod(kernel.shape[axes:]))
        # The barrier keeps XLA from gathering all layers first and copying the wanted ones afterwards.
        module.kernel = nnx.Param(constrain(optimization_barrier(kernel), P()))
        module.bias = None if module.bias is None else nnx.Param(module.bias[...][:count])
        # Sharded adapters beside replicated kernels would get wrong gradients on three axes (jaxlib 0.10.2, on CPU).
        module.adapter = jax.tree.map(lambda x: constrain(x[:count], P()), module.adapter)
        return module

    return jax.tree.map(replicate, layers, is_leaf=lambda module: isinstance(module, Linear))


def scan(layers: nnx.Module, x: T, *xs: Array, call: Callable, remat: str = "none") -> tuple[T, Array | None]:
    """Runs `x, y = call(layer, x, *xs[layer])` over stacked layers. Returns the last `x` and the stacked `y`.

    `x` is an array whose first axis is the batch, or a tuple of such arrays. `xs` have a leading layer axis. `remat`
    is a policy of REMAT. Raises UserError if it is unknown.
    """
    if remat not in REMAT:
        raise UserError(f"remat: unknown policy {remat!r}; choose one of {', '.join(REMAT)}")

    def body(x, layer_and_xs):
        layer, xs = layer_and_xs
        x = jax.tree.map(lambda part: checkpoint_name(constrain(part, ROWS), "block_input"), x)
        return call(layer, x, *xs)

    if remat != "none":
        # The scan is a barrier already, so prevent_cse would only add work.
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (layers, xs))
