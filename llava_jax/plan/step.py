"""A stage's train step, compiled for TPUs that are not there: the function that train runs, on abstract arrays."""

import dataclasses
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.plan.topologies import GIB, Slice
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.setup import model_layout
from llava_jax.train.step import abstract_state, make_train_step

STEPS = 1000
"""The length of the schedule where the recipe gives none; it is a constant in the program and changes nothing else."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    trained: int
    """parameters that the stage trains, float32"""
    frozen: int
    optimizer: int
    batch: int
    temporaries: int
    """everything that exists only within the step: activations, gradients, gathered weights, fragmentation"""
    host: int
    """beside them, what the step keeps in the host's memory"""
    limit: int
    """what the compiler lets a program have"""

    @property
    def peak(self) -> int:
        return self.trained + self.frozen + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclass(frozen=True)
class Program:
    """A compiled step, or what is known of one that needs too much memory (`hlo` is empty then)."""

    hlo: str
    """the optimised and scheduled module's text, with the compiler's cycles"""
    memory: Memory
    slices: tuple[int, ...]
    """the slice of each of the program's devices, in the order in which replica groups count them"""
    seconds: float
    """that compiling took"""
    outputs: Any = None
    """the results' shardings"""


def abstract_step(recipe: config.Recipe, name: str, mesh: jax.sharding.Mesh, model: LlavaConfig):
    """The jitted step of the stage `name` and its arguments `(state, frozen, batch)` as ShapeDtypeStructs.

    UserError that names the field if the recipe does not fit the mesh.
    """
    stage = recipe.stages[name]
    dtype, graphs, shapes, shardings = model_layout(recipe, mesh, model)
    rates = trainable_paths(stage, list(shapes))

    def parameter(path: str, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shapes[path].shape, jnp.dtype(dtype), sharding=shardings[path])

    trainable = {path: parameter(path, "float32") for path in rates}
    frozen = {path: parameter(path, dtype) for path in shapes if path not in rates}
    tx = make_optimizer(stage, rates, stage.steps or STEPS)
    state = abstract_state(tx, trainable, stage.optimizer.offload)
    return make_train_step(graphs[name], tx, state), (state, frozen, abstract_batch(stage, mesh, model))


def abstract_batch(stage: config.Stage, mesh: jax.sharding.Mesh, model: LlavaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that train/loop.py puts on the devices for one step."""
    layout = NamedSharding(mesh, P(None, ("data", "fsdp")))
    data, side = stage.data, model.vision.image_size
    rows = (stage.gradient_accumulation, stage.batch_size // stage.gradient_accumulation)
    batch = {name: jax.ShapeDtypeStruct((*rows, data.sequence_length), jnp.int32, sharding=layout)
             for name in ("tokens", "labels", "positions", "segment_ids")}
    images = (*rows, data.tiles_per_sequence, side, side, 3)
    return batch | {"images": jax.ShapeDtypeStruct(images, jnp.uint8, sharding=layout)}


def compile_step(recipe: config.Recipe, name: str, where: Slice, mesh: jax.sharding.Mesh, model: LlavaConfig
                 ) -> Program:
    """Compiles the step of a stage for a slice, which takes a minute for 7B and a few GB of this host's memory.

    UserError if the recipe does not fit the slice's mesh; a program that is too large is a result, not an error.
    """
    with jax.set_mesh(mesh):
        step, (state, frozen, batch) = abstract_step(recipe, name, mesh, model)
        lowered = step.lower(state, frozen, batch)
        parts = {"trained": state.trainable, "frozen": frozen, "optimizer": (state.step, state.optimizer),
                 "batch": batch}
        program = compile_program(lowered, {part: device_bytes(tree) for part, tree in parts.items()}, where, mesh)
    host = program.memory.host + device_bytes(state, "pinned_host")
    return dataclasses.replace(program, memory=dataclasses.replace(program.memory, host=host))


def compile_program(lowered: jax.stages.Lowered, parts: dict[str, int], where: Slice, mesh: jax.sharding.Mesh
                    ) -> Program:
    """Compiles what was lowered; `parts` are the bytes of its arguments on one device, by Memory's fields."""
    memory = Memory(temporaries=0, host=0, limit=where.chip.memory, **parts)
    slices = tuple(getattr(device, "slice_index", 0) for device in mesh.devices.flat)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llava_jax_plan_") as folder:
        # Some programs for v5p and v6e have no text afterwards (`as_text` fails); all are dumped on the way.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            used, limit = _out_of_memory(str(error))
            memory = dataclasses.replace(memory, temporaries=used - memory.peak, limit=limit)
            return Program("", memory, slices, time.perf_counter() - start)
        text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
    found = compiled.memory_analysis()
    # Results that take the place of arguments need no memory. Arguments that the program does not use are no arguments
    # to the compiler, but they lie on the device nevertheless.
    used = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    memory = dataclasses.replace(memory, temporaries=used, host=found.host_temp_size_in_bytes)
    return Program(text, memory, slices, time.perf_counter() - start, compiled.output_shardings)


def device_bytes(tree, memory: str = "device") -> int:
    """Bytes of abstract arrays on one device, or of its share in its host's memory (`pinned_host`)."""
    there = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind or "device") == memory]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in there)


def _out_of_memory(message: str) -> tuple[int, int]:
    """Bytes that a program needs and those there are, from the compiler's error; raises for any other message."""
    size = r"\(([\d.]+)([KMGT]?)\)"
    found = re.search(rf"{size} exceeds available \w+ {size}", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise UserError(f"the TPU compiler failed: {' '.join(message.split())[:400]}")
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * scale[found[2]]), int(float(found[3]) * scale[found[4]])
