"""Builds the recipe's mesh on a slice, and suggests others if the recipe does not fit it."""

import dataclasses

import jax

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel import sharding
from llava_jax.plan.topologies import Slice
from llava_jax.train.setup import model_layout


def with_slices(recipe: config.Recipe, where: Slice) -> tuple[config.Recipe, list[str]]:
    """Returns the recipe, data parallel over the slices unless it sets mesh.data, and a note about the change."""
    if where.count == 1 or recipe.mesh.data != 1:
        return recipe, []
    mesh = dataclasses.replace(recipe.mesh, data=where.count)
    return dataclasses.replace(recipe, mesh=mesh), [
        f"data parallel over {where.count} slices: train needs --mesh.data {where.count} too"]


def plan_mesh(recipe: config.Recipe, where: Slice, model: LlavaConfig) -> jax.sharding.Mesh:
    """Builds the recipe's mesh. Raises UserError, with the meshes that would fit, if the recipe does not fit it."""
    devices = where.jax_devices()
    try:
        mesh = sharding.make_mesh(recipe.mesh, devices)
        model_layout(recipe, mesh, model)
    except ValueError as error:
        others = [mesh for mesh in meshes(where) if fits(dataclasses.replace(recipe, mesh=mesh), devices, model)]
        flags = ", or ".join(f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor}"
                             for mesh in others[:3])
        hint = f"on {where.name} these would: {flags}" if others else (
            f"no mesh of {where.name} would; a batch_size that is a multiple of {where.devices} x "
            "gradient_accumulation fits most meshes")
        raise UserError(f"{error}; {hint}") from None
    return mesh


def meshes(where: Slice) -> list[config.Mesh]:
    """Returns the meshes to consider: data parallel over slices, tensor parallel within a host, fsdp over the other
    devices."""
    per_host, per_slice = where.devices // where.hosts, where.devices // where.count
    return [config.Mesh(where.count, per_slice // tensor, tensor) for tensor in (1, 2, 4, 8)
            if per_host % tensor == 0 and per_slice % tensor == 0]


def fits(recipe: config.Recipe, devices: list[jax.Device], model: LlavaConfig) -> bool:
    """Returns whether parameters and batches are divisible by the recipe's mesh."""
    try:
        model_layout(recipe, sharding.make_mesh(recipe.mesh, devices), model)
    except ValueError:
        return False
    return True
