"""Opens the parameters of a run, or of one of its checkpoints, for an export."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.files import read_json
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train import inputs
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.optimizer import trainable_paths
from llava_jax.train.setup import model_config, resolve_template
from llava_jax.weights import differing_paths, source
from llava_jax.weights.checkpoint import open_model
from llava_jax.weights.source import ParameterSource
from llava_jax.weights.tables import Shape


class RunParameters(NamedTuple):
    """Configuration and parameters of a run's checkpoint.

    Attributes:
      trained: paths of parameters that the base lacks or has with other values.
      base: path of the checkpoint that the run started from, which has the tokenizer.
    """

    config: LlavaConfig
    parameters: ParameterSource
    trained: set[str]
    base: str


def open_run(path: Path) -> RunParameters | None:
    """Opens RUN, RUN/checkpoints/STAGE or RUN/checkpoints/STAGE/STEP; None if `path` is none of these.

    Without STEP it is the newest checkpoint of STAGE, or of the last stage that has one. A parameter is read when it is
    written. Raises UserError if there is no checkpoint, or if it does not match the recipe.
    """
    path = path.absolute()
    for run, folder in [(path, None), *((folder.parent, folder) for folder in path.parents)][:3]:
        names = path.relative_to(folder).parts if folder else ()
        if (run / "recipe.json").is_file() and (folder is None or folder.name == "checkpoints"):
            return _open(run, *names)
    return None


def _open(run: Path, last_stage: str | None = None, step: str | None = None) -> RunParameters:
    recipe = read_recipe(run / "recipe.json")
    base = recipe.model.llava or recipe.model.language
    model = resolve_template(recipe, model_config(recipe.model), Tokenizer.load(base))
    shapes = source.shapes(model)
    trained: dict[str, tuple[Checkpoints, int]] = {}
    found = None
    for name, stage in recipe.stages.items():
        checkpoints = Checkpoints(run / "checkpoints" / name, recipe.checkpoint_every, recipe.keep_checkpoints)
        number = checkpoints.latest()
        if number is None:
            break
        if step and name == last_stage:
            steps = {str(number): number for number in checkpoints.steps()}
            number = steps.get(step)
            if number is None:
                raise UserError(f"{run / 'checkpoints' / name / step}: no such checkpoint; this stage has those of "
                                f"step {', '.join(steps)}")
        found = name
        trained |= dict.fromkeys(trainable_paths(stage, list(shapes)), (checkpoints, number))
        checkpoints.close()
        if name == last_stage:
            break
    if found is None or last_stage not in (None, found):
        raise UserError(f"{run / 'checkpoints' / (last_stage or '')}: no checkpoint of this run's recipe")
    differing = differing_paths(recipe.model, shapes)
    initial = open_model(recipe.model, model, recipe.seed)
    stored = read_json(run / "inputs.json").get(found) if (run / "inputs.json").is_file() else None
    if isinstance(stored, dict) and inputs.BASE in stored and stored[inputs.BASE] != inputs.hash_base(initial):
        raise UserError(f"{base}: its kernels are not those that {run} was trained with; bring that checkpoint back")
    parameters = _trained({path: shapes[path] for path in trained}, trained, 3 if model.lora else 1)
    return RunParameters(model, source.replace(initial, parameters), trained.keys() | differing, base)


def _trained(shapes: Mapping[str, Shape], checkpoints: Mapping[str, tuple[Checkpoints, int]],
             keep: int) -> ParameterSource:
    """Returns the parameters of checkpoints and steps, of which the last `keep` stay in memory.

    The layers of a parameter are written one after the other. A merge reads a kernel and its two factors by turns.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    @functools.lru_cache(keep)
    def parameter(path: str) -> np.ndarray:
        stage, step = checkpoints[path]
        return np.asarray(stage.parameter(step, path, jax.ShapeDtypeStruct(
            shapes[path], jnp.float32, sharding=device)))

    return ParameterSource(shapes, dict.fromkeys(shapes, np.dtype(np.float32)),
                           lambda path, layer: parameter(path)[... if layer is None else layer])


def read_recipe(file: Path) -> config.Recipe:
    """Reads the model, stages and settings of a recipe from the file that `output.write_recipe` wrote.

    Raises UserError if it has an unknown field, which an earlier or later version wrote.
    """
    raw = read_json(file)
    known = {field.name for field in dataclasses.fields(config.Recipe)}
    try:
        return _from_json(config.Recipe, {name: value for name, value in raw.items() if name in known})
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file}: written by another version, or damaged ({error})") from None


def _from_json(kind: Any, value: Any) -> Any:
    """Builds a value of an annotated type from JSON: dataclasses, dicts, tuples and `X | None`."""
    if isinstance(kind, types.UnionType) and value is not None:
        return _from_json(next(option for option in typing.get_args(kind) if option is not types.NoneType), value)
    if dataclasses.is_dataclass(kind) and value is not None:
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_json(hints.get(name), inner) for name, inner in value.items()})
    if typing.get_origin(kind) is dict:
        return {key: _from_json(typing.get_args(kind)[1], inner) for key, inner in value.items()}
    return tuple(_from_json(None, inner) for inner in value) if isinstance(value, list) else value
