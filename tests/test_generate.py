"""The command line against the library that it calls."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax import cli, generate
from llava_jax.errors import UserError
from llava_jax.inference.detokenizer import Completion
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, init_params
from llava_jax.models.vit import VisionConfig
from llava_jax.weights.checkpoint import save_native

CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=14, patch_size=7, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1),
    text=LlamaConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        max_length=384
    ),
    feature_layer=-1,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model, sharpened, so that what it answers is nonsense of its own for every question."""
    parameters = {
        path: value if path.endswith("norm/scale") else 20 * value
        for path, value in init_params(CONFIG, seed=1).items()
    }
    directory = tmp_path_factory.mktemp("model") / "own"
    save_native(directory, CONFIG, parameters, Path(__file__).parent / "golden")
    return directory


@pytest.fixture(scope="module")
def llava(model_dir):
    return llava_jax.load(model_dir)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def run(llava, monkeypatch, capsys):
    """Runs the command with the model at hand; returns what it prints."""
    monkeypatch.setattr(llava_jax, "load", lambda path, dtype, **_: llava)

    def run(*args):
        assert generate.main(["--model", "DIR", "--max-new-tokens", "12", *args]) == 0
        return capsys.readouterr().out

    return run


def test_one_answer(run, llava, picture):
    expected = llava.generate("What?", [picture], max_new_tokens=12)
    assert len(expected.text) > 12
    assert run("--prompt", "What?", "--image", picture) == expected.text + "\n"
    assert run("--prompt", "What?", "--image", picture, "--stream") == expected.text + "\n"
    shown = json.loads(run("--prompt", "What?", "--image", picture, "--json"))
    assert shown.pop("seconds") >= 0
    assert shown == {"text": expected.text, "finish_reason": expected.finish_reason,
                     "prompt_tokens": len(expected.prompt_tokens), "completion_tokens": len(expected.tokens)}


def test_options_reach_the_model(run, llava):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "stop": ("zzz", "e")}
    expected = llava.generate("What?", max_new_tokens=12, **options)
    args = ["--temperature", "0.9", "--top-p", "0.8", "--seed", "5", "--stop", "zzz", "e"]
    assert run("--prompt", "What?", *args) == expected.text + "\n"
    assert expected.finish_reason == "stop"
    assert expected.text != llava.generate("What?", max_new_tokens=12, stop="e").text


def test_chat(llava, picture, monkeypatch, capsys):
    lines = iter(["", "Hello?", "/image none.png", f"/image '{picture}'", "What is it?", "And now?", "/images",
                  "/image", "/help", "<image> twice?", "/reset", "Hello?"])

    def ask(prompt):
        print(prompt, end="")
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", ask)
    generate.Chat(llava, generate.Options(model="DIR", max_new_tokens=12)).run()
    messages, answers = [], []
    typed = [{"type": "text", "text": "<image> twice?"}]  # what a user types is text
    for text, images in [("Hello?", []), ("<image>\nWhat is it?", [picture]), ("And now?", [picture]),
                         (typed, [picture])]:
        messages.append({"role": "user", "content": text})
        answers.append(llava.generate(messages, images, max_new_tokens=12).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert all(answers) and len(set(answers)) == 4
    expected = [
        "Type a message, or /help.\n",
        "",
        answers[0] + "\n",
        "error: none.png: no such image file\n",
        "",
        answers[1] + "\n",
        answers[2] + "\n",
        "error: there is no /images; /help lists the commands\n",
        "error: write /image PATH\n",
        generate.CHAT_HELP + "\n",
        answers[3] + "\n",
        "",
        answers[0] + "\n",
        "\n",
    ]
    assert capsys.readouterr().out == "> ".join(expected)


def texts(messages):
    """The contents of messages, written as strings."""
    return ["".join("<image>\n" if part["type"] == "image" else part["text"] for part in message["content"])
            for message in messages]


class Scripted:
    """In a model's place: answers in pieces, is interrupted where one is None, and raises one that is an error."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def stream(self, messages, images, **options):
        self.asked.append((messages, images))
        for piece in self.answers.pop(0):
            if piece is None:
                raise KeyboardInterrupt
            if isinstance(piece, Exception):
                raise piece
            yield piece


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    lines = iter(["first", "second", "third", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    model = Scripted(["one", None, "lost"], [None, "lost"], ["three"])
    generate.Chat(model, generate.Options(model="DIR")).run()
    assert capsys.readouterr().out == "Type a message, or /help.\none\n\nthree\n"
    # What was said of the first answer stays; the second question, without an answer, does not.
    assert texts(model.asked[-1][0]) == ["first", "one", "third"] and next(lines) == "never"


@pytest.mark.parametrize("error, told", [
    (UserError("too long"), "error: too long\n"),
    (OSError(errno.EIO, "Input/output error"), "error: [Errno 5] Input/output error\n"),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), ""),
    (MemoryError(), ""),
], ids=lambda value: type(value).__name__)
def test_an_error_of_one_line_leaves_the_chat_as_it_was(monkeypatch, capsys, picture, error, told):
    lines = iter(["first", f"/image {picture}", "second", "second", "caf\udce9", "third", "/\x1b[31m", "/quit", "no"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    model = Scripted(["one"], ["tw", error], ["two"], ["three"])
    generate.Chat(model, generate.Options(model="DIR")).run()
    printed = capsys.readouterr()
    assert printed.out == (f"Type a message, or /help.\none\ntw\n{told}two\n"
                           "error: the message is not UTF-8: its character 4 is the lone surrogate '\\udce9'\n"
                           "three\nerror: there is no /\ufffd[31m; /help lists the commands\n")
    assert told or f"{type(error).__name__}: {error}".rstrip(": ") in printed.err  # a fault keeps its traceback
    (first, _), lost, (second, images), (third, _) = model.asked
    assert (second, images) == lost and texts(first) == ["first"]
    assert texts(third) == ["first", "one", "<image>\nsecond", "two", "third"]
    assert next(lines) == "no"


def test_a_mark_that_the_model_writes_is_text(monkeypatch, capsys):
    lines = iter(["first", "second"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    model = Scripted(["a ", "<image>"], ["two"])
    generate.Chat(model, generate.Options(model="DIR")).run()
    assert capsys.readouterr().out == "Type a message, or /help.\na <image>\ntwo\n"
    assert texts(model.asked[1][0]) == ["first", "a <image>", "second"] and model.asked[1][1] == []


@pytest.mark.parametrize("args", [["--prompt", "Hi"], ["--prompt", "Hi", "--stream"], []], ids=str)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_not_steered_by_the_model(monkeypatch, capsys, args, terminal):
    text = "a\x1b]0;title\x07\u202eb\tc\n한"
    model = Scripted([text[:4], text[4:]])
    model.generate = lambda *_, **__: Completion(text, [1], "stop", [1])
    monkeypatch.setattr(llava_jax, "load", lambda *_, **__: model)
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit" if model.asked else "Hi")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert generate.main(["--model", "DIR", *args]) == 0
    shown = "a\ufffd]0;title\ufffd\ufffdb\tc\n한" if terminal else text
    assert capsys.readouterr().out.endswith(shown + "\n")
    if args == ["--prompt", "Hi"]:
        assert generate.main(["--model", "DIR", *args, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text


def test_invalid_utf8_is_refused_line_by_line(llava, model_dir):
    """In a process of its own, in the locale in which Python would accept such bytes."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "LC_ALL": "C"}
    command = [sys.executable, "-m", "llava_jax.generate", "--model", model_dir, "--max-new-tokens", "12"]
    chat = subprocess.run(command, input=b"caf\xe9?\nHello?\n\xed\xa0\x80\n", stdout=subprocess.PIPE, env=environment)
    answer = llava.generate("Hello?", max_new_tokens=12).text
    refused, hello, half, _ = chat.stdout.decode().split("> ")[1:]
    assert (hello, chat.returncode) == (answer + "\n", 0)
    assert all(line.startswith("error: the message is not UTF-8") for line in (refused, half))
    single = subprocess.run([*command, "--prompt", b"caf\xe9?"], capture_output=True, env=environment)
    assert single.returncode == 2 and single.stdout == b""
    assert single.stderr == b"error: --prompt is not UTF-8: its character 4 is the lone surrogate '\\udce9'\n"


def test_images_of_the_command_line_go_with_the_first_message(monkeypatch, picture):
    lines = iter(["first", f"/image {picture}", "/reset", "second"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    model = Scripted(["one"], ["two"])
    generate.Chat(model, generate.Options(model="DIR", image=(picture, picture))).run()
    (first, images), (second, none) = model.asked
    assert texts(first) == ["<image>\n<image>\nfirst"] and len(images) == 2
    assert texts(second) == ["second"] and none == []


@pytest.mark.parametrize("args, words", [
    (["--model", "missing"], "missing"),
    ([], "--model is missing"),
    (["--server", "127.0.0.1:8000"], "not an address such as http://127.0.0.1:8000"),
    (["--server", "http://127.0.0.1:9", "--prompt", "Hi"], "does not answer (Connection refused)"),
    (["--server", "http://127.0.0.1:9", "--dtype", "bfloat16"], "leave it out with --server"),
    (["--server", "http://127.0.0.1:9", "--prompt", "<image> Hi"], "images come before the prompt"),
    (["--model", "DIR", "--json"], "--json needs --prompt"),
    (["--model", "DIR", "--prompt", "Hi", "--json", "--stream"], "--stream or --json"),
    (["--model", "DIR", "--modle", "DIR"], "--modle"),
])
def test_a_mistake_is_one_line_and_code_2(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *args])
    with pytest.raises(SystemExit) as exit:
        cli.run(generate.main)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and words in printed.err and printed.err.count("\n") == 1


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main(["--help"])
    assert not exit.value.code
    assert '--prompt "What is at the top left?"' in capsys.readouterr().out


def test_importing_the_package_does_not_import_jax():
    code = ("import sys, llava_jax, llava_jax.generate, llava_jax.text.encode; llava_jax.__version__;"
            "llava_jax.IMAGE_TOKEN_ID; sys.exit('jax' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
