"""Meshes of a slice: the recipe's, and which ones a recipe would fit."""

import dataclasses

import jax

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel import sharding
from llava_jax.plan.topologies import Slice
from llava_jax.train.setup import model_layout


def with_slices(recipe: config.Recipe, where: Slice) -> tuple[config.Recipe, list[str]]:
    """The recipe with one replica for each slice if it asks for no replicas, and a line that says so."""
    if where.count == 1 or recipe.mesh.data != 1:
        return recipe, []
    mesh = dataclasses.replace(recipe.mesh, data=where.count)
    return dataclasses.replace(recipe, mesh=mesh), [
        f"one replica for each slice: train needs --mesh.data {where.count} too"]


def plan_mesh(recipe: config.Recipe, where: Slice, model: LlavaConfig) -> jax.sharding.Mesh:
    """The recipe's mesh of a slice's devices; UserError of one line that says what would fit if it does not."""
    devices = where.jax_devices()
    try:
        mesh = sharding.make_mesh(recipe.mesh, devices)
        model_layout(recipe, mesh, model)
    except ValueError as error:
        others = [mesh for mesh in meshes(where) if fits(dataclasses.replace(recipe, mesh=mesh), devices, model)]
        flags = ", or ".join(f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor}"
                             for mesh in others[:3])
        hint = f"on {where.name} these would: {flags}" if others else (
            f"no mesh of {where.name} would; rows that are a multiple of {where.devices} x gradient_accumulation suit "
            "most")
        raise UserError(f"{error}; {hint}") from None
    return mesh


def meshes(where: Slice) -> list[config.Mesh]:
    """The meshes to think of: one replica for each slice, matrices shared within a host, fsdp over all else."""
    host = where.devices // where.hosts
    each = where.devices // where.count
    return [config.Mesh(where.count, each // tensor, tensor) for tensor in (1, 2, 4, 8)
            if host % tensor == 0 and each % tensor == 0]


def fits(recipe: config.Recipe, devices: list[jax.Device], model: LlavaConfig) -> bool:
    """Whether parameters and rows divide over the recipe's mesh."""
    try:
        model_layout(recipe, sharding.make_mesh(recipe.mesh, devices), model)
    except ValueError:
        return False
    return True
