"""Puts benchmarks to a model and scores the answers: `python -m llava_jax.evaluate BENCH --data DIR ...`.

With --model DIR --out DIR every question is answered; the same command goes on where a stopped run was. With --answers
FILE, a file of answers is scored as it is. BENCH is one of these:
"""

import importlib

from llava_jax import cli
from llava_jax.benchmarks import running
from llava_jax.benchmarks.bench import BENCHES, get
from llava_jax.errors import UserError

COMMANDS = {
    "scienceqa-data": "llava_jax.benchmarks.scienceqa_data:ScienceQAData",
    "scienceqa-ensemble": "llava_jax.benchmarks.scienceqa_ensemble:ScienceQAEnsemble",
    "pope-data": "llava_jax.benchmarks.pope_data:PopeData",
    "probes-data": "llava_jax.benchmarks.probes_data:ProbesData",
    "make-bench": "llava_jax.benchmarks.make_bench:MakeBench",
    "judge": "llava_jax.benchmarks.judge:Judge",
    "reviews": "llava_jax.benchmarks.reviews:Reviews",
    "compare": "llava_jax.benchmarks.compare:Compare",
    "published": "llava_jax.benchmarks.published:Show",
}
"""Name -> "module:class", as BENCHES."""


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "list"):
        print(__doc__)
        for name in BENCHES:
            print(f"  {name:18} {get(name).title}: {get(name).needs}")
        print("\nOther commands:\n")
        for name in COMMANDS:
            print(f"  {name:18} {(_command(name).__doc__ or '').splitlines()[0]}")
        print("\nEach explains itself: python -m llava_jax.evaluate NAME --help")
        return 0 if args else 2
    name = args[0]
    if name not in BENCHES and name not in COMMANDS:
        raise UserError(f"evaluate knows no {name!r}; there are {', '.join([*BENCHES, *COMMANDS])}")
    kind = _command(name) if name in COMMANDS else running.command(name)
    return cli.parse(kind, args[1:], prog=f"python -m llava_jax.evaluate {name}").run()


def _command(name: str) -> type:
    module, kind = COMMANDS[name].split(":")
    return getattr(importlib.import_module(module), kind)


if __name__ == "__main__":
    cli.run(main)
