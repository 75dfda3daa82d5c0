"""Makes instruction data from captions and boxes: `python -m llava_jax.synthesize COMMAND ...`."""

import importlib

from llava_jax import cli
from llava_jax.errors import UserError

COMMANDS = {
    "run": ("llava_jax.synthesize.running", "RunCommand"),
    "estimate": ("llava_jax.synthesize.commands", "EstimateCommand"),
    "preview": ("llava_jax.synthesize.commands", "PreviewCommand"),
    "status": ("llava_jax.synthesize.commands", "StatusCommand"),
    "view": ("llava_jax.synthesize.commands", "ViewCommand"),
    "pairs": ("llava_jax.synthesize.pairs", "PairsCommand"),
}


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"{__doc__}\n")
        for name in COMMANDS:
            print(f"  {name:8} {(_command(name).__doc__ or '').splitlines()[0]}")
        print("\nHelp of a command: python -m llava_jax.synthesize COMMAND --help")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise UserError(f"synthesize has no command {args[0]!r}; there are {', '.join(COMMANDS)}")
    command = cli.parse(_command(args[0]), args[1:], prog=f"python -m llava_jax.synthesize {args[0]}")
    return command.run()


def _command(name: str) -> type:
    module, kind = COMMANDS[name]
    return getattr(importlib.import_module(module), kind)


if __name__ == "__main__":
    cli.run(main)
