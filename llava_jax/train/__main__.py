"""Trains a recipe: `python -m llava_jax.train [RECIPE] [--FIELD VALUE ...]`.

RECIPE is a file, or the name of one in configs/; without it, `mini`: the paper in miniature, on a CPU.
The same command goes on where a stopped run was. `--help` after a recipe lists every field and its value there.

Exit codes: 0, the model is written; 75, the same command goes on: SIGTERM stopped the run and everything is saved (130
for Ctrl-C), or one of several processes was killed or lost, and the last checkpoint stands; 2, a mistake that must be
mended first, in one line; 1, any other error, with its traceback, after which the same command may go on. Several
processes end together with one code, and the one that failed is named.
"""

import signal
import sys

from llava_jax import cli, config
from llava_jax.data.workers import keep_freed_memory


def main(args: list[str]) -> int:
    name = args.pop(0) if args and not args[0].startswith("-") else "mini"
    module = config.load_recipe_module(name)
    recipe = cli.parse(config.Recipe, args, default=module.recipe(), prog=f"python -m llava_jax.train {name}",
                       description=__doc__)
    keep_freed_memory()
    # Imported here, so that --help and mistakes in the options answer without waiting for JAX.
    import jax

    from llava_jax.parallel.processes import WORK_TIMEOUT, abort_all_on_error, allgather_object, initialize
    from llava_jax.train import output
    from llava_jax.train.lock import lock_directory
    from llava_jax.train.loop import Stopped, train
    from llava_jax.train.setup import setup

    initialize()
    first = jax.process_index() == 0
    with abort_all_on_error(), lock_directory(output.directory(recipe)):
        setup(recipe)  # finds mistakes before any data is made
        # A recipe may bring its own data and its own evaluation: the miniature does both.
        if hasattr(module, "prepare"):
            if first:
                module.prepare(recipe)
            allgather_object("the recipe's data", None, WORK_TIMEOUT)
        try:
            model = train(recipe)
        except Stopped as stopped:
            if first:
                print(stopped, file=sys.stderr)
            return 130 if stopped.signal == signal.SIGINT else cli.STOPPED
        if hasattr(module, "finish") and first:
            module.finish(recipe, model)
    return 0


if __name__ == "__main__":
    cli.run(main)
