"""What the command lines of all verbs share: fields of a dataclass as options, and errors of one line."""

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
from typing import Any, TextIO, TypeVar

import tyro

from llava_jax.errors import UserError

T = TypeVar("T")

STOPPED = 75
"""Exit code of a command that was asked to stop: EX_TEMPFAIL of sysexits.h, the same command goes on."""

LINGER = 5.0
"""Seconds that a command which has failed waits for threads that libraries have left behind."""

LONGEST_LINE = 8000
"""Characters of an error's message that are printed, about; paths have up to 4,096."""


def parse(
    kind: type[T], args: Sequence[str], default: T | None = None, prog: str = "", description: str | None = None
) -> T:
    """A dataclass from command-line options, dotted names for nested fields. A mistake is a UserError of one line.

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
        raise UserError(_first_words(printed.getvalue()) + f" (see {prog} --help)") from None


def _first_words(report: str) -> str:
    """The message of tyro's report, whose parts stand between rules, and the nearest option if it names one."""
    title, *parts = (" ".join(part.split()) for part in re.split(r"\n\s*-{5,}\s*\n", report))
    near = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts))
    return (parts[0] if parts else title) + (f"; did you mean {near[1]}?" if near else "")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a verb's `main(args)` and exits with its code.

    UserError is one line on stderr and code 2, Ctrl-C code 130. Every other error keeps its traceback and exits with
    1, which the launchers retry. SIGTERM ends a command as an error would, so that nothing half made stays, with code
    75, unless the command does better. `--debug` anywhere among the arguments shows the traceback of a UserError too.
    """
    args = sys.argv[1:]
    debug = "--debug" in args
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is no UTF-8 shows ? for what it cannot
    try:
        code = main([arg for arg in args if arg != "--debug"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done, and has its exit code
        sys.stdout.flush()  # a closed pipe is noticed here, not at Python's end
        sys.exit(code)
    except UserError as error:
        if debug:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {one_line(error)}", file=sys.stderr)
        _end_within(LINGER, 2)
        sys.exit(2)
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _end_within(LINGER, 130)
        sys.exit(130)
    except Exception:
        _end_within(LINGER, 1)
        raise


def _stop(number: int, _: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one has nothing to add
    print("stopped by SIGTERM; the same command goes on, or starts again", file=sys.stderr, flush=True)
    _end_within(LINGER, STOPPED)
    raise SystemExit(STOPPED)


def _end_within(seconds: float, code: int) -> None:
    """Ends the process after so many seconds if Python does not: it waits for threads, and a library's may wait too."""

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line, safe for a terminal; of a very long one the start and the end."""
    line = " ".join(str(error).split())
    if len(line) > LONGEST_LINE:  # it quotes a value of a file: the file's name is at the start, the advice at the end
        line = f"{line[: LONGEST_LINE * 3 // 4]} ... {line[-LONGEST_LINE // 4 :]}"
    return printable(line)


def printable(text: str) -> str:
    """Text of others (data, checkpoints, servers, models), safe for a terminal.

    Control characters (ESC of colours and titles), directional marks and lone surrogates become U+FFFD. Newlines,
    tabs, and the joiners that some scripts and emoji need stay. Every command prints such text through this function.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_unsafe(character) else character for character in text)


def _is_unsafe(character: str) -> bool:
    if character.isprintable() or character in "\n\t\u200c\u200d":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _is_closed(stream: TextIO) -> bool:
    """Whether `stream` writes to a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))  # POLLERR, which is always told
