"""Compiles the train step of a stage for TPUs that need not exist: the function of train, on abstract arrays."""

import dataclasses
import hashlib
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.quantized import abstract_quantized, is_quantizable
from llava_jax.plan.topologies import GIB, Slice
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.setup import model_layout
from llava_jax.train.step import abstract_state, make_train_step

SCHEDULE_STEPS = 1000
"""Length of the schedule if the recipe has none. It is a constant in the program and changes nothing else."""


@dataclass(frozen=True)
class Memory:
    """Counts the memory of one device in bytes."""

    trained: int
    """Parameters that the stage trains, float32."""
    frozen: int
    """Frozen parameters."""
    optimizer: int
    batch: int
    temporaries: int
    """Arrays of the step alone: activations, gradients, gathered weights; and fragmentation."""
    host: int
    """Bytes that the step keeps in the host's memory; not part of the peak."""
    limit: int
    """Maximum peak that the compiler accepts."""

    @property
    def peak(self) -> int:
        return self.trained + self.frozen + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclass(frozen=True)
class Program:
    """Represents a compiled step, or one that needs too much memory."""

    hlo: str
    """Text of the optimised and scheduled module, with the compiler's cycles; empty if the step does not fit."""
    memory: Memory
    slices: tuple[int, ...]
    """Slice of every device of the program, in the order of the device numbers in replica groups."""
    seconds: float
    """Seconds of compilation."""


_compiled: dict[tuple[Slice, str], Program] = {}
"""Compiled steps of this process, by slice and digest of the lowered program."""


def with_slices(recipe: config.Recipe, where: Slice) -> tuple[config.Recipe, list[str]]:
    """Returns the recipe, data parallel over the slices unless it sets mesh.data, and a note about the change."""
    if where.count == 1 or recipe.mesh.data != 1:
        return recipe, []
    note = f"data parallel over {where.count} slices: train needs --mesh.data {where.count} too"
    return dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, data=where.count)), [note]


def abstract_step(recipe: config.Recipe, name: str, mesh: jax.sharding.Mesh, model: LlavaConfig):
    """Returns the jitted step of the stage `name`, and its arguments `(state, frozen, batch)` as ShapeDtypeStructs.

    Raises UserError, with the name of the field, if the recipe does not fit the mesh.
    """
    stage = recipe.stages[name]
    dtype, graphs, shapes, shardings = model_layout(recipe, mesh, model)
    rates = trainable_paths(stage, list(shapes))

    def parameter(path: str, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shapes[path].shape, jnp.dtype(dtype), sharding=shardings[path])

    trainable = {path: parameter(path, "float32") for path in rates}
    frozen = {path: parameter(path, dtype) for path in shapes if path not in rates}
    if (kind := recipe.model.quantize) != "none":
        frozen |= {path: abstract_quantized(path, x, kind) for path, x in frozen.items() if is_quantizable(path)}
    tx = make_optimizer(stage, rates, stage.steps or SCHEDULE_STEPS)
    state = abstract_state(tx, trainable, stage.optimizer.offload)
    return make_train_step(graphs[name], tx, state, recipe.seed), (state, frozen, abstract_batch(stage, mesh, model))


def abstract_batch(stage: config.Stage, mesh: jax.sharding.Mesh, model: LlavaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays that train/batches.py puts on the devices for one step."""
    layout = NamedSharding(mesh, P(None, ("data", "fsdp")))
    data, side = stage.data, model.vision.image_size
    rows = (stage.gradient_accumulation, stage.batch_size // stage.gradient_accumulation)

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*rows, *shape), jnp.dtype(dtype), sharding=layout)

    batch = {name: array((data.sequence_length,), "int32") for name in ("tokens", "labels", "positions", "segment_ids")}
    visual = model.with_image_mode(data.image_mode).processor.no_visual_tokens((data.sequence_length,))
    batch |= {name: array(x.shape, x.dtype) for name, x in visual.items()}
    return batch | {"tiles": array((data.tiles_per_sequence, side, side, 3), "uint8")}


def compile_step(recipe: config.Recipe, name: str, where: Slice, mesh: jax.sharding.Mesh, model: LlavaConfig
                 ) -> Program:
    """Compiles the step of a stage for a slice. For 7B this takes a minute and a few GB of this host's memory.

    Stages with the same program are compiled once. Raises UserError if the recipe does not fit the mesh. A program that
    is too large is a result, not an error.
    """
    with jax.set_mesh(mesh):
        step, (state, frozen, batch) = abstract_step(recipe, name, mesh, model)
        lowered = step.lower(state, frozen, batch)
        parts = {"trained": state.trainable, "frozen": frozen, "optimizer": (state.step, state.optimizer),
                 "batch": batch}
        key = where, hashlib.sha256(lowered.as_text().encode()).hexdigest()
        program = _compiled.get(key) or compile_program(
            lowered, {part: device_bytes(tree) for part, tree in parts.items()}, where, mesh)
        _compiled[key] = program
    host = program.memory.host + device_bytes(state, "pinned_host")
    return dataclasses.replace(program, memory=dataclasses.replace(program.memory, host=host))


def compile_program(lowered: jax.stages.Lowered, parts: dict[str, int], where: Slice, mesh: jax.sharding.Mesh
                    ) -> Program:
    """Compiles a lowered program. `parts` has the bytes of its arguments on one device, by fields of Memory."""
    memory = Memory(temporaries=0, host=0, limit=where.chip.memory, **parts)
    slices = tuple(getattr(device, "slice_index", 0) for device in mesh.devices.flat)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llava_jax_plan_") as folder:
        # `as_text` fails for some programs for v5p and v6e (libtpu 0.0.52), so the text is dumped instead.
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            used, limit = _out_of_memory(str(error))
            memory = dataclasses.replace(memory, temporaries=used - memory.peak, limit=limit)
            return Program("", memory, slices, time.perf_counter() - start)
        text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
    found = compiled.memory_analysis()
    # Results that replace donated arguments need no memory. The compiler does not count arguments that the program does
    # not use, but they are on the device.
    used = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    memory = dataclasses.replace(memory, temporaries=used, host=found.host_temp_size_in_bytes)
    return Program(text, memory, slices, time.perf_counter() - start)


def device_bytes(tree, memory: str = "device") -> int:
    """Returns the bytes of abstract arrays on one device, or in its share of the host's memory (`pinned_host`)."""
    arrays = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind or "device") == memory]
    # A TPU packs two 4-bit codes in a byte, but their itemsize is 1.
    bits = [4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize for x in arrays]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * size // 8 for x, size in zip(arrays, bits, strict=True))


def _out_of_memory(message: str) -> tuple[int, int]:
    """Returns the needed and the available bytes from the compiler's error. Raises UserError for other errors."""
    size = r"\(([\d.]+)([KMGT]?)\)"
    found = re.search(rf"{size} exceeds available \w+ {size}", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise UserError(f"the TPU compiler failed: {' '.join(message.split())[:400]}")
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * scale[found[2]]), int(float(found[3]) * scale[found[4]])
