"""Sets a training run up once: checks the recipe, reads the model's configuration and loads the tokenizer."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import NamedSharding

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.files import to_path
from llava_jax.models.llava import LlavaConfig, abstract_params, choose_attention
from llava_jax.models.quantized import is_quantizable
from llava_jax.parallel import sharding
from llava_jax.parallel.processes import assert_equal_across_processes
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train import output
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.optimizer import trainable_paths
from llava_jax.weights import fresh_paths, processors, projector_files, read_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
"""Packages whose versions must be the same on all hosts."""


@dataclass(frozen=True)
class TrainContext:
    """A recipe, and all that is derived from it and the devices. It does not change during a run."""

    recipe: config.Recipe
    mesh: jax.sharding.Mesh
    model: LlavaConfig
    dtype: str
    """Compute dtype, and storage dtype of frozen parameters."""
    graphs: dict[str, nnx.GraphDef]
    """Structure of the model in each stage."""
    shardings: dict[str, NamedSharding]
    """Sharding of each parameter path."""
    tokenizer: Tokenizer

    @property
    def directory(self) -> Path:
        """Output directory: a local path, or the path-like object of a bucket."""
        return output.directory(self.recipe)

    @property
    def tokenizer_directory(self) -> str:
        """Path of the source checkpoint that has the tokenizer."""
        return self.recipe.model.llava or self.recipe.model.language

    def checkpoints(self, stage: str) -> Checkpoints:
        """Opens the checkpoints of a stage. The caller closes them."""
        recipe = self.recipe
        return Checkpoints(self.directory / "checkpoints" / stage, recipe.checkpoint_every, recipe.keep_checkpoints)


def setup(recipe: config.Recipe) -> TrainContext:
    """Checks all of a recipe that can be checked before data is read, including its output directory.

    Raises UserError, also if processes differ in recipe, code or packages. All processes call it.
    """
    assert_equal_across_processes("the recipe", output.flat(recipe))
    installed = {"llava_jax": code_hash()} | {name: version(name) for name in PACKAGES}
    assert_equal_across_processes("the installation", installed)
    mesh = sharding.make_mesh(recipe.mesh)
    model = model_config(recipe.model)
    dtype, graphs, _, shardings = model_layout(recipe, mesh, model)
    tokenizer = Tokenizer.load(recipe.model.llava or recipe.model.language)
    # Only the first process prints which template it chose.
    with contextlib.redirect_stderr(io.StringIO()) if jax.process_index() else contextlib.nullcontext():
        model = resolve_template(recipe, model, tokenizer)
    output.check_shared(recipe)
    output.check_recipe(recipe)
    return TrainContext(recipe, mesh, model, dtype, graphs, shardings, tokenizer)


def model_config(model: config.Model, read: Callable = read_config) -> LlavaConfig:
    """Returns the configuration of a recipe's model, from its source checkpoints.

    `read` returns the configuration of a checkpoint directory; for a LLaVA its further arguments are the template's
    name and the folder of the vision tower.
    """
    if model.adapter:
        return read_config(model.llava or model.language, model.template, model.vision, model.adapter)
    if model.llava:
        checkpoint = read(model.llava, model.template, model.vision or None)
        if not isinstance(checkpoint, LlavaConfig):
            raise UserError(f"model.llava: {model.llava} is only one part of a LLaVA; name it as vision or language")
        if model.lora and checkpoint.lora:
            raise UserError(f"model.lora: {model.llava} has adapters already, which are trained further without "
                            "model.lora; merge them first (python -m llava_jax.convert --merge) to add new ones")
        return dataclasses.replace(checkpoint, lora=model.lora or checkpoint.lora)
    kind = model.projector
    if kind is None and model.projector_weights and to_path(model.projector_weights).exists():  # `plan` needs no files
        kind = projector_files.kind(model.projector_weights)
    chosen = {"projector": kind, "feature_layer": model.feature_layer,
              "feature_select": model.feature_select, "template": model.template, "lora": model.lora}
    joined = LlavaConfig(vision=read(model.vision), text=read(model.language),
                         **{name: value for name, value in chosen.items() if value is not None})
    return processors.with_colours(joined, model.vision).with_image_mode(model.image_mode, model.pinpoints)


def model_layout(
    recipe: config.Recipe, mesh: jax.sharding.Mesh, model: LlavaConfig
) -> tuple[str, dict[str, nnx.GraphDef], dict[str, jax.ShapeDtypeStruct], dict[str, NamedSharding]]:
    """Returns the compute dtype, the model's graph by stage, and every parameter's shape and sharding.

    It uses no device and no file, so `mesh` may consist of a topology's devices. Raises UserError that names the field
    if the recipe does not match the mesh, or its tables do not match the parameters.
    """
    platform = mesh.devices.flat[0].platform
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    attention = choose_attention(recipe.model.attention, platform, model, dtype)
    graphs = {}
    for name, stage in recipe.stages.items():
        graphs[name], shapes = abstract_params(model, dtype, attention, stage.remat)
    fresh_paths(recipe.model, shapes)
    shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    sharding.check_rows(mesh)
    data_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, stage in recipe.stages.items():
        if (stage.data.image_mode or "").startswith("anyres") and model.processor.is_fixed:
            raise UserError(f"stages.{name}.data.image_mode is {stage.data.image_mode}, and the model's is "
                            f"{model.processor.mode}: set model.image_mode to anyres too, with model.pinpoints, and "
                            "another mode in the other stages")
        try:
            trainable_paths(stage, list(shapes))
        except ValueError as error:
            raise UserError(f"stages.{name}.{error}") from None
        if stage.batch_size // stage.gradient_accumulation % data_devices:
            raise UserError(f"stages.{name}.batch_size: {stage.batch_size} sequences in "
                            f"{stage.gradient_accumulation} micro-batches do not divide over data x fsdp = "
                            f"{data_devices} devices")
    kernels = set(filter(is_quantizable, shapes))
    if recipe.model.quantize != "none" and all(
            kernels <= trainable_paths(stage, list(shapes)).keys() for stage in recipe.stages.values()):
        raise UserError(f"model.quantize {recipe.model.quantize}: every stage trains all kernels of the decoder's "
                        "layers, and only frozen kernels are quantised; train adapters (model.lora), or leave it out")
    return dtype, graphs, shapes, shardings


def resolve_template(recipe: config.Recipe, model: LlavaConfig, tokenizer: Tokenizer) -> LlavaConfig:
    """Returns the model with the template that it is trained on.

    If parts are joined and the recipe names no template, one that matches the tokenizer is chosen. Raises UserError if
    a template, the tokenizer and the decoder do not match each other.
    """
    source = recipe.model.llava or recipe.model.language
    if not recipe.model.llava and recipe.model.template is None:
        model = dataclasses.replace(model, template=agreement.template_for_decoder(tokenizer, source))
    last = list(recipe.stages.values())[-1]
    model = dataclasses.replace(model, template=final_template(recipe, model.template), exif=last.data.exif,
                                video=last.data.video)
    # Only the template that a LLaVA checkpoint names was used in its training.
    agreement.check(model.template, tokenizer, model.text.vocab_size, source,
                    trained=bool(recipe.model.llava and not recipe.model.template),
                    visual_tokens=model.processor.features_per_tile, context=model.text.max_length)
    for name, stage in recipe.stages.items():
        data = stage.data
        if data.template:
            agreement.check(data.template, tokenizer, model.text.vocab_size, f"stages.{name}.data.template")
        agreement.check_length(data.sequence_length, model.text.max_length, f"stages.{name}.data.sequence_length")
    return model


def final_template(recipe: config.Recipe, default: str) -> str:
    """Returns the template of the finished model: that of the last stage with conversations.

    Without such a stage it is `model.template` if that is set, otherwise the captions' template. Raises UserError if
    `model.template` differs from that stage's, because the model would be prompted in another form than trained.
    """
    named = {name: templates.get(stage.data.template or default) for name, stage in recipe.stages.items()}
    chats = [name for name, template in named.items() if not template.captions]
    if not chats and recipe.model.template:
        return templates.get(recipe.model.template).name
    last = (chats or list(named))[-1]
    if recipe.model.template and named[last] != templates.get(recipe.model.template):
        raise UserError(f"stages.{last}.data.template is {named[last].name}, model.template {recipe.model.template}: "
                        "the model would be asked in another form than trained; give both the same, or leave one out")
    return named[last].name


def code_hash() -> str:
    """Returns a hash of this package's code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
