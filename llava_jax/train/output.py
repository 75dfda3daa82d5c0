"""Checks and writes the output directory of a run, which is local, shared by the hosts, or in a bucket."""

import dataclasses
import json
import secrets
import shutil
import time
from fnmatch import fnmatchcase
from pathlib import Path

import jax
from etils import epath

from llava_jax import config, files
from llava_jax.errors import UserError
from llava_jax.files import atomic_write, read_json
from llava_jax.parallel.processes import CollectiveError, allgather_object

RESUMABLE_FIELDS = ("output", "mesh.*", "log_every", "validate_every", "sample_every", "checkpoint_every",
                    "keep_checkpoints", "tensorboard", "wandb", "model.attention", "stages.*.remat",
                    "stages.*.optimizer.offload", "stages.*.data.workers", "stages.*.data.validation")
"""Fields that may change when a run is resumed, because they do not change what it learns."""

RESUMABLE_WHEN_FINISHED = ("path", "image_root", "bad_rows")
"""Fields of a stage's data that nothing reads once a later stage has started."""

VISIBLE_TIMEOUT = 60.0
"""Seconds within which all hosts must see a new file. NFS clients cache the absence of a file for so long."""


def directory(recipe: config.Recipe) -> Path:
    """Returns the output directory: a local path, or the path-like object of a bucket (gs://...)."""
    return epath.Path(recipe.output) if "://" in recipe.output else Path(recipe.output)


def check_shared(recipe: config.Recipe) -> None:
    """Raises CollectiveError that names the processes which do not see process 0's output directory."""
    if jax.process_count() == 1:
        return
    folder, first = directory(recipe), jax.process_index() == 0
    name = allgather_object("the name of a file", f".shared-{secrets.token_hex(8)}")[0]
    new = first and not folder.exists()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    allgather_object("the file is there", None)
    until = time.monotonic() + VISIBLE_TIMEOUT
    while not (seen := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = [str(i) for i, seen in enumerate(allgather_object("the file is seen", seen)) if not seen]
    if first:
        (folder / name).unlink()
        if new:  # a run that fails at its start leaves nothing
            folder.rmdir()
    if blind:
        raise CollectiveError(f"{recipe.output}: what process 0 writes there is not seen by process "
                              f"{', '.join(blind[:8])}; give an --output that all hosts share, gs://BUCKET/... "
                              "or on a network file system")


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of killed runs. The caller has locked the directory."""
    if jax.process_index() == 0 and isinstance(folder, Path):
        files.remove_leftovers(str(folder / "model"))
        for pattern in (".shared-*", ".model.????????", ".adapter.????????", "checkpoints/*/*.orbax-checkpoint-tmp"):
            for leftover in folder.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
    allgather_object("the leftovers are gone", None)


def check_recipe(recipe: config.Recipe) -> None:
    """Raises UserError if the output directory has the run of another recipe.

    Until the model is written, stages that have no checkpoint yet may be changed, added or left out.
    """
    path = directory(recipe) / "recipe.json"
    if not path.exists():
        return
    stored = read_json(path)
    if not isinstance(stored.get("stages"), dict):
        raise UserError(f"{path}: stages is missing or no object; the file is damaged: remove it if you are sure that "
                        "this directory holds a run of the same recipe")
    current = flat(recipe)
    if unknown := [name for name in _flat(stored) if not name.startswith("stages.") and name not in current]:
        raise UserError(f"{recipe.output}: holds a run of another version of this project, whose recipe has "
                        f"{', '.join(unknown[:6])}; give another --output, or remove the directory to start again")
    started = finished = list(stored["stages"])
    waiting: set[str] = set()
    if not has_model(recipe):
        started = [name for name in started if has_started(recipe, name)]
        finished, waiting = started[:-1], {*stored["stages"], *recipe.stages}.difference(started)
    free = [*RESUMABLE_FIELDS, *(f"stages.{name}.*" for name in waiting),
            *(f"stages.{name}.data.{field}" for name in finished for field in RESUMABLE_WHEN_FINISHED)]
    changed = current.items() ^ _flat(stored).items()
    fields = sorted({name for name, _ in changed if not any(fnmatchcase(name, pattern) for pattern in free)})
    if not fields and list(recipe.stages)[: len(started)] != started:
        fields = ["the order of the stages"]
    if fields:
        raise UserError(f"{recipe.output}: holds a run of another recipe (different: {', '.join(fields[:6])}); "
                        "give another --output, or remove the directory to start again")


def has_model(recipe: config.Recipe) -> bool:
    """Returns whether the finished model exists."""
    target = directory(recipe) / "model"
    # A bucket cannot rename a directory, so the file that is copied last marks a complete one.
    return (target if isinstance(target, Path) else target / "config.json").exists()


def has_started(recipe: config.Recipe, stage: str) -> bool:
    """Returns whether a stage has a checkpoint."""
    folder = directory(recipe) / "checkpoints" / stage
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def has_later_started(recipe: config.Recipe, stage: str) -> bool:
    """Returns whether a stage after this one has a checkpoint, so that this one was finished once."""
    stages = list(recipe.stages)
    return any(has_started(recipe, later) for later in stages[stages.index(stage) + 1 :])


def write_recipe(recipe: config.Recipe) -> None:
    """Writes the recipe to its output directory, for `check_recipe` of later runs."""
    if jax.process_index() == 0:
        write_json(directory(recipe) / "recipe.json", _plain(recipe))


def write_json(path: Path, content: dict) -> None:
    """Writes a file atomically, also in a bucket. Creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, also in a bucket."""
    if isinstance(path, Path):
        with atomic_write(path) as file:
            file.write(text.encode())
    else:
        path.write_text(text)


def flat(recipe: config.Recipe) -> dict[str, str]:
    """Returns the value of every field, as JSON, by its dotted name."""
    return _flat(_plain(recipe))


def _plain(recipe: config.Recipe) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat
