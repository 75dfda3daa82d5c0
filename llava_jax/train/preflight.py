"""Checks all stages before the first step, because a mistake should not show after hours."""

import contextlib
import dataclasses
import os

import jax

from llava_jax import config
from llava_jax.data.parquet_rows import ParquetRows
from llava_jax.data.pipeline import Batches
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Source
from llava_jax.errors import NoHfForm, UserError
from llava_jax.text import agreement
from llava_jax.train.batches import open_batches, open_validation
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.setup import TrainContext
from llava_jax.weights import check_export

PROBE_RECORDS = {"error": 16, "skip": 100}
"""Number of records of a source that are tried, by `bad_rows`: with error all must be valid, with skip one."""


def check_stages(context: TrainContext) -> None:
    """Checks the export, and optimizer, images and data of every unfinished stage. Raises UserError for a mistake."""
    if (problem := hf_problem(context)) and jax.process_index() == 0:
        agreement.say(f"{problem}. The finished model will be in the native layout, which only llava_jax opens")
    for name, stage in context.recipe.stages.items():
        try:
            make_optimizer(stage, trainable_paths(stage, list(context.shardings)), total_steps=1)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from None
    for name, stage in context.recipe.stages.items():
        with contextlib.closing(context.checkpoints(name)) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None and checkpoints.record(latest).total_steps == latest:
                continue
        check_image_root(name, stage.data)
        check_training_data(open_batches(context, stage, stage.data.path))
        if stage.data.validation and latest is None:
            for _ in open_validation(context, stage):  # raises for a bad row, as each validation does
                pass


def hf_problem(context: TrainContext) -> str:
    """Returns why Hugging Face's layout has no form for the finished model; empty if it has one.

    Raises UserError if no layout can be written.
    """
    try:
        check_export(dataclasses.replace(context.model, lora=None), context.tokenizer_directory)
    except NoHfForm as problem:
        return str(problem)
    return ""


def check_image_root(name: str, data: config.Data) -> None:
    """Raises UserError if the folder of the images is missing."""
    if data.image_root and "://" not in data.image_root and not os.path.isdir(data.image_root):
        raise UserError(f"stages.{name}.data.image_root: {data.image_root}: no such folder")


def check_training_data(batches: Batches) -> None:
    """Reads texts and images of some records of every source. Raises UserError if they cannot be used."""
    spec, mixture = batches.spec, batches.spec.mixture
    for source, start in zip(mixture.sources, mixture.starts, strict=False):
        first_bad = None
        for index in _probes(source, PROBE_RECORDS[spec.bad_rows]):
            try:
                spec.text(start + index)
                spec.tiles(start + index)
                if spec.bad_rows == "skip":
                    break
            except BadRow as bad:
                if spec.bad_rows == "error":
                    raise
                first_bad = first_bad or bad
        else:
            if first_bad is not None:
                raise UserError(f"{source.path}: none of the rows that were tried can be used, the first for this "
                                f"reason: {first_bad}")


def _probes(source: Source, count: int) -> list[int]:
    """Returns the numbers of rows to try: the first ones, and as many spread over the source if that is cheap."""
    first = range(min(count // 2, len(source)))
    if isinstance(source.rows, ParquetRows):  # reading a row reads its row group
        return list(first)
    spread = range(len(first), len(source), max(1, (len(source) - len(first)) // (count - count // 2)))
    return [*first, *spread[: count - len(first)]]
