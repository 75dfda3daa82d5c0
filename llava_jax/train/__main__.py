"""Trains a recipe: `python -m llava_jax.train [RECIPE] [--FIELD VALUE ...]`.

RECIPE is a file, or the name of one in configs/; the default is `mini`: the paper in miniature, on a CPU.
The same command continues a run that was stopped. `--help` after a recipe lists every field and its value there.

Exit codes: 0, the model is written. 75 (130 for Ctrl-C), the same command continues: SIGTERM stopped the run and
everything is saved, or one of several processes was killed or lost, and the last checkpoint is valid. 2, a mistake that
must be corrected first, in one line. 1, any other error, with its traceback; the same command may succeed. Several
processes end together with one code, and the one that failed is named.
"""

import glob
import os
import signal
import sys

from llava_jax import cli, config
from llava_jax.data.workers import keep_freed_memory

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
"""Device files of GPUs and TPUs."""


def uses_cpu() -> bool:
    """Returns whether JAX will compute on CPUs, as JAX_PLATFORMS says or the absence of accelerators."""
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return platform == "cpu" or not platform and not any(map(glob.glob, ACCELERATORS))


def main(args: list[str]) -> int:
    """Trains the recipe that the options describe and returns an exit code. Raises UserError for a mistake."""
    name = args.pop(0) if args and not args[0].startswith("-") else "mini"
    default = config.load_recipe(name)
    recipe = cli.parse(type(default), args, default=default, prog=f"python -m llava_jax.train {name}",
                       description=__doc__)
    if uses_cpu():
        keep_freed_memory()  # before XLA starts threads, because a thread that has allocated before keeps its arena
    # Imported here, so that --help and mistakes in the options answer without waiting for JAX.
    import jax

    from llava_jax.parallel.processes import WORK_TIMEOUT, abort_all_on_error, allgather_object, initialize
    from llava_jax.train import output
    from llava_jax.train.lock import lock_directory
    from llava_jax.train.loop import train_stages
    from llava_jax.train.setup import setup
    from llava_jax.train.stop import Stopped

    initialize()
    first = jax.process_index() == 0
    with abort_all_on_error(), lock_directory(output.directory(recipe)):
        context = setup(recipe)
        if first:
            recipe.prepare()
        allgather_object("the recipe's data", None, WORK_TIMEOUT)
        try:
            model = train_stages(context)
        except Stopped as stopped:
            if first:
                print(stopped, file=sys.stderr)
            return 130 if stopped.signal == signal.SIGINT else cli.STOPPED
        if first:
            print(f"the model is {model}", flush=True)
            recipe.finish(model)
    return 0


if __name__ == "__main__":
    cli.run(main)
