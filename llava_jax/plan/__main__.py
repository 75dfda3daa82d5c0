"""Plans a recipe on a TPU slice: `python -m llava_jax.plan RECIPE --topology v5e-64 [--FIELD VALUE ...]`.

RECIPE and its fields are those of train. The TPU compiler (pip install 'llava_jax[plan]') compiles the recipe's train
step for the slice, on any machine; a TPU of this machine is not used. The exit code is 0 if all planned stages fit, 1
if one does not, 2 for a mistake.
"""

import argparse
import dataclasses

from llava_jax import cli, config
from llava_jax.errors import UserError
from llava_jax.plan import topologies


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    options = Parser(prog="python -m llava_jax.plan", allow_abbrev=False, description=__doc__.replace("`", ""),
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     epilog="fields of the recipe: python -m llava_jax.train RECIPE --help")
    add = options.add_argument
    add("recipe", help="File of a recipe, or its name in configs/.")
    add("--topology", required=True,
        help="Name of a slice, such as v5e-64, v5p-128, v6e-32; of several slices: v5e-256x2.")
    add("--stage", help="Stage to plan; default: all.")
    add("--json", action="store_true", help="Whether to print one JSON object.")
    add("--dump-hlo", metavar="FILE", help="File for the text of the optimised program, with the compiler's cycles. "
        "For several stages, the stage's name is added before the suffix.")
    add("--rows-per-epoch", type=int, metavar="N", help="Number of packed sequences of an epoch; default: counted in "
        "the data.")
    add("--serve", action="store_true", help="Whether to plan a server of the recipe's model instead of training.")
    add("--slots", type=int, default=16, metavar="N", help="With --serve, number of answers at once; default: 16.")
    add("--context", type=int, default=4096, metavar="S", help="With --serve, maximum number of tokens of a prompt and "
        "its answer; default: 4096.")
    add("--quantize", choices=["int8"], help="With --serve, storage of the kernels of the decoder's layers; default: "
        "bfloat16.")
    add("--kv-cache", choices=["int8"], help="With --serve, storage of keys and values; default: bfloat16.")
    add("--price-per-chip-hour", type=float, metavar="PRICE", help="Price of a chip for an hour, to report the cost.")
    return options


def main(args: list[str]) -> int:
    options, overrides = parser().parse_known_args(args)
    where = topologies.parse(options.topology)
    recipe = cli.parse(config.Recipe, overrides, default=config.load_recipe(options.recipe),
                       prog=f"python -m llava_jax.plan {options.recipe}")
    if options.stage not in (None, *recipe.stages):
        raise UserError(f"--stage {options.stage}: the recipe's stages are {', '.join(recipe.stages)}")
    for name in ("slots", "context", "rows_per_epoch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    topologies.quiet()
    from llava_jax.plan import commands  # imports JAX, which must not find a TPU

    if options.serve:
        return commands.plan_serving(options, recipe, where)
    if options.stage:
        recipe = dataclasses.replace(recipe, stages={options.stage: recipe.stages[options.stage]})
    return commands.plan_stages(options, recipe, where)


if __name__ == "__main__":
    cli.run(main)
