"""Talks to a model: one answer, or a chat in the terminal."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llava_jax import cli
from llava_jax.endpoint.chat import AnswerLost, ChatClient, StreamedAnswer
from llava_jax.errors import UserError
from llava_jax.image_files import decoding, open_header, open_image, read_image
from llava_jax.text.templates import IMAGE, check_text
from llava_jax.video import Video, as_video, sampled_frames

if TYPE_CHECKING:
    from llava_jax import Llava

HELP = """Prints one answer, or, without --prompt, starts a chat in the terminal.

  python -m llava_jax.generate --model runs/mini/model --image scene.png --prompt "What is at the top left?"
  python -m llava_jax.generate --model runs/mini/model --image scene.png
  python -m llava_jax.generate --server http://127.0.0.1:8000 --image scene.png

With --server a running server answers (llava_jax.serve). Its key is in LLAVA_JAX_API_KEY.
"""

CHAT_HELP = """\
/image PATH   send an image or a video with your next message
/reset        forget the conversation and its images
/quit         leave; the end of input leaves too
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    model: str = ""
    """Directory of the model. With --server its name there; default: the server's first."""
    server: str | None = None
    """Address of a server with OpenAI's chat API, such as http://127.0.0.1:8000, instead of a model loaded here."""
    image: tuple[str, ...] = ()
    """Image or video files, one for each <image> in the prompt. Without an <image> they come before the prompt."""
    video_frames: int | None = None
    """Maximum number of frames that are sampled of a video; default: the model's."""
    prompt: str | None = None
    """Question. Without it the command starts a chat."""
    max_new_tokens: int = 512
    """Maximum number of tokens of an answer."""
    temperature: float = 0.0
    """Sampling temperature: 0 chooses the most likely token, above 0 tokens are drawn."""
    top_p: float = 1.0
    """Total probability of the most likely tokens from which one is drawn."""
    seed: int = 0
    """Random seed; the same seed draws the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the template's."""
    stream: cli.Flag = False
    """Whether to print the answer while it is written. A chat always does."""
    json: cli.Flag = False
    """Whether to print one JSON object: text, finish_reason, prompt_tokens, completion_tokens, seconds."""
    template: str | None = None
    """Name of the conversation template, if the model's files do not name the one that it was trained with."""
    vision: str | None = None
    """Folder of the vision tower that a LLaVA in the original layout names but does not contain."""
    adapter: str | None = None
    """Folder of LoRA adapters for the model, of PEFT or of the original LLaVA."""
    quantize: Literal["int8"] | None = None
    """Storage of the kernels of the decoder's layers, which takes half the memory of bfloat16; default: the dtype."""
    dtype: str | None = None
    """Compute dtype, bfloat16 or float32; default: bfloat16 on TPU and GPU, float32 on CPU."""

    def sampling(self) -> dict:
        """Returns the arguments of `Llava.generate` and `Llava.stream` besides messages and images."""
        names = ("max_new_tokens", "temperature", "top_p", "stop", "seed")
        return {name: getattr(self, name) for name in names}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns 0. Raises UserError for invalid options."""
    args = sys.argv[1:] if args is None else args
    options = cli.parse(Options, args, prog="python -m llava_jax.generate", description=HELP)
    if options.json and options.prompt is None:
        raise UserError("--json needs --prompt: a chat is printed as text")
    if options.json and options.stream:
        raise UserError("--json prints the answer at once; leave out --stream or --json")
    for name, text in (("--prompt", options.prompt or ""), *(("--stop", stop) for stop in options.stop)):
        check_text(text, name)
    if options.server is None:
        model, opener = _load(options)
        prompt, images = options.prompt, options.image
    else:
        model, opener = _connect(options), data_url
        images = [] if options.prompt is None else list(map(data_url, options.image))
        prompt = [{"role": "user", "content": _parts(options.prompt or "", len(images))}]
    if options.prompt is None:
        Chat(model, options, opener).run()
    elif options.stream:
        for piece in model.stream(prompt, images, **options.sampling()):
            print(_printable(piece), end="", flush=True)
        print()
    else:
        start = time.perf_counter()
        answer = model.generate(prompt, images, **options.sampling())
        seconds = time.perf_counter() - start
        print(_json(answer, seconds) if options.json else _printable(answer.text))
    return 0


def _load(options: Options) -> tuple["Llava", Callable[[str], Any]]:
    """Returns the model, and what opens images for it."""
    from llava_jax import load

    if not options.model:
        raise UserError("--model is missing: the directory of a model, or --server for one that runs")
    llava = load(options.model, options.dtype, template=options.template, vision=options.vision,
                 adapter=options.adapter, quantize=options.quantize)
    if options.video_frames is not None:
        video = dataclasses.replace(llava.config.video, frames=options.video_frames)
        llava.config = dataclasses.replace(llava.config, video=video)
    return llava, functools.partial(_open, llava)


def _open(llava: "Llava", path: str) -> Any:
    image = as_video(path)
    if isinstance(image, Video):
        sampled_frames(image, llava.config.video)
        return image
    return open_image(image)


def _connect(options: Options) -> ChatClient:
    for name in ("video_frames", "template", "vision", "adapter", "quantize", "dtype"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is set where the server starts; leave it out with --server")
    if IMAGE in (options.prompt or ""):
        raise UserError(f"--prompt has {IMAGE}: with --server images come before the prompt; leave it out")
    return ChatClient(options.server, options.model)


def data_url(path: str) -> str:
    """Returns an image file as a data URL: as it is if browsers know its format, otherwise as PNG."""
    if isinstance(as_video(path), Video):
        raise UserError(f"{path}: a server takes no videos; send some of its frames as images")
    content = read_image(path)
    with decoding(path, content), open_header(content) as image:
        kind = "jpeg" if image.format == "MPO" else image.format.lower()  # a JPEG with previews
    if kind not in ("jpeg", "png", "webp", "gif"):
        file = io.BytesIO()
        open_image(content).save(file, "PNG")
        kind, content = "png", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _parts(text: str, images: int) -> list[dict[str, str]]:
    """Returns a message's content. Its text is a part, so that an `<image>` in it is text."""
    return [*[{"type": "image"}] * images, {"type": "text", "text": text}]


def _printable(text: str) -> str:
    """Returns a model's text as it is printed: unchanged, but on a terminal without control characters."""
    return cli.printable(text) if sys.stdout.isatty() else text


def _json(answer, seconds: float) -> str:
    counts = ((answer.prompt_tokens, answer.completion_tokens) if isinstance(answer, StreamedAnswer)
              else (len(answer.prompt_tokens), len(answer.tokens)))
    return json.dumps({
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": counts[0],
        "completion_tokens": counts[1],
        "seconds": round(seconds, 3),
    }, ensure_ascii=False)


class Chat:
    """Runs a conversation in the terminal. An error is printed and leaves the conversation as it was.

    Args:
      model: what has the `stream` of a Llava or a ChatClient.
      opener: opens the file of an image for the model.
    """

    def __init__(self, model: "Llava | ChatClient", options: Options, opener: Callable[[str], Any] = open_image):
        self.model = model
        self.options = options
        self.opener = opener
        self.messages: list[dict[str, Any]] = []
        self.images: list = []  # images of `messages`, in order
        self.pending_images: list = []  # images for the next message
        for path in options.image:
            self.add_image(path)

    def run(self) -> None:
        """Reads lines until /quit or the end of input."""
        try:
            import readline  # noqa: F401  gives input() line editing and a history
        except ImportError:
            pass
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 is refused line by line
        print("Type a message, or /help.")
        while True:
            try:
                line = input("> ").strip()
                if line == "/quit":
                    return
                self.handle(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit leaves.")
            except (UserError, OSError) as error:
                print(f"error: {cli.one_line(error)}")
            except Exception:  # for example out of memory on a long question
                traceback.print_exc()

    def handle(self, line: str) -> None:
        """Runs a command or answers a message."""
        command, _, rest = line.partition(" ")
        if command == "/help":
            print(CHAT_HELP)
        elif command == "/reset":
            self.messages, self.images, self.pending_images = [], [], []
        elif command == "/image":
            self.add_image(rest.strip().strip("'\""))
        elif line.startswith("/"):
            print(cli.printable(f"error: there is no {command}; /help lists the commands"))
        elif line:
            self.answer(line)

    def add_image(self, path: str) -> None:
        if not path:
            raise UserError("write /image PATH")
        self.pending_images.append(self.opener(os.path.expanduser(path)))

    def answer(self, line: str) -> None:
        """Prints the answer while it is written.

        The conversation keeps the part that was printed after Ctrl-C, or if the connection to a server broke off.
        """
        check_text(line, "the message")
        question = {"role": "user", "content": _parts(line, len(self.pending_images))}
        messages, images = [*self.messages, question], [*self.images, *self.pending_images]
        text, lost = "", None
        try:
            with contextlib.closing(self.model.stream(messages, images, **self.options.sampling())) as pieces:
                for piece in pieces:
                    text += piece
                    print(_printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except AnswerLost as error:
            lost = error
        except Exception:
            print(end="\n" if text else "")  # the error starts on a new line
            raise
        print()
        if text := text.strip():  # an empty answer would leave the template's turn open
            self.messages = [*messages, {"role": "assistant", "content": _parts(text, 0)}]
            self.images, self.pending_images = images, []
        if lost is not None:
            raise lost


if __name__ == "__main__":
    cli.run(main)
