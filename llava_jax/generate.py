"""Talks to a model: one answer, or a chat in the terminal."""

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.text.templates import IMAGE, check_text

if TYPE_CHECKING:
    from llava_jax import Llava

HELP = """One answer, or without --prompt a chat in the terminal.

  python -m llava_jax.generate --model runs/mini/model --image scene.png --prompt "What is at the top left?"
  python -m llava_jax.generate --model runs/mini/model --image scene.png
"""

CHAT_HELP = """\
/image PATH   show an image with your next message
/reset        forget the conversation and its images
/quit         leave (as the end of input does)
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Options:
    model: str
    """Directory of the model."""
    image: tuple[str, ...] = ()
    """Image files, one for each <image> in the prompt; without one, they stand before it."""
    prompt: str | None = None
    """The question; without it, a chat."""
    max_new_tokens: int = 512
    """The most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 tokens are drawn."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same seed draws the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the model's own."""
    stream: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the answer while it is written (a chat always does)."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object: text, finish_reason, prompt_tokens, completion_tokens, seconds."""
    template: str | None = None
    """Name of the conversation template, where the model's files do not tell the one it was trained with."""
    dtype: str | None = None
    """bfloat16 or float32; by default bfloat16 on TPU and GPU, float32 on CPU."""

    def sampling(self) -> dict:
        """The arguments that `Llava.generate` and `Llava.stream` take besides messages and images."""
        names = ("max_new_tokens", "temperature", "top_p", "stop", "seed")
        return {name: getattr(self, name) for name in names}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0. A mistake raises UserError."""
    args = sys.argv[1:] if args is None else args
    options = cli.parse(Options, args, prog="python -m llava_jax.generate", description=HELP)
    if options.json and options.prompt is None:
        raise UserError("--json needs --prompt: a chat is printed as text")
    if options.json and options.stream:
        raise UserError("--json prints the whole answer at once; leave --stream or --json out")
    for name, text in (("--prompt", options.prompt or ""), *(("--stop", stop) for stop in options.stop)):
        check_text(text, name)
    from llava_jax import load

    llava = load(options.model, options.dtype, template=options.template)
    if options.prompt is None:
        Chat(llava, options).run()
    elif options.stream:
        for piece in llava.stream(options.prompt, options.image, **options.sampling()):
            print(_shown(piece), end="", flush=True)
        print()
    else:
        start = time.perf_counter()
        answer = llava.generate(options.prompt, options.image, **options.sampling())
        seconds = time.perf_counter() - start
        print(_json(answer, seconds) if options.json else _shown(answer.text))
    return 0


def _shown(text: str) -> str:
    """A model's text as it is printed: on a terminal without what could steer it, elsewhere to the last character."""
    return cli.printable(text) if sys.stdout.isatty() else text


def _json(answer, seconds: float) -> str:
    return json.dumps({
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt_tokens),
        "completion_tokens": len(answer.tokens),
        "seconds": round(seconds, 3),
    }, ensure_ascii=False)


class Chat:
    """A conversation in the terminal. An error of one line is told and leaves the conversation as it was."""

    def __init__(self, llava: "Llava", options: Options):
        self.llava = llava
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.images: list = []  # those of `messages`, in order
        self.waiting: list = []  # those for the next message
        for path in options.image:
            self.show(path)

    def run(self) -> None:
        """Reads lines until /quit or the end of input."""
        try:
            import readline  # noqa: F401  gives input() line editing and a history, where Python has it
        except ImportError:
            pass
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 cost their own line alone
        print("Type a message, or /help.")
        while True:
            try:
                line = input("> ").strip()
                if line == "/quit":
                    return
                self.take(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit leaves.")
            except (UserError, OSError) as error:
                print(f"error: {cli.one_line(error)}")
            except Exception:  # as when the device has no room for a question that long
                traceback.print_exc()

    def take(self, line: str) -> None:
        """Runs a command or answers a message."""
        command, _, rest = line.partition(" ")
        if command == "/help":
            print(CHAT_HELP)
        elif command == "/reset":
            self.messages, self.images, self.waiting = [], [], []
        elif command == "/image":
            self.show(rest.strip().strip("'\""))
        elif line.startswith("/"):
            print(cli.printable(f"error: there is no {command}; /help lists what there is"))
        elif line:
            self.answer(line)

    def show(self, path: str) -> None:
        from llava_jax.image_files import open_image

        if not path:
            raise UserError("which one? Write /image PATH")
        self.waiting.append(open_image(os.path.expanduser(path)))

    def answer(self, line: str) -> None:
        """Prints the answer while it is written. Interrupted, the conversation goes on with what there is of it."""
        check_text(line, "the message")
        question = {"role": "user", "content": f"{IMAGE}\n" * len(self.waiting) + line}
        messages, images = [*self.messages, question], [*self.images, *self.waiting]
        text = ""
        try:
            for piece in self.llava.stream(messages, images, **self.options.sampling()):
                text += piece
                print(_shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except Exception:
            print(end="\n" if text else "")  # the error gets a line of its own
            raise
        print()
        text = text.replace(IMAGE, "").strip()  # a mark that the model wrote has no image
        if text:  # a turn without text would leave the template's turn open
            self.messages, self.images, self.waiting = [*messages, {"role": "assistant", "content": text}], images, []


if __name__ == "__main__":
    cli.run(main)
