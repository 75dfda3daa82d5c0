"""Plans a recipe on a TPU slice: `python -m llava_jax.plan RECIPE --topology v5e-64 [--FIELD VALUE ...]`.

RECIPE and its fields are those of train. The TPU compiler (pip install 'llava_jax[plan]') compiles the recipe's train
step for the slice, on any machine; a TPU of this machine is not used. The exit code is 0 if all planned stages fit, 1
if one does not, 2 for a mistake.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax import cli, config
from llava_jax.errors import UserError
from llava_jax.plan import topologies

if TYPE_CHECKING:  # JAX must be imported after topologies.quiet()
    from llava_jax.models.llava import LlavaConfig


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    options = Parser(prog="python -m llava_jax.plan", allow_abbrev=False, description=__doc__.replace("`", ""),
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog="fields of the recipe: python -m llava_jax.train RECIPE --help")
    add = options.add_argument
    add("recipe", help="file of a recipe, or its name in configs/")
    add("--topology", required=True, help="name of a slice, such as v5e-64, v5p-128, v6e-32; several slices: v5e-256x2")
    add("--stage", help="stage to plan; all by default")
    add("--json", action="store_true", help="print one JSON object")
    add("--dump-hlo", metavar="FILE", help="file for the text of the optimised program, with the compiler's cycles; "
        "for several stages, the stage's name is added before the suffix")
    add("--rows-per-epoch", type=int, metavar="N", help="number of packed sequences of an epoch; by default they are "
        "counted in the data")
    add("--search", action="store_true", help="search the fastest mesh, micro-batches and remat of a stage (by default "
        "the last one) that fit; the batch size does not change")
    add("--tries", type=int, default=8, metavar="N", help="with --search, number of fitting candidates to compile "
        "(default 8)")
    add("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), metavar="N",
        help="with --search, number of parallel compilations; one needs 2 cores and some GB (default: half the cores)")
    add("--inference", action="store_true", help="plan prefill and decode of the recipe's model instead of training")
    add("--batch", type=int, default=1, metavar="B", help="with --inference, number of prompts (default 1)")
    add("--context", type=int, default=2048, metavar="S", help="with --inference, tokens of a prompt (default "
        "2048)")
    add("--price-per-chip-hour", type=float, metavar="PRICE", help="price of a chip for an hour, to report the cost")
    return options


def main(args: list[str]) -> int:
    options, overrides = parser().parse_known_args(args)
    where = topologies.parse(options.topology)
    recipe = cli.parse(config.Recipe, overrides, default=config.load_recipe(options.recipe),
                       prog=f"python -m llava_jax.plan {options.recipe}")
    if options.stage not in (None, *recipe.stages):
        raise UserError(f"--stage {options.stage}: the recipe's stages are {', '.join(recipe.stages)}")
    for name in ("tries", "jobs", "batch", "context", "rows_per_epoch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    topologies.quiet()  # before JAX is imported
    from llava_jax.plan.models import planned_config

    model, notes = planned_config(recipe.model)
    if options.inference:
        return plan_inference(options, where, model, notes)
    if options.search:
        return plan_search(options, recipe, overrides, where, model, notes)
    if options.stage:
        recipe = dataclasses.replace(recipe, stages={options.stage: recipe.stages[options.stage]})
    return plan_stages(options, recipe, where, model, notes)


def plan_stages(options: argparse.Namespace, recipe: config.Recipe, where: topologies.Slice, model: "LlavaConfig",
                notes: list[str]) -> int:
    from llava_jax.models.llava import choose_attention
    from llava_jax.plan import show
    from llava_jax.plan.data import length
    from llava_jax.plan.meshes import plan_mesh, with_slices
    from llava_jax.plan.predict import predict
    from llava_jax.plan.step import compile_step

    recipe, more = with_slices(recipe, where)
    remat = ", ".join(f"{stage.remat} ({name})" for name, stage in recipe.stages.items())
    dtype = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    notes = [*notes, *more, f"attention {choose_attention(recipe.model.attention, 'tpu', model, dtype)}, remat {remat}"]
    mesh = plan_mesh(recipe, where, model)
    plans = []
    if not options.json:
        print(show.header(options.recipe, where, dict(mesh.shape), notes), flush=True)
    for name in recipe.stages:
        program = compile_step(recipe, name, where, mesh, model)
        if options.dump_hlo and program.hlo:
            write_hlo(Path(options.dump_hlo), program.hlo, name if len(recipe.stages) > 1 else "")
        plan = predict(recipe, name, where, model, program, length(recipe, name, model, options.rows_per_epoch))
        plans.append(plan)
        if not options.json:
            print("\n" + show.text(plan, options.price_per_chip_hour), flush=True)
    if options.json:
        print_json(options, where, notes, mesh=dict(mesh.shape),
                   stages=[show.data(plan, options.price_per_chip_hour) for plan in plans])
    return 0 if all(plan.memory.fits for plan in plans) else 1


def plan_search(options: argparse.Namespace, recipe: config.Recipe, overrides: list[str], where: topologies.Slice,
                model: "LlavaConfig", notes: list[str]) -> int:
    from llava_jax.plan import search, show

    stage = options.stage or list(recipe.stages)[-1]
    if not options.json:
        print(show.header(options.recipe, where, {}, notes))
    candidates = search.candidates(recipe, stage, where, model)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report(f"{len(candidates)} ways to run {stage} may fit by formula; compiling until {options.tries} do")
    found = search.search(options.recipe, overrides, stage, where, candidates, options.tries, options.jobs, report)
    if options.json:
        print_json(options, where, notes, stage=stage, candidates=len(candidates), found=[
            {"flags": compiled.candidate.flags(stage), "error": compiled.error} | compiled.plan for compiled in found])
    else:
        print("\n" + show.ranking(found, stage))
    return 0 if any(compiled.fits for compiled in found) else 1


def plan_inference(options: argparse.Namespace, where: topologies.Slice, model: "LlavaConfig", notes: list[str]
                   ) -> int:
    from llava_jax.models.llava import choose_attention
    from llava_jax.plan import inference, show

    notes = [*notes, f"attention {choose_attention('auto', 'tpu', model, 'bfloat16')}"]
    phases = inference.plan_inference(model, where, options.batch, options.context)
    if options.json:
        print_json(options, where, notes, batch=options.batch, context=options.context,
                   phases=[show.phase_data(phase) for phase in phases])
    else:
        print(show.header(options.recipe, where, {"tensor": where.devices}, notes))
        print(f"{options.batch} prompts of {options.context:,} tokens, with one image in every prompt\n")
        print("\n\n".join(show.phase_text(phase) for phase in phases))
    return 0 if all(phase.memory.fits for phase in phases) else 1


def print_json(options: argparse.Namespace, where: topologies.Slice, notes: list[str], **content) -> None:
    """Prints a plan as one JSON object."""
    from llava_jax.plan.show import versions

    print(json.dumps({"recipe": options.recipe, "topology": where.name, "chips": where.chips, "devices": where.devices,
                      "notes": notes, "versions": versions()} | content, indent=1))


def write_hlo(path: Path, text: str, stage: str) -> None:
    """Writes the text of a program, and prints the path on stderr."""
    from llava_jax.files import atomic_write

    path = path.with_name(f"{path.stem}.{stage}{path.suffix}") if stage else path
    with atomic_write(str(path)) as file:
        file.write(text.encode())
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
