"""Hashes the inputs of a stage, because a restart must use the same ones.

`inputs.json` in the output directory stores the hashes by stage. They cover data files, tokenizer, template and model
configuration, not image files beside the data. For very large sources they cover samples. Of several processes one
reads complete sources, and the others compare samples with it.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any, BinaryIO

import jax
from etils import epath

from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import Mixture, Source
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError
from llava_jax.files import read_json, to_path
from llava_jax.parallel.processes import LOAD_TIMEOUT, allgather_object, assert_equal_across_processes
from llava_jax.train import output
from llava_jax.train.setup import TrainContext
from llava_jax.weights import fingerprint
from llava_jax.weights.checkpoint import open_model
from llava_jax.weights.source import ParameterSource
from llava_jax.weights.tokenizer_files import TOKENIZER_FILES

COMPLETE_BYTES = 2**32
"""Largest size in bytes of a local source that is hashed completely. Other sources are hashed by samples."""

BASE = "base: kernels of the checkpoints that the recipe starts from"
"""Name of the hash by which a run recognises these checkpoints when it is exported."""

SAMPLES, SAMPLE_BYTES = 256, 2**16
"""Number of samples of a source, and their size in bytes."""


def hash_inputs(context: TrainContext, batches: Batches) -> dict[str, str]:
    """Returns hashes of data sources, tokenizer, template, the model's configuration and its base, by name."""
    spec = batches.spec
    if jax.process_count() > 1:
        assert_equal_across_processes("hashes of samples", _hash_data(spec.mixture, 0))
    data = _hash_data(spec.mixture, COMPLETE_BYTES) if jax.process_index() == 0 else None
    hashes = dict(allgather_object("hashes of the data", data, LOAD_TIMEOUT)[0])
    folder = to_path(context.tokenizer_directory)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    hashes[f"tokenizer: {folder}"] = _hash_files([str(file) for file in files], complete=True)
    hashes[f"template: {spec.template.name}"] = _hash_json(dataclasses.asdict(spec.template))
    # The template of the finished model is a field of the recipe.
    settings = dataclasses.asdict(context.model) | {"template": None}
    hashes["model: the settings in its config.json"] = _hash_json(settings)
    hashes[BASE] = hash_base(open_model(context.recipe.model, context.model, context.recipe.seed))
    return hashes


def hash_base(base: ParameterSource) -> str:
    """Returns a hash of values of some kernels."""
    return _hash_json(fingerprint.compute(base))


def check_inputs(context: TrainContext, stage: str, hashes: dict[str, str]) -> None:
    """Raises UserError that names the inputs that changed since the stage was trained so far."""
    path = context.directory / "inputs.json"
    before = (read_json(path) if path.exists() else {}).get(stage, hashes)
    if not isinstance(before, dict):
        raise UserError(f"{path}: {stage} must be an object; remove the file if the data are as they were")
    if changed := [name for name in hashes | before if hashes.get(name) != before.get(name)]:
        raise UserError(f"stages.{stage} was trained so far with other inputs than there are now: "
                        f"{'; '.join(changed[:3])}. Bring them back, give another --output, or remove {path} to go on "
                        "with what is there")


def write_inputs(context: TrainContext, stage: str, hashes: dict[str, str]) -> None:
    """Writes the hashes of a stage, for `check_inputs` of later runs."""
    if jax.process_index() == 0:
        path = context.directory / "inputs.json"
        output.write_json(path, (read_json(path) if path.exists() else {}) | {stage: hashes})


def _hash_data(mixture: Mixture, complete_bytes: int) -> dict[str, str]:
    return {f"data {number}: {source.path}":
            f"{_hash_source(source, complete_bytes)} {len(source)} rows, {count} in an epoch"
            for number, (source, count) in enumerate(zip(mixture.sources, mixture.counts, strict=True), 1)}


def _hash_source(source: Source, complete_bytes: int) -> str:
    files = list(source.files)
    complete = all("://" not in file for file in files) and sum(map(os.path.getsize, files)) <= complete_bytes
    if isinstance(source.rows, TfdsRows):
        files += [f"{os.path.dirname(files[0])}/{name}" for name in ("dataset_info.json", "features.json")]
    return _hash_files(files, complete)


def _hash_files(files: list[str], complete: bool) -> str:
    """Returns a hash of names, sizes and contents. It ignores times, because a copy of the inputs has others."""
    digest = hashlib.sha256()
    for file in files:
        path = epath.Path(file)
        size = path.stat().length
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as opened:
            if complete:
                while piece := opened.read(2**24):
                    digest.update(piece)
            else:
                _hash_samples(opened, size, max(2, SAMPLES // len(files)), digest)
    return digest.hexdigest()[:16]


def _hash_samples(file: BinaryIO, size: int, count: int, digest: Any) -> None:
    """Adds evenly spaced samples, up to the end of the file, where parquet and ArrayRecord store their index."""
    last = max(0, size - SAMPLE_BYTES)
    for number in range(count):
        file.seek(last * number // (count - 1))
        digest.update(file.read(SAMPLE_BYTES))


def _hash_json(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
