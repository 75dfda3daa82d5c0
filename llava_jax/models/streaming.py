"""Multiplies a few rows by a layer's kernel in a Pallas kernel on TPUs, which reads it in place and only once.

A decode step multiplies each weight with a few rows, so that it takes as long as HBM needs to deliver the weights. XLA
slices a layer out of the stacked kernels first, and reads and writes some of them twice more.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.quantized import QuantizedKernel, quantized_matmul

MAX_ROWS = 64
"""Maximum number of rows. More take longer to multiply than to read, for which XLA's matmul is better."""

BLOCK_BYTES = 2**20
"""Size of the blocks of a kernel: long enough for the full HBM rate, short beside the kernel."""

NUM_LANES = 128
"""Width of a TPU's vector registers."""

TILE_ROWS = 32
"""Multiple of the number of rows of a block, because HBM stores as many rows of int8 in one tile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKernel:
    """The kernel of one layer of a stack of matrices, which is sliced where it is multiplied."""

    stack: Float[Array, "L D F"] | QuantizedKernel
    layer: Int[Array, ""] | int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]


def is_matrices(kernel: Array | QuantizedKernel) -> bool:
    """Returns whether a stacked kernel is one of matrices, whose layers can be read in place."""
    return kernel.scales_output if isinstance(kernel, QuantizedKernel) else kernel.ndim == 3


def layer_matmul(x: Float[Array, "... D"], kernel: LayerKernel, splits_input: bool,
                 interpret: bool = False) -> Float[Array, "... F"]:
    """Returns `x @ kernel`. A layer that the Pallas kernel does not take is sliced and multiplied by XLA.

    Args:
      splits_input: whether the tensor axis of the mesh splits the kernel's inputs, not its outputs.
      interpret: whether Pallas interprets the kernel, for tests without a TPU.
    """
    mesh, (D, F) = jax.sharding.get_abstract_mesh(), kernel.shape
    devices = 1 if mesh.empty else mesh.shape["tensor"]
    parts = jax.tree.leaves(kernel.stack)
    own_D, own_F = (D // devices, F) if splits_input else (D, F // devices)
    block = _block_rows(own_D, own_F * parts[0].dtype.itemsize)
    if math.prod(x.shape[:-1]) > MAX_ROWS or block is None or not (mesh.empty or mesh.size == devices):
        own = jax.tree.map(lambda part: part[kernel.layer], kernel.stack)
        return quantized_matmul(x, own) if isinstance(own, QuantizedKernel) else x @ own.astype(x.dtype)

    def run(x, layer, *parts):
        y = _stream(x, layer, *parts, block=block, interpret=interpret)
        return jax.lax.psum(y, "tensor") if splits_input and devices > 1 else y

    if not mesh.empty:
        inputs, outputs = ("tensor", None) if splits_input else (None, "tensor")
        specs = P(None, inputs), P(), P(None, inputs, outputs), P(None, None, outputs)
        run = jax.shard_map(run, in_specs=specs[: 2 + len(parts)], out_specs=P(None, outputs), check_vma=False)
    return run(x.reshape(-1, D), jnp.reshape(kernel.layer, 1), *parts).reshape(*x.shape[:-1], F)


def _block_rows(inputs: int, row_bytes: int) -> int | None:
    """Returns the number of rows of a block: lanes of `x` where they divide them; None if no block fits tiles."""
    multiple = NUM_LANES if inputs % NUM_LANES == 0 else TILE_ROWS
    if inputs % multiple:
        return None
    limit = max(BLOCK_BYTES // row_bytes, multiple)
    return max(size for size in range(multiple, inputs + 1, multiple) if inputs % size == 0 and size <= limit)


def _stream(x: Float[Array, "R D"], layer: Int[Array, "1"], kernel: Array, scale: Array | None = None, *, block: int,
            interpret: bool) -> Float[Array, "R F"]:
    """Multiplies on one device, block by block of the kernel's rows, which are contiguous in HBM."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (R, D), F = x.shape, kernel.shape[2]
    rows = pl.BlockSpec((R, block), lambda i, layer: (0, i))
    if block % NUM_LANES:  # such a block of `x` would start within a register
        x, rows = x.reshape(R, -1, block).swapaxes(0, 1), pl.BlockSpec((None, R, block), lambda i, layer: (i, 0, 0))
    inputs, specs = [x, kernel], [rows, pl.BlockSpec((None, block, F), lambda i, layer: (layer[0], i, 0))]
    if scale is not None:
        inputs, specs = [*inputs, scale], [*specs, pl.BlockSpec((None, 1, F), lambda i, layer: (layer[0], 0, 0))]
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(D // block,), in_specs=specs,
        out_specs=pl.BlockSpec((R, F), lambda i, layer: (0, 0)), scratch_shapes=[pltpu.VMEM((R, F), jnp.float32)])
    cost = pl.CostEstimate(flops=2 * R * D * F, bytes_accessed=D * F * kernel.dtype.itemsize, transcendentals=0)
    return pl.pallas_call(
        functools.partial(_kernel, last=D // block - 1), grid_spec=spec, name="stream_matmul", cost_estimate=cost,
        out_shape=jax.ShapeDtypeStruct((R, F), x.dtype), interpret=interpret)(layer, *inputs)


def _kernel(layer, x, kernel, *refs, last: int):
    """Adds the product with one block."""
    from jax.experimental import pallas as pl

    *scale, out, total = refs
    y = jnp.dot(x[...], kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
    step = pl.program_id(0)

    @pl.when(step == 0)
    def start():
        total[...] = y

    @pl.when(step > 0)
    def add():
        total[...] += y

    @pl.when(step == last)
    def finish():
        result = total[...] * scale[0][...].astype(jnp.float32) if scale else total[...]
        out[...] = result.astype(out.dtype)
