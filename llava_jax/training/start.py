"""Where the parameters of a run come from: its source checkpoints, then what its earlier stages have trained."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from llava_jax import config, sharding
from llava_jax.models.llava import LlavaConfig, Parameters, abstract, split
from llava_jax.models.projector import Projector
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.training.checkpoint import Checkpoints
from llava_jax.training.optimizer import trainable_paths
from llava_jax.weights import load_checkpoint, read_config

# What may change between a run and its continuation: it steers what is reported and kept, not what is learned.
FREE = {"output", "mesh", "log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints",
        "tensorboard", "wandb", "model.remat", "data.workers", "data.validation"}


@dataclass(frozen=True)
class Run:
    """A recipe, with what follows from it and from the devices."""

    recipe: config.Recipe
    mesh: jax.sharding.Mesh
    model: LlavaConfig
    dtype: str
    graph: nnx.GraphDef
    shardings: dict[str, jax.sharding.NamedSharding]
    tokenizer: Tokenizer

    @property
    def directory(self) -> Path:
        return Path(self.recipe.output)

    @property
    def tokenizer_directory(self) -> str:
        return self.recipe.model.llava or self.recipe.model.language

    def checkpoints(self, stage: str) -> Checkpoints:
        recipe = self.recipe
        return Checkpoints(self.directory / "checkpoints" / stage, recipe.checkpoint_every, recipe.keep_checkpoints)


def begin(recipe: config.Recipe) -> Run:
    """Checks all of a recipe that can be checked before training, its output directory included."""
    mesh = sharding.make_mesh(recipe.mesh)
    model = model_config(recipe.model)
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    graph, shapes = abstract(model, dtype, recipe.model.remat)
    shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    groups = mesh.shape["replica"] * mesh.shape["fsdp"]
    if jax.local_device_count() % mesh.shape["tensor"]:
        raise ValueError(f"mesh.tensor: {mesh.shape['tensor']} devices would share rows across processes, which have "
                         f"{jax.local_device_count()} each; let it divide that number")
    if recipe.sample_every and jax.process_count() > 1:
        raise ValueError("sample_every: sample answers are made in runs of one process; set it to 0")
    for name, stage in recipe.stages.items():
        try:
            trainable_paths(stage, list(shapes))
        except ValueError as error:
            raise ValueError(f"stages.{name}.{error}") from None
        if stage.rows // stage.accumulate % groups:
            raise ValueError(f"stages.{name}.rows: {stage.rows} rows in {stage.accumulate} micro-batches do not "
                             f"divide over replica x fsdp = {groups} devices")
    tokenizer = Tokenizer.load(recipe.model.llava or recipe.model.language)
    check_output(recipe)
    return Run(recipe, mesh, model, dtype, graph, shardings, tokenizer)


def model_config(model: config.Model) -> LlavaConfig:
    """The configuration of the model that a recipe describes, read from its source checkpoints."""
    if model.llava:
        found = read_config(model.llava)
        if not isinstance(found, LlavaConfig):
            raise ValueError(f"model.llava: {model.llava} is only one part of a LLaVA; name it as vision or language")
        return dataclasses.replace(found, template=model.template or found.template)
    chosen = {"projector": model.projector, "feature_layer": model.feature_layer, "image_mode": model.image_mode,
              "feature_select": model.feature_select, "template": model.template}
    return LlavaConfig(vision=read_config(model.vision), text=read_config(model.language),
                       **{name: value for name, value in chosen.items() if value is not None})


def check_output(recipe: config.Recipe) -> None:
    """ValueError if the output directory holds the run of another recipe."""
    path = Path(recipe.output) / "recipe.json"
    if path.exists():
        changed = _flat(_plain(recipe)).items() ^ _flat(json.loads(path.read_text())).items()
        fields = sorted({name for name, _ in changed if not _is_free(name)})
        if fields:
            raise ValueError(f"{recipe.output}: holds a run of another recipe (different: {', '.join(fields[:6])}); "
                             "give another --output, or remove the directory to start again")


def claim_output(recipe: config.Recipe) -> None:
    """Writes the recipe into its output directory, for `check_output` of later runs."""
    if jax.process_index() == 0:
        directory = Path(recipe.output)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "recipe.json").write_text(json.dumps(_plain(recipe), indent=1) + "\n")


def _plain(recipe: config.Recipe) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _flat(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in FREE or ".".join(parts[-2:]) in FREE


def load_parameters(run: Run, dtype: Callable[[str], str], before: str | None) -> Parameters:
    """All parameters as they are before the stage `before` (None: after the last), each in the dtype of its path."""
    source = run.recipe.model
    if source.llava:
        parameters = load_checkpoint(source.llava, dtype=dtype, sharding=lambda path, shape: run.shardings[path])[1]
    else:
        parameters = init_projector(run, dtype)
        for part in (source.vision, source.language):
            parameters |= load_checkpoint(part, dtype=dtype, sharding=lambda path, shape: run.shardings[path])[1]
    for stage in run.recipe.stages:
        if stage == before:
            break
        checkpoints = run.checkpoints(stage)
        rates = trainable_paths(run.recipe.stages[stage], list(run.shardings))
        like = {path: jax.ShapeDtypeStruct(parameters[path].shape, jnp.float32, sharding=run.shardings[path])
                for path in rates}
        trained = checkpoints.trainable(checkpoints.latest(), like)
        parameters |= {path: x.astype(dtype(path)) for path, x in trained.items()}
        checkpoints.close()
    return parameters


def init_projector(run: Run, dtype: Callable[[str], str]) -> Parameters:
    """A new projector by the recipe's seed, made where it lies."""
    def make():
        model = Projector(run.model.projector, run.model.vision.width, run.model.text.width,
                          rngs=nnx.Rngs(run.recipe.seed))
        named = {f"projector/{path}": x for path, x in split(model)[1].items()}
        return {path: x.astype(dtype(path)) for path, x in named.items()}

    shardings = {path: s for path, s in run.shardings.items() if path.startswith("projector/")}
    return jax.jit(make, out_shardings=shardings)()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float64(value)).sum())
