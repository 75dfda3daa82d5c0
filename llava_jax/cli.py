"""Runs command lines: dataclass fields become options, and a UserError becomes one line and exit code 2."""

import contextlib
import io
import os
import re
import select
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TextIO, TypeVar

import tyro

from llava_jax.errors import UserError

T = TypeVar("T")

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""Type of an option without a value: --name sets it, and there is no --no-name."""

STOPPED = 75
"""Exit code of a command that was stopped: EX_TEMPFAIL of sysexits.h. The same command continues."""

THREAD_TIMEOUT = 5.0
"""Seconds that a failed command waits for threads of libraries before it ends the process."""

MAX_LINE_LENGTH = 8000
"""Approximate number of characters that are printed of an error message. Paths have up to 4,096."""


def parse(
    kind: type[T], args: Sequence[str], default: T | None = None, prog: str = "", description: str | None = None
) -> T:
    """Parses command-line options into a dataclass; nested fields have dotted names.

    The help starts with `description`, or with the dataclass's docstring. Raises UserError of one line if the options
    are invalid.
    """
    printed = io.StringIO()
    # An optional part, such as model.lora, is set by its dotted fields if the default has it, not by a subcommand.
    options = {"args": args, "prog": prog, "description": description, "config": (tyro.conf.AvoidSubcommands,)}
    if default is not None:
        options["default"] = default
    if "-h" in args or "--help" in args:
        return tyro.cli(kind, **options)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(kind, **options)
    except SystemExit:
        raise UserError(_first_words(printed.getvalue()) + f" (see {prog} --help)") from None


def _first_words(report: str) -> str:
    """Returns the message of tyro's report, whose parts are separated by rules, and the most similar option, if any."""
    title, *parts = (" ".join(part.split()) for part in re.split(r"\n\s*-{5,}\s*\n", report))
    near = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts))
    return (parts[0] if parts else title) + (f"; did you mean {near[1]}?" if near else "")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a verb's `main(args)` and exits with its code.

    A UserError prints one line on stderr and exits with 2, Ctrl-C with 130. Every other error keeps its traceback and
    exits with 1, which the launchers retry. SIGTERM raises SystemExit with code 75, unless the command handles it, so
    that no incomplete file stays. `--debug` anywhere among the arguments adds the traceback of a UserError.
    """
    args = sys.argv[1:]
    debug = "--debug" in args
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for other characters
    try:
        code = main([arg for arg in args if arg != "--debug"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done
        sys.stdout.flush()  # so that a closed pipe raises here, not when Python exits
        sys.exit(code)
    except UserError as error:
        if debug:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {one_line(error)}", file=sys.stderr)
        _end_within(THREAD_TIMEOUT, 2)
        sys.exit(2)
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # because Python flushes again when it exits
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _end_within(THREAD_TIMEOUT, 130)
        sys.exit(130)
    except Exception:
        _end_within(THREAD_TIMEOUT, 1)
        raise


def _stop(number: int, _: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore a second one
    print("stopped by SIGTERM; run the same command to continue", file=sys.stderr, flush=True)
    _end_within(THREAD_TIMEOUT, STOPPED)
    raise SystemExit(STOPPED)


def _end_within(seconds: float, code: int) -> None:
    """Ends the process after this many seconds, because Python waits for threads of libraries that may never end."""

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def one_line(error: BaseException | str) -> str:
    """Returns an error's message on one line, safe for a terminal. A very long one is cut in the middle."""
    line = " ".join(str(error).split())
    if len(line) > MAX_LINE_LENGTH:  # cut a quoted value: the file's name is at the start, the advice at the end
        line = f"{line[: MAX_LINE_LENGTH * 3 // 4]} ... {line[-MAX_LINE_LENGTH // 4 :]}"
    return printable(line)


def printable(text: str) -> str:
    """Returns untrusted text (of data, checkpoints, servers, models) in a form that is safe for a terminal.

    Control characters (ESC of colours and titles), directional marks and lone surrogates become U+FFFD. Newlines,
    tabs, and the joiners of some scripts and emoji stay. Every command prints untrusted text through this function.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_unsafe(character) else character for character in text)


def _is_unsafe(character: str) -> bool:
    if character.isprintable() or character in "\n\t\u200c\u200d":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _is_closed(stream: TextIO) -> bool:
    """Returns whether `stream` writes to a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))  # POLLERR, which is always reported
