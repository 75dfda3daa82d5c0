"""Run by test_sharded.py in each of two processes of two devices: loads folders together, and each one alone.

sharded_loading.py FOLDER TARGET: FOLDER has checkpoints by name; TARGET is where `hf` is saved again. Prints the bytes
that were read together, and alone, by name, and the error of the damaged one.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models import quantized
from llava_jax.parallel import processes, sharding
from llava_jax.weights import files, save_hf, sharded
from llava_jax.weights.checkpoint import open_checkpoint
from llava_jax.weights.source import shapes

processes.initialize()
folder, target = map(Path, sys.argv[1:])
read_range, counts = files.read_range, [0]


def counting(file, start, size):
    counts[0] += size
    return read_range(file, start, size)


files.read_range = counting
meshes = [sharding.make_mesh(config.Mesh(fsdp=4)), sharding.make_mesh(config.Mesh(data=1, fsdp=2, tensor=2))]


def open_folder(path: Path):
    if path.name == "adapter":
        return open_checkpoint(folder / "hf", adapter=path)
    return open_checkpoint(path)


result = {}
for number, path in enumerate(sorted(folder.iterdir())):
    settings, opened, mesh = *open_folder(path), meshes[number % 2]
    shardings = sharding.parameter_shardings(shapes(settings), mesh)
    store = functools.partial(quantized.store_kernel, kind="int8") if path.name == "bin" else lambda path, x: x
    sharding_of = lambda path, _, shardings=shardings: shardings[path]  # noqa: E731
    counts[0] = 0
    try:
        together = sharded.load_source(path, opened, "float32", sharding_of, store)
    except UserError as error:
        result[path.name] = str(error)
        continue
    result[path.name] = [counts[0]]
    counts[0] = 0
    alone = sharded.load_source(path, opened, "float32", store=store)
    result[path.name].append(counts[0])
    assert together.keys() == alone.keys() == shardings.keys()
    for name, parameter in together.items():
        for x, expected in zip(*map(jax.tree.leaves, (parameter, alone[name])), strict=True):
            assert x.dtype == expected.dtype and not x.is_fully_addressable, name
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=name)
        if not isinstance(parameter, quantized.QuantizedKernel):
            assert parameter.sharding == shardings[name], name
    if path.name == "hf":
        save_hf(target, settings, together, path)
print(json.dumps(result))
