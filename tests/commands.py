"""Runs a command of the project inside the test's own process, where its imports are paid for already."""

import contextlib
import importlib.util
import io
import signal
import sys
import traceback
from typing import NamedTuple
from unittest import mock

from llava_jax import cli


class CommandResult(NamedTuple):
    """Exit code and printed text of a command."""

    code: int
    out: str
    err: str


def run_command(verb: str, *args: object, stdin: bytes | str = b"") -> CommandResult:
    """Runs `python -m llava_jax.VERB ARGS` in this process, for example `run_command("prepare", "check", path)`.

    Standard streams are UTF-8 files in memory. An error that is no UserError leaves its traceback in `err`, as Python
    would print it.
    """
    module = f"llava_jax.{verb}"
    if importlib.util.find_spec(module).submodule_search_locations:
        module += ".__main__"
    main = importlib.import_module(module).main
    content = stdin.encode() if isinstance(stdin, str) else stdin
    streams = {"stdin": io.BytesIO(content), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, handler)
        stack.enter_context(mock.patch.object(sys, "argv", [module, *map(str, args)]))
        for name, stream in streams.items():
            stack.enter_context(mock.patch.object(sys, name, io.TextIOWrapper(stream, "utf-8", write_through=True)))
        try:
            cli.run(main)
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
        out, err = (streams[name].getvalue().decode(errors="replace") for name in ("stdout", "stderr"))
    return CommandResult(code or 0, out, err)
