"""The command line against the library that it calls; the chat in a process of its own."""

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
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, init
from llava_jax.models.vit import VitConfig
from llava_jax.weights.checkpoint import save_own

CONFIG = LlavaConfig(
    vision=VitConfig(image_size=14, patch_size=7, width=16, mlp_width=16, layers=1, heads=1),
    text=LlamaConfig(
        vocab_size=2000, width=32, mlp_width=32, layers=1, heads=2, kv_heads=1, head_width=16, max_length=384
    ),
    feature_layer=-1,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model, sharpened, so that what it answers is nonsense of its own for every question."""
    parameters = {
        path: value if path.endswith("norm/scale") else 20 * value for path, value in init(CONFIG, seed=1).items()
    }
    directory = tmp_path_factory.mktemp("model") / "own"
    save_own(directory, CONFIG, parameters, Path(__file__).parent / "golden")
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
    monkeypatch.setattr(llava_jax, "load", lambda path, dtype, template: llava)

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


def test_chat(llava, model_dir, picture):
    lines = ["", "Hello?", "/image none.png", f"/image '{picture}'", "What is it?", "And now?", "/images", "/image",
             "/help", "<image> twice?", "/reset", "Hello?"]
    chat = subprocess.run(
        [sys.executable, "-m", "llava_jax.generate", "--model", model_dir, "--max-new-tokens", "12"],
        input="\n".join(lines).encode(), stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    messages, answers = [], []
    for text, images in [("Hello?", []), ("<image>\nWhat is it?", [picture]), ("And now?", [picture])]:
        messages.append({"role": "user", "content": text})
        answers.append(llava.generate(messages, images, max_new_tokens=12).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert all(answers) and len(set(answers)) == 3
    expected = [
        "Type a message, or /help.\n",
        "",
        answers[0] + "\n",
        "error: none.png: no such image file\n",
        "",
        answers[1] + "\n",
        answers[2] + "\n",
        "error: there is no /images; /help lists what there is\n",
        "error: which one? Write /image PATH\n",
        generate.CHAT_HELP + "\n",
        "error: 1 images were given, but the messages have 2 <image> marks; each needs one\n",
        "",
        answers[0] + "\n",
        "\n",
    ]
    assert chat.stdout.decode() == "> ".join(expected)
    assert chat.returncode == 0


class Scripted:
    """In a model's place: answers in pieces, and is interrupted where a piece is None."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def stream(self, messages, images, **options):
        self.asked.append((messages, images))
        for piece in self.answers.pop(0):
            if piece is None:
                raise KeyboardInterrupt
            yield piece


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    lines = iter(["first", "second", "third", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    model = Scripted(["one", None, "lost"], [None, "lost"], ["three"])
    generate.Chat(model, generate.Options(model="DIR")).run()
    assert capsys.readouterr().out == "Type a message, or /help.\none\n\nthree\n"
    # What was said of the first answer stays; the second question, without an answer, does not.
    turns = [message["content"] for message in model.asked[-1][0]]
    assert turns == ["first", "one", "third"] and next(lines) == "never"


def test_images_of_the_command_line_go_with_the_first_message(monkeypatch, picture):
    lines = iter(["first", f"/image {picture}", "/reset", "second"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    model = Scripted(["one"], ["two"])
    generate.Chat(model, generate.Options(model="DIR", image=(picture, picture))).run()
    (first, images), (second, none) = model.asked
    assert first == [{"role": "user", "content": "<image>\n<image>\nfirst"}] and len(images) == 2
    assert second == [{"role": "user", "content": "second"}] and none == []


@pytest.mark.parametrize("args, words", [
    (["--model", "missing"], "missing"),
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
