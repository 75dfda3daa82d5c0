"""What can be checked of all stages before the first step: a mistake should not show after hours."""

import os

from llava_jax import config
from llava_jax.data.parquet_rows import ParquetRows
from llava_jax.data.pipeline import Batches
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Source
from llava_jax.errors import UserError
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.setup import TrainContext
from llava_jax.weights import check_export

PROBED_IF_ERROR, PROBED_IF_SKIP = 16, 100
"""Records of each source that are tried: all of them must be good, or one of them, as `bad_rows` says."""


def check_run(run: TrainContext) -> None:
    """Raises UserError if the finished model could not be written, or a stage's optimizer not be made."""
    check_export(run.model, run.tokenizer_directory)
    for name, stage in run.recipe.stages.items():
        try:
            make_optimizer(stage, trainable_paths(stage, list(run.shardings)), total_steps=1)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from None


def check_image_root(name: str, data: config.Data) -> None:
    """Raises UserError if the folder of the images is missing."""
    if data.image_root and "://" not in data.image_root and not os.path.isdir(data.image_root):
        raise UserError(f"stages.{name}.data.image_root: {data.image_root}: no such folder")


def check_training_data(batches: Batches) -> None:
    """Reads some records of every source, texts and images. Raises UserError if these cannot be used."""
    spec, mixture = batches.spec, batches.spec.mixture
    for source, start in zip(mixture.sources, mixture.starts, strict=False):
        first_bad = None
        for index in _probes(source, PROBED_IF_SKIP if spec.bad_rows == "skip" else PROBED_IF_ERROR):
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


def check_validation_data(batches: Batches) -> None:
    """Reads all validation data, as each validation does. Raises BadRow for a bad row, unless these are skipped, and
    UserError if no row is good."""
    for _ in batches:
        pass


def _probes(source: Source, count: int) -> list[int]:
    """The numbers of rows to try: the first ones, and as many over all the source where that is cheap."""
    first = range(min(count // 2, len(source)))
    if isinstance(source.rows, ParquetRows):  # a row is read with its whole row group
        return list(first)
    spread = range(len(first), len(source), max(1, (len(source) - len(first)) // (count - count // 2)))
    return [*first, *spread[: count - len(first)]]
