"""Compares ways to compute the loss and the lookup of embeddings on TPUs: kernels whole on a device, or in parts.

    python scripts/bench_loss.py

Both are compiled alone, with their gradients, for a slice that is not there (pip install 'llava_jax[plan]'), one packed
sequence on a device. Memory and times are predictions, as those of `python -m llava_jax.plan`.
"""

from llava_jax.plan import topologies

topologies.quiet()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from llava_jax import config  # noqa: E402
from llava_jax.parallel import sharding  # noqa: E402
from llava_jax.plan.replay import profile, times  # noqa: E402
from llava_jax.plan.step import compile_program  # noqa: E402
from llava_jax.train.loss import cross_entropy  # noqa: E402

CASES = (("LLaMA 2 7B", "v5e-64", 2560, 4096, 32_000), ("Llama 3 8B", "v6e-32", 8192, 4096, 128_256),
         ("Qwen2 7B", "v5e-16", 16_384, 3584, 152_064), ("Qwen2 7B", "v5p-64", 16_384, 3584, 152_064))
"""Decoder, slice, tokens of a sequence, hidden_size, vocabulary."""


def main() -> None:
    print("| decoder | slice | tokens | loss, whole | in parts | lookup, whole | in parts |\n" + "|---" * 7 + "|")
    for name, slice_name, length, size, vocabulary in CASES:
        cells = []
        for function in (loss_and_gradients, lookup_and_gradient):
            for large in (vocabulary, 0):  # small if it is not larger than this
                sharding.LARGE_VOCABULARY = large
                cells.append(predict(function, topologies.parse(slice_name), length, size, vocabulary))
        print(f"| {name} | {slice_name} | {length:,} | " + " | ".join(cells) + " |", flush=True)


def loss_and_gradients(table, hidden, labels):
    return jax.value_and_grad(lambda hidden, kernel: cross_entropy(hidden, kernel, labels), argnums=(0, 1))(
        hidden, table.T)


def lookup_and_gradient(table, hidden, labels):
    found, pull_back = jax.vjp(lambda table: sharding.lookup(table.astype(hidden.dtype), labels), table)
    return found * 2, pull_back(hidden)


def predict(function, where: topologies.Slice, length: int, size: int, vocabulary: int) -> str:
    """Returns the predicted time and the temporary memory of a device."""
    mesh = sharding.make_mesh(config.Mesh(), where.jax_devices())
    columns = sharding.parameter_shardings({"decoder/embedding": (vocabulary, size)}, mesh)["decoder/embedding"]
    rows = NamedSharding(mesh, sharding.ROWS)
    table = jax.ShapeDtypeStruct((vocabulary, size), jnp.float32, sharding=columns)
    hidden = jax.ShapeDtypeStruct((where.devices, length, size), jnp.bfloat16, sharding=rows)
    labels = jax.ShapeDtypeStruct((where.devices, length), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        # A new function each time, because the choice is made while it is traced.
        lowered = jax.jit(lambda *arrays: function(*arrays)).lower(table, hidden, labels)
        program = compile_program(lowered, dict.fromkeys(("trained", "frozen", "optimizer", "batch"), 0), where, mesh)
    step = times(profile(program.hlo, program.slices), where).step
    return f"{1e3 * step:,.1f} ms, {program.memory.temporaries / topologies.GIB:.2f} GiB"


if __name__ == "__main__":
    main()
