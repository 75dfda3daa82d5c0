"""Opens the data of a stage and puts its batches on the devices."""

import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel.processes import allgather_object
from llava_jax.text import templates
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.setup import TrainContext

COUNT_TIMEOUT = 3600.0
"""Seconds that processes wait for the last of them to measure records or to count packed sequences."""


def data_spec(data: config.Data, model: LlavaConfig, tokenizer: Tokenizer, path: str) -> DataSpec:
    """Opens the data at `path`. Returns the spec by which its records become tokens, labels and tiles of a stage."""
    return DataSpec(
        mixture=open_mixture(path, data.image_root), tokenizer=tokenizer,
        template=templates.get(data.template or model.template),
        processor=model.with_image_mode(data.image_mode).processor,
        sequence_length=data.sequence_length, tiles_per_sequence=data.tiles_per_sequence,
        context=model.text.max_length, exif=data.exif, max_pixels=data.max_pixels, video=data.video,
        bad_rows=data.bad_rows)


def open_batches(context: TrainContext, stage: config.Stage, path: str, **changes) -> Batches:
    """Opens this process's share of a stage's packed sequences; `changes` replace options of `Batches`."""
    spec = data_spec(stage.data, context.model, context.tokenizer, path)
    options = dict(batch_size=stage.batch_size, workers=stage.data.workers, seed=context.recipe.seed,
                   process_index=jax.process_index(), process_count=jax.process_count())
    if jax.process_count() > 1:
        options["allgather"] = functools.partial(allgather_object, seconds=COUNT_TIMEOUT)
    return Batches(spec, **options | changes)


def open_validation(context: TrainContext, stage: config.Stage, keep: bool = False) -> Batches:
    """Opens the validation data of a stage, in batches of the size of a micro-batch."""
    return open_batches(context, stage, stage.data.validation, shuffle=False, epochs=1, keep=keep,
                        batch_size=stage.batch_size // stage.gradient_accumulation)


def count_steps(stage: config.Stage, batches: Batches) -> int:
    """Returns the number of steps of the stage's epochs, after packing one epoch of its data."""
    if jax.process_index() == 0:
        print(f"counting the packed rows of {stage.data.path}", flush=True)
    total = sum(allgather_object("the packed rows", batches.count_rows(), COUNT_TIMEOUT))
    return max(1, math.floor(stage.epochs * total / stage.batch_size))


def shard_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, jax.Array]:
    """Puts the arrays that a step reads on the mesh, each as [micro_batches, B, ...]."""
    sharding = NamedSharding(mesh, P(None, ("data", "fsdp")))
    names = {"tokens", "labels", "positions", "segment_ids", "tiles", "visual_index", "visual_weight"} & batch.keys()
    return {name: jax.make_array_from_process_local_data(
                sharding, batch[name].reshape(micro_batches, -1, *batch[name].shape[1:])) for name in sorted(names)}
