"""Runs the two kinds of plans, stages and a server, and prints them as text or JSON."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from llava_jax import config
from llava_jax.files import write_file
from llava_jax.models.llava import choose_attention
from llava_jax.parallel.sharding import make_mesh
from llava_jax.plan import serve, show
from llava_jax.plan.data import length
from llava_jax.plan.models import planned_config
from llava_jax.plan.predict import predict
from llava_jax.plan.step import compile_step, with_slices
from llava_jax.plan.topologies import Slice


def plan_stages(options: argparse.Namespace, recipe: config.Recipe, where: Slice) -> int:
    """Plans the stages of a recipe one by one."""
    model, notes = planned_config(recipe.model)
    recipe, more = with_slices(recipe, where)
    remat = ", ".join(f"{stage.remat} ({name})" for name, stage in recipe.stages.items())
    dtype = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    notes = [*notes, *more, f"attention {choose_attention(recipe.model.attention, 'tpu', model, dtype)}, remat {remat}"]
    mesh, plans = make_mesh(recipe.mesh, where.jax_devices()), []
    about = describe(options, where, notes, dict(mesh.shape))
    for name in recipe.stages:
        program = compile_step(recipe, name, where, mesh, model)
        if options.dump_hlo and program.hlo:
            path = Path(options.dump_hlo)
            path = path.with_name(f"{path.stem}.{name}{path.suffix}") if len(recipe.stages) > 1 else path
            write_file(str(path), program.hlo)
            print(f"wrote {path}", file=sys.stderr)
        plans.append(predict(recipe, name, where, model, program, length(recipe, name, model, options.rows_per_epoch),
                             options.price_per_chip_hour))
        if not options.json:
            print("\n" + show.text(plans[-1], where, options.price_per_chip_hour), flush=True)
    if options.json:
        print(json.dumps(about | {"stages": plans}, indent=1))
    return 0 if all(plan["fits"] for plan in plans) else 1


def plan_serving(options: argparse.Namespace, recipe: config.Recipe, where: Slice) -> int:
    """Plans a server of a recipe's model."""
    model, notes = planned_config(recipe.model)
    notes = [*notes, f"attention {choose_attention('auto', 'tpu', model, 'bfloat16')}, kernels "
             f"{options.quantize or 'bfloat16'}, keys and values {options.kv_cache or 'bfloat16'}"]
    plan = serve.plan_serving(model, where, options.slots, options.context, options.quantize, options.kv_cache)
    about = describe(options, where, notes, {"tensor": where.devices})
    print(json.dumps(about | plan, indent=1) if options.json else "\n" + show.serving_text(plan))
    return 0 if plan["fits"] else 1


def describe(options: argparse.Namespace, where: Slice, notes: list[str], mesh: dict[str, int]) -> dict:
    """Returns recipe, slice, mesh, versions and notes as plain data. Prints them unless --json is given."""
    about = {"recipe": options.recipe, "topology": where.name, "chips": where.chips, "devices": where.devices,
             "notes": notes, "versions": {name: version(name) for name in ("jax", "libtpu")}, "mesh": mesh}
    if not options.json:
        print(show.header(about, where), flush=True)
    return about
