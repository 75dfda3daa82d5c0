"""Loads the parameters that a stage starts from: the source checkpoints, then what earlier stages have trained."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.models import quantized
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import LOAD_TIMEOUT, allgather_object
from llava_jax.train.digests import check_finite, digests, fingerprint
from llava_jax.train.optimizer import trainable_paths
from llava_jax.train.setup import TrainContext
from llava_jax.weights import differing_paths, load_model, source
from llava_jax.weights.checkpoint import open_model
from llava_jax.weights.source import ParameterSource

SOURCES_NOT_FINITE = "the checkpoints that the recipe starts from hold them"


def load_parameters(context: TrainContext, dtype: Callable[[str], str], before: str | None,
                    store: Callable[[str, jax.Array], Any] = lambda path, x: x) -> Parameters:
    """Returns all parameters before the stage `before`, or after the last stage if it is None.

    `dtype` returns the dtype of a parameter path. `store` is that of `load_model`.
    """
    parameters = load_model(context.recipe.model, context.model, context.recipe.seed, dtype=dtype,
                            sharding=lambda path, shape: context.shardings[path], store=store)
    return parameters | {path: store(path, x.astype(dtype(path)))
                         for path, x in trained_parameters(context, before).items()}


def open_parameters(context: TrainContext) -> tuple[ParameterSource, set[str]]:
    """Opens all parameters after the last stage, and returns the paths of those that differ from the base's too.

    Frozen parameters are read from the checkpoints when they are written, so they need no memory of the devices.
    """
    model = context.recipe.model
    trained = trained_parameters(context, before=None)
    differing = differing_paths(model, source.shapes(context.model))
    opened = source.replace(open_model(model, context.model, context.recipe.seed), source.from_memory(trained))
    return opened, differing | trained.keys()


def trained_parameters(context: TrainContext, before: str | None) -> Parameters:
    """Returns the parameters, float32, that the stages before `before` have trained, or all stages if it is None."""
    trained: Parameters = {}
    shapes = source.shapes(context.model)
    for name, stage in context.recipe.stages.items():
        if name == before:
            break
        like = {path: jax.ShapeDtypeStruct(shapes[path], jnp.float32, sharding=context.shardings[path])
                for path in trainable_paths(stage, list(context.shardings))}
        checkpoints = context.checkpoints(name)
        trained |= checkpoints.trainable(checkpoints.latest(), like)
        checkpoints.close()
    return trained


def split_parameters(context: TrainContext, stage: str, rates: Mapping[str, float]
                     ) -> tuple[Parameters, Parameters, str]:
    """Returns the trainable and the frozen parameters that a stage starts with, and a fingerprint of the frozen ones.

    The paths of `rates` are trainable. Raises UserError if a parameter is not finite.
    """
    kind = context.recipe.model.quantize

    def store(path: str, x: jax.Array) -> Any:
        return x if kind == "none" or path in rates else quantized.store_kernel(path, x, kind)

    parameters = load_parameters(context, lambda path: "float32" if path in rates else context.dtype, stage, store)
    # Names a process that is late, which the collectives that follow cannot.
    allgather_object(f"stages.{stage}: the parameters are loaded", None, LOAD_TIMEOUT)
    trainable = {path: x for path, x in parameters.items() if path in rates}
    frozen = {path: x for path, x in parameters.items() if path not in rates}
    frozen_digests = digests(frozen)
    check_finite(frozen_digests | digests(trainable), f"stages.{stage}", SOURCES_NOT_FINITE)
    return trainable, frozen, fingerprint(frozen_digests)
