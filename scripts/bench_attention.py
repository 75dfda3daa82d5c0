"""Prints cycles of the attention kernels, and of the vision towers around them, compiled for one TPU device.

    python scripts/bench_attention.py --chips v5e v6e

No TPU is needed or used: cycles are the compiler's (pip install 'llava_jax[plan]').
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.models.pallas import splash_attention
from llava_jax.models.vit import VisionConfig, Vit
from llava_jax.parallel import sharding
from llava_jax.plan import topologies
from llava_jax.plan.replay import profile
from llava_jax.plan.step import compile_program

TOWERS = {"CLIP ViT-L/14-336": VisionConfig(), "SigLIP SO400M/14-384": VisionConfig(
    384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", class_token=False, patch_bias=True, pre_norm=False)}

HEADS = 32


def compiled(where: topologies.Slice, function, *arrays: jax.ShapeDtypeStruct):
    """Returns the profile of a function of abstract arrays on one device."""
    mesh = sharding.make_mesh(config.Mesh(1, 1, 1), where.jax_devices()[:1])
    with jax.set_mesh(mesh):
        arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P())), arrays)
        lowered = jax.jit(function).lower(*arrays)
        parts = dict.fromkeys(("trained", "frozen", "optimizer", "batch"), 0)
        return profile(compile_program(lowered, parts, where, mesh).hlo, [0])


def attention(query, key, value, starts, cos, sin, g):
    out, vjp = jax.vjp(lambda *qkv: splash_attention(*qkv, starts, (cos, sin)), query, key, value)
    return out, vjp(g)


def print_chip(kind: str, tokens: int, tiles: int) -> None:
    where = topologies.parse(f"{kind}-{8 if topologies.CHIPS[kind].dimensions == 3 else 1}")
    array = jax.ShapeDtypeStruct
    heads, ids, rope = (array((1, tokens, HEADS, 128), "bfloat16"), array((1, tokens), "int32"),
                        array((1, tokens, 1, 128), "float32"))
    for op in compiled(where, attention, heads, heads, heads, ids, rope, rope, heads).kernels:
        cycles = op.kernel.seconds(where.chip) * where.chip.clock
        bound = where.chip.devices * op.kernel.flops / where.chip.flops * where.chip.clock
        print(f"{kind} {op.instruction.name}: {cycles / HEADS:,.0f} cycles a head of {tokens} tokens, "
              f"{cycles / bound:.2f} times its FLOPs at the peak", flush=True)
    for name, sizes in TOWERS.items():
        graph, parameters = nnx.split(nnx.eval_shape(lambda sizes=sizes: Vit(
            sizes, attention="splash", rngs=nnx.Rngs(0))))
        parameters = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), parameters)
        images = array((tiles, sizes.image_size, sizes.image_size, 3), "bfloat16")
        found = compiled(where, lambda p, x, graph=graph: nnx.merge(graph, p)(x, -2), parameters, images)
        seconds = sum(op.times * op.kernel.seconds(where.chip) for op in found.kernels)
        print(f"{kind} {name}, {tiles} tiles: {found.cycles / 1e6:.1f} M cycles, and "
              f"{seconds * where.chip.clock / 1e6:.1f} M of kernels", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--chips", nargs="+", default=["v5e", "v6e"], help="kinds of TPU")
    options.add_argument("--tokens", type=int, default=2560, help="length of a sequence")
    options.add_argument("--tiles", type=int, default=8)
    found = options.parse_args()
    topologies.quiet()
    for kind in found.chips:
        print_chip(kind, found.tokens, found.tiles)


if __name__ == "__main__":
    main()
