"""Stores frozen kernels in 8 or 4 bits, and dequantises them layer by layer where they are used (QLoRA, 2305.14314).

`int8` has one scale for each output channel, `nf4` one for each block of 64 inputs. Kernels have a leading layer axis.
`int8_matrices`, for inference, has the values of `int8` in another form: a TPU reads them without a copy (README.md).
"""

import math
import re
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
"""Values of the 16 codes of nf4, in multiples of the scale (QLoRA, appendix E)."""
KERNEL = re.compile(r"decoder/layers/.*/kernel")
BLOCK_SIZE = 64
"""Number of inputs of a block of nf4. An axis that it does not divide has blocks of the greatest common divisor."""
MIDPOINTS = np.float32([(low + high) / 2 for low, high in zip(NF4, NF4[1:], strict=False)])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKernel:
    """A kernel of stacked layers, as codes and scales. It is a value of `Parameters` like an array.

    A scale belongs to a block of codes along each axis: axes of `scale` are shorter by the block's size. The codes are
    int8, or uint4 for nf4, which a TPU stores as two in a byte. `int8_matrices` have the axes [layers, D, F].
    """

    codes: Array
    scale: Array
    scales_output: bool = field(default=False, metadata={"static": True})
    """Whether a matmul multiplies its result by the scales, not the kernel before. The codes are then matrices."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantize(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """Returns the kernel. Values are computed in float32 and rounded once."""
        values = _decode_nf4(self.codes) if self.codes.dtype == jnp.uint4 else self.codes.astype(jnp.float32)
        return (values * _expand(self.scale, self.shape)).astype(dtype)


def is_quantizable(path: str) -> bool:
    """Returns whether the parameter at `path` is a kernel of the decoder's layers."""
    return KERNEL.fullmatch(path) is not None


def abstract_quantized(path: str, kernel: Array | jax.ShapeDtypeStruct, kind: str
                    ) -> jax.ShapeDtypeStruct | QuantizedKernel:
    """Returns shapes, dtypes and shardings of `store_kernel`. Scales are sharded as the kernel where it divides them.
    """
    abstract = jax.eval_shape(lambda x: _stored(path, x, kind), kernel)
    mesh, axes = kernel.sharding.mesh, kernel.sharding.spec
    if kind.endswith("matrices"):  # the first of the axes that are joined may be sharded, never another one
        axes = axes[0], axes[1], axes[1 + _last_input(path)]

    def sharded(x):
        spec = []
        for count, names in zip(x.shape, axes, strict=False):
            split = (names,) if isinstance(names, str) else names or ()
            spec.append(None if count % math.prod(mesh.shape[name] for name in split) else names)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree.map(sharded, abstract)


def store_kernel(path: str, x: Array, kind: str) -> Array | QuantizedKernel:
    """Returns a frozen parameter as the model reads it: in another form if it is a kernel of the decoder's layers.

    `kind` is one of `quantize`, or `matrices`: not quantised, with the axes [layers, D, F].
    """
    if not is_quantizable(path):
        return x
    shardings = None
    if isinstance(x.sharding, NamedSharding):
        shardings = jax.tree.map(lambda x: x.sharding, abstract_quantized(path, x, kind))
    return jax.jit(lambda x: _stored(path, x, kind), out_shardings=shardings)(x)


def _stored(path: str, x: Array, kind: str) -> Array | QuantizedKernel:
    return _as_matrices(path, x) if kind == "matrices" else quantize(path, x, kind)


def _as_matrices(path: str, x: Array) -> Array:
    return x.reshape(len(x), math.prod(x.shape[1 : 1 + _last_input(path)]), -1)


def quantize(path: str, kernel: Array, kind: str) -> QuantizedKernel:
    """Quantises the kernel [layers, *inputs, *outputs] at `path` to `int8`, `int8_matrices` or `nf4`.

    Scales have the kernel's dtype.
    """
    last_input = _last_input(path)
    if kind == "int8_matrices":
        q = quantize(path, kernel, "int8")
        return QuantizedKernel(_as_matrices(path, q.codes), q.scale.reshape(len(kernel), 1, -1), True)
    if kind == "int8":
        blocks = [size if 1 <= axis <= last_input else 1 for axis, size in enumerate(kernel.shape)]
    else:
        blocks = [math.gcd(size, BLOCK_SIZE) if axis == last_input else 1 for axis, size in enumerate(kernel.shape)]
    x = kernel.astype(jnp.float32)
    split = [part for size, block in zip(kernel.shape, blocks, strict=True) for part in (size // block, block)]
    largest = jnp.abs(x.reshape(split)).max(axis=tuple(range(1, len(split), 2)))
    scale = (largest / (127 if kind == "int8" else 1)).astype(kernel.dtype)
    x = x / _expand(jnp.where(scale == 0, 1, scale), kernel.shape)
    if kind == "int8":
        return QuantizedKernel(jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8), scale)
    # The number of midpoints below a value is the index of the nearest code.
    return QuantizedKernel(sum((x > middle).astype(jnp.int32) for middle in MIDPOINTS).astype(jnp.uint4), scale)


@jax.custom_vjp
def quantized_matmul(x: Float[Array, "... D"], kernel: QuantizedKernel) -> Float[Array, "... F"]:
    """Returns `x @ kernel`, with the kernel's axes flattened to [D, F]. Only `x` has a gradient.

    The backward pass dequantises the kernel again, because saved kernels of all layers would need the memory that
    quantising them frees.
    """
    if kernel.scales_output:  # the codes are exact in bfloat16, and a TPU converts them while it reads them
        y = jnp.matmul(x, kernel.codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * kernel.scale[0].astype(jnp.float32)).astype(x.dtype)
    return x @ _matrix(kernel, x.shape[-1]).dequantize(x.dtype)


def _matmul_backward(kernel: QuantizedKernel, g: Array) -> tuple[Array, None]:
    inputs = math.prod(kernel.shape) // g.shape[-1]
    return g @ _matrix(kernel, inputs).dequantize(g.dtype).T, None


quantized_matmul.defvjp(lambda x, kernel: (quantized_matmul(x, kernel), kernel), _matmul_backward)


def _last_input(path: str) -> int:
    """Returns the last axis of a kernel's inputs: heads and their numbers in `o_proj`, otherwise one axis."""
    return 2 if path.endswith("/o_proj/kernel") else 1


def _matrix(kernel: QuantizedKernel, inputs: int) -> QuantizedKernel:
    """Flattens a kernel of one layer before it is dequantised: XLA fuses the scales of a matrix, not of more axes."""
    codes = kernel.codes.reshape(inputs, -1)
    return QuantizedKernel(codes, kernel.scale.reshape(-1, codes.shape[1]))


def _expand(scale: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Repeats every scale for its block, so that the result can be broadcast to the kernel; float32."""
    scale = scale.astype(jnp.float32)
    for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=True)):
        scale = jnp.repeat(scale, size // count, axis=axis) if 1 < count < size else scale
    return scale


def _decode_nf4(codes: Array) -> Float[Array, "..."]:
    """Returns the values of codes of nf4, float32, by a tree of selections on their bits.

    A lookup in a table of 16 values, as in qwix, is a gather, for which XLA for TPUs compiles for minutes (README.md).
    """
    codes, level = codes.astype(jnp.int32), [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]
