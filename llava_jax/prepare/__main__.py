"""Checks, shows, packs, splits, samples, mixes, filters and fetches instruction data.

`python -m llava_jax.prepare COMMAND ...`
"""

import importlib

from llava_jax import cli
from llava_jax.errors import UserError

COMMANDS = {
    "check": ("llava_jax.prepare.check", "Check"),
    "preview": ("llava_jax.prepare.preview", "Preview"),
    "pack": ("llava_jax.prepare.pack", "Pack"),
    "split": ("llava_jax.prepare.subsets", "Split"),
    "sample": ("llava_jax.prepare.subsets", "Sample"),
    "mix": ("llava_jax.prepare.subsets", "Mix"),
    "filter": ("llava_jax.prepare.filter", "Filter"),
    "fetch": ("llava_jax.prepare.fetch", "Fetch"),
}


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        for name in COMMANDS:
            print(f"  {name:8} {(_command(name).__doc__ or '').splitlines()[0]}")
        print("\nHelp of a command: python -m llava_jax.prepare COMMAND --help")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise UserError(f"prepare has no command {args[0]!r}; there are {', '.join(COMMANDS)}")
    return cli.parse(_command(args[0]), args[1:], prog=f"python -m llava_jax.prepare {args[0]}").run()


def _command(name: str) -> type:
    module, kind = COMMANDS[name]
    return getattr(importlib.import_module(module), kind)


if __name__ == "__main__":
    cli.run(main)
