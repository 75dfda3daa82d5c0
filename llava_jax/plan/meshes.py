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

    def build(axes: config.Mesh) -> jax.sharding.Mesh | str:
        try:
            mesh = sharding.make_mesh(axes, devices)
            model_layout(dataclasses.replace(recipe, mesh=axes), mesh, model)
            return mesh
        except ValueError as error:
            return str(error)

    if not isinstance(mesh := build(recipe.mesh), str):
        return mesh
    # Data parallel over slices, tensor parallel within a host, fsdp over the other devices.
    others = [config.Mesh(where.count, where.devices // where.count // tensor, tensor) for tensor in (1, 2, 4, 8)
              if where.devices // where.hosts % tensor == 0]
    flags = [f"--mesh.data {axes.data} --mesh.fsdp {axes.fsdp} --mesh.tensor {axes.tensor}"
             for axes in others if not isinstance(build(axes), str)]
    hint = f"on {where.name} these would: {', or '.join(flags[:3])}" if flags else (
        f"no mesh of {where.name} would; a batch_size that is a multiple of {where.devices} x "
        "gradient_accumulation fits most meshes")
    raise UserError(f"{mesh}; {hint}")
