"""Evaluates a model on benchmarks: `python -m llava_jax.evaluate BENCHMARK --data DIR ...`.

With --model DIR --out DIR the model answers every question, and the same command continues a stopped run. With
--answers FILE, a file of answers is scored. BENCHMARK is one of these:
"""

import importlib

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.evaluate.runner import command
from llava_jax.evaluate.tasks.base import TASKS, get_task

COMMANDS = {
    "scienceqa-data": "llava_jax.evaluate.scienceqa.problems:ScienceQAData",
    "scienceqa-ensemble": "llava_jax.evaluate.scienceqa.ensemble:ScienceQAEnsemble",
    "pope-data": "llava_jax.evaluate.tasks.pope_data:PopeData",
    "probes-data": "llava_jax.evaluate.probes.make_probes:ProbesData",
    "make-bench": "llava_jax.evaluate.judge.make_bench:MakeBench",
    "judge": "llava_jax.evaluate.judge.command:JudgeAnswers",
    "reviews": "llava_jax.evaluate.judge.reviews:SummarizeReviews",
    "compare": "llava_jax.evaluate.runner.compare:CompareRuns",
    "published": "llava_jax.evaluate.runner.published:ShowPublished",
}
"""Maps the name of a command to "module:class"."""


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "list"):
        print(__doc__)
        for name in TASKS:
            print(f"  {name:18} {get_task(name).title}: {get_task(name).required_files}")
        print("\nOther commands:\n")
        for name in COMMANDS:
            print(f"  {name:18} {(_command(name).__doc__ or '').splitlines()[0]}")
        print("\nHelp of a benchmark or command: python -m llava_jax.evaluate NAME --help")
        return 0 if args else 2
    name = args[0]
    if name not in TASKS and name not in COMMANDS:
        raise UserError(f"evaluate knows no {name!r}; there are {', '.join([*TASKS, *COMMANDS])}")
    kind = _command(name) if name in COMMANDS else command.task_command(name)
    return cli.parse(kind, args[1:], prog=f"python -m llava_jax.evaluate {name}").run()


def _command(name: str) -> type:
    module, kind = COMMANDS[name].split(":")
    return getattr(importlib.import_module(module), kind)


if __name__ == "__main__":
    cli.run(main)
