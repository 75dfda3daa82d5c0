"""Reads parameters onto devices. Several processes share the reading: together they read each matrix once.

The rows of a tensor in a file are split evenly over all devices, whatever the sharding of its parameter is, and the
devices then exchange them. If each process read the shards of its own devices, it would read most of the file, because
Hugging Face's layout is transposed: a shard of the hidden dimension is a piece of every row.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.errors import UserError
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import LOAD_TIMEOUT, CollectiveError, allgather_object
from llava_jax.weights import files, tables
from llava_jax.weights.source import ParameterSource, Stored
from llava_jax.weights.tables import Shape

READERS = 8
"""Number of threads that read the layers of a parameter."""

Task = tuple[int | None, np.ndarray, Callable[[], np.ndarray]]
"""Layer for messages, array to fill, and the function that reads its values."""


def load_source(name: str | Path, parameters: ParameterSource, dtype: str | Callable[[str], str] = "float32",
                sharding: Callable | None = None,
                store: Callable[[str, jax.Array], Any] = lambda path, x: x) -> Parameters:
    """Reads parameters onto devices. `name` is that of their checkpoint, for messages; see `load_model`."""
    loaded = {}
    with ThreadPoolExecutor(READERS) as pool:
        for path, shape in parameters.shapes.items():
            kind = jnp.dtype(dtype(path) if callable(dtype) else dtype)
            target = sharding and sharding(path, shape)
            layers = range(shape[0]) if tables.is_stacked(path) else [None]
            several = isinstance(target, NamedSharding) and not target.is_fully_addressable
            tensors = [parameters.tensor(path, layer) for layer in layers] if several else [None]
            if None in tensors or len(tensors[0][0].shape) == 1:
                host = np.empty(shape, kind)
                tasks = [(layer, host[... if layer is None else layer], functools.partial(parameters.read, path, layer))
                         for layer in layers]
                finish = functools.partial(_put, host, target)
            else:
                tasks, finish = _split(tensors, layers, shape, kind, target)
            _read(f"{name}: {path}", tasks, pool, several)
            loaded[path] = store(path, finish())
    return loaded


def _read(where: str, tasks: list[Task], pool: ThreadPoolExecutor, several: bool) -> None:
    """Runs tasks. With several processes, waits for all of them, and raises the UserError of one on each of them."""

    def run(task: Task) -> None:
        layer, target, read = task
        target[...] = read()
        if not files.is_finite(target):
            number = "" if layer is None else f" of layer {layer}"
            raise UserError(f"{where}{number} has values that are not finite (NaN or infinite); the model is damaged, "
                            "or was written in a dtype of too little range")

    problem = None
    try:
        for _ in pool.map(run, tasks):
            pass
    except UserError as error:
        if not several:
            raise
        problem = str(error)
    problems = allgather_object(f"{where} is read", problem, LOAD_TIMEOUT) if several else []
    if problem := next(filter(None, problems), None):
        raise CollectiveError(problem)


def _put(host: np.ndarray, target: jax.sharding.Sharding | None) -> jax.Array:
    if target is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, target, lambda index: host[index])


def _split(tensors: list[Stored], layers: range | list[None], shape: Shape, dtype: np.dtype,
           target: NamedSharding) -> tuple[list[Task], Callable[[], jax.Array]]:
    """Returns tasks that read this process's rows of tensors, and the function that makes the parameter of all rows.

    Rows are padded to a multiple of the devices.
    """
    (first, transform), mesh = tensors[0], target.mesh
    rows, *columns = first.shape
    size = -(-rows // mesh.size)
    split = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    stored_shape = (len(tensors), size * mesh.size, *columns)
    starts = sorted({index[1].indices(stored_shape[1])[0]
                     for index in split.addressable_devices_indices_map(stored_shape).values()})
    positions = {start: i * size for i, start in enumerate(starts)}
    host = np.zeros((len(tensors), len(starts) * size, *columns), dtype)
    tasks = []
    for start, stop in _join_ranges([(start, start + size) for start in starts]):
        stop = min(stop, rows)
        for layer, x, (tensor, _) in zip(layers, host, tensors, strict=True) if start < stop else ():
            part = x[positions[start] : positions[start] + stop - start]
            tasks.append((layer, part, functools.partial(tensor.read, slice(start, stop))))

    def finish() -> jax.Array:
        x = jax.make_array_from_callback(
            stored_shape, split, lambda index: host[:, positions[index[1].indices(stored_shape[1])[0]] :][:, :size])
        return _exchange(rows, transform, shape, layers != [None], target)(x)

    return tasks, finish


def _join_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbours of sorted ranges, because few large reads are faster."""
    joined = ranges[:1]
    for start, stop in ranges[1:]:
        if joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


@functools.cache
def _exchange(rows: int, transform: tables.Transform, shape: Shape, stacked: bool, target: NamedSharding) -> Callable:
    """Returns the compiled function from tensors [layers, rows, ...] to their parameter, one layer at a time."""
    shape = shape[1:] if stacked else shape
    spec = _stored_spec(rows, transform, shape, target.spec[stacked:], target.mesh)

    def convert(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(target.mesh, spec))
        # Without the barrier XLA gathers the stack of all layers at once (TPU v5e, libtpu 0.0.52).
        x = jax.lax.optimization_barrier(x)
        return transform.from_hf(x[:rows], shape)

    return jax.jit(lambda x: jax.lax.map(convert, x) if stacked else convert(x[0]), out_shardings=target)


def _stored_spec(rows: int, transform: tables.Transform, shape: Shape, spec: PartitionSpec,
                 mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Returns how a layer in a file's layout is sharded if its parameter is by `spec`.

    It is replicated, so that every device slices it, if several axes of the mesh have more than one device or rows are
    padded: XLA exchanges nothing else directly, and prints a warning.
    """
    axis = next((axis for axis, size in mesh.shape.items() if size == mesh.size), None)
    sharded = [i for i, axes in enumerate(spec) if axis in (axes if isinstance(axes, tuple) else (axes,))]
    if axis is None or not sharded or rows % mesh.size:
        return PartitionSpec()
    merged, before = transform.merge(shape), math.prod(shape[: sharded[0]])
    starts = [i for i in range(len(merged)) if math.prod(merged[:i]) == before]
    if not starts or merged[starts[0]] % mesh.size:
        return PartitionSpec()
    return PartitionSpec(*[None] * transform.order.index(starts[0]), axis)
