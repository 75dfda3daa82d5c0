"""Cycles of Pallas kernels: bounds that follow from the chip."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.parallel import sharding
from llava_jax.plan import kernels
from llava_jax.plan.replay import profile
from llava_jax.plan.step import compile_program
from llava_jax.plan.topologies import parse as parse_slice


def matmul(left, right, out):
    out[...] = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32).astype(out.dtype)


def compiled(call, where, *shapes):
    """Returns the kernel of a program that consists of it alone."""
    mesh = sharding.make_mesh(config.Mesh(1, 1, 1), where.jax_devices())
    operands = (jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for dims in shapes)
    parts = dict.fromkeys(("trained", "frozen", "optimizer", "batch"), 0)
    (op,) = profile(compile_program(jax.jit(call).lower(*operands), parts, where, mesh).hlo, [0]).kernels
    return op.kernel


def test_a_product_takes_at_least_its_flops_and_its_bytes(needs_libtpu):
    where = parse_slice("v5e-1")
    call = pl.pallas_call(
        matmul, grid=(4, 2), in_specs=[pl.BlockSpec((256, 512), lambda i, j: (i, 0)),
                                       pl.BlockSpec((512, 256), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((256, 256), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")))  # of which two steps run
    kernel, chip = compiled(call, where, (1024, 512), (512, 512)), where.chip
    cost = kernels.measure(chip, kernel.job)
    flops, moved = 2 * 1024 * 512 * 512, 2 * (1024 * 512 + 8 * 512 * 256 + 1024 * 512)
    assert cost.grid == 8
    assert flops / chip.flops_per_cycle < cost.grid * cost.bundles < 2 * flops / chip.flops_per_cycle
    assert moved / chip.bandwidth * chip.clock < cost.static < 2 * moved / chip.bandwidth * chip.clock
    assert kernel.seconds(chip) == cost.static / chip.clock
    assert cost.cycles == cost.static and kernels.KernelCost(8, 10, None).cycles == 80


def test_a_kernel_keeps_its_limit_of_vmem(needs_libtpu):
    """Blocks of 8 MiB in two buffers each for input and output: more than the 16 MiB that kernels have by default."""
    where = parse_slice("v5e-1")

    def copy(x, out):
        out[...] = x[...]

    block = pl.BlockSpec((2048, 2048), lambda i: (i, 0))
    call = pl.pallas_call(copy, grid=(4,), in_specs=[block], out_specs=block,
                          out_shape=jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16),
                          compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**26))
    assert kernels.measure(where.chip, compiled(call, where, (8192, 2048)).job) is not None
