"""What the command lines of all verbs share: fields of a dataclass as options, and errors of one line."""

import contextlib
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(
    kind: type[T], args: Sequence[str], default: T | None = None, prog: str = "", description: str | None = None
) -> T:
    """A dataclass from command-line options, dotted names for nested fields. A mistake is a ValueError of one line.

    The help begins with `description`, or else the dataclass's docstring.
    """
    printed = io.StringIO()
    options = {"args": args, "prog": prog, "description": description}
    if default is not None:  # a recipe, whose fields go by the names that its file has
        options |= {"default": default, "use_underscores": True}
    if "-h" in args or "--help" in args:
        return tyro.cli(kind, **options)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(kind, **options)
    except SystemExit:
        raise ValueError(_first_words(printed.getvalue()) + f" (see {prog} --help)") from None


def _first_words(report: str) -> str:
    """The message of tyro's report, whose parts stand between rules, and the nearest option if it names one."""
    title, *parts = (" ".join(part.split()) for part in re.split(r"\n\s*-{5,}\s*\n", report))
    near = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts))
    return (parts[0] if parts else title) + (f"; did you mean {near[1]}?" if near else "")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a verb's `main(args)` and exits: a user's mistake is one line on stderr and code 2.

    `--debug` anywhere among the arguments shows the traceback too.
    """
    args = sys.argv[1:]
    debug = "--debug" in args
    try:
        sys.exit(main([arg for arg in args if arg != "--debug"]))
    except (ValueError, OSError, KeyError, ImportError) as error:
        if debug:
            traceback.print_exc()
        # A KeyError prints its message in quotes; its argument does not.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenExecutor:
        print("error: a worker process died (for its memory? fewer --workers need less)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
