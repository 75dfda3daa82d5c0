"""The output directory of a run: local, shared by the hosts, or in a bucket; whose run it holds."""

import dataclasses
import json
import secrets
import time
from fnmatch import fnmatchcase
from pathlib import Path

import jax
from etils import epath

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.processes.group import Everywhere, gather

# What may change between a run and its continuation: it steers what is reported and kept, not what is learned.
FREE = ("output", "mesh.*", "log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints",
        "tensorboard", "wandb", "model.attention", "stages.*.remat", "stages.*.optimizer.offload",
        "stages.*.data.workers", "stages.*.data.validation")

SEEN_WITHIN = 60.0
"""Seconds after which a new file must be seen by all hosts: as long as NFS may believe that it is not there."""


def directory(recipe: config.Recipe) -> Path:
    """The output directory: a local path, or the path-like of a bucket (gs://...)."""
    return epath.Path(recipe.output) if "://" in recipe.output else Path(recipe.output)


def check_shared(recipe: config.Recipe) -> None:
    """Everywhere, naming the processes that do not see the directory in which process 0 writes."""
    if jax.process_count() == 1:
        return
    folder, first = directory(recipe), jax.process_index() == 0
    name = gather("the name of a file", f".shared-{secrets.token_hex(8)}")[0]
    new = first and not folder.exists()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    gather("the file is there", None)
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = [str(i) for i, seen in enumerate(gather("the file is seen", seen)) if not seen]
    if first:
        (folder / name).unlink()
        if new:  # a run that fails at its start should leave nothing
            folder.rmdir()
    if blind:
        raise Everywhere(f"{recipe.output}: what process 0 writes there is not seen by process {', '.join(blind[:8])}; "
                         "give an --output that all hosts share, gs://BUCKET/... or on a network file system")


def check_recipe(recipe: config.Recipe) -> None:
    """UserError if the output directory holds the run of another recipe."""
    path = directory(recipe) / "recipe.json"
    if path.exists():
        changed = flat(recipe).items() ^ _flat(json.loads(path.read_text())).items()
        fields = sorted({name for name, _ in changed if not any(fnmatchcase(name, free) for free in FREE)})
        if fields:
            raise UserError(f"{recipe.output}: holds a run of another recipe (different: {', '.join(fields[:6])}); "
                             "give another --output, or remove the directory to start again")


def claim(recipe: config.Recipe) -> None:
    """Writes the recipe into its output directory, for `check_recipe` of later runs."""
    if jax.process_index() == 0:
        folder = directory(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(_plain(recipe), indent=1) + "\n")


def flat(recipe: config.Recipe) -> dict[str, str]:
    """Every field by its dotted name, its value as JSON."""
    return _flat(_plain(recipe))


def _plain(recipe: config.Recipe) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat
