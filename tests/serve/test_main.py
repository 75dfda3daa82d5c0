"""The command: its errors of one line, and a whole server with a small model, beside `Llava.generate`."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from commands import run_command
from PIL import Image

import llava_jax

IMAGES = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)) for seed in range(2)]
LOG_LINE = re.compile(r"\S+ \S+ [0-9a-f]{24} POST /v1/chat/completions 200 prompt \d+ answer \d+ \d+ ms")


class Server:
    """The command's process."""

    def __init__(self, model):
        command = [sys.executable, "-m", "llava_jax.serve", model, "--port", "0", "--slots", "3", "--name", "talker"]
        environment = {name: value for name, value in os.environ.items() if name != "LLAVA_JAX_API_KEY"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        self.url = re.fullmatch(r"ready at (http://127\.0\.0\.1:\d+)\n", self.process.stdout.readline())[1]
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def ask(self, content, **fields):
        messages = content if isinstance(content[0], dict) and "role" in content[0] else [
            {"role": "user", "content": content}]
        return self.openai.chat.completions.create(model="talker", messages=messages, **fields)


@pytest.fixture(scope="module")
def server(talker):
    server = Server(talker)
    yield server
    server.process.send_signal(signal.SIGTERM)
    _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "Traceback" not in errors
    assert any(LOG_LINE.fullmatch(line) for line in errors.splitlines())


@pytest.fixture(scope="module")
def llava(talker):
    return llava_jax.load(talker)


def part(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(content):
    return {"type": "text", "text": content}


QUESTIONS = [
    ([text("Where is it?")], []),
    ([part(IMAGES[0]), text("Where is it?")], [0]),
    ([part(IMAGES[1]), text("Where is it?")], [1]),
    ([text("First"), part(IMAGES[0]), text("or"), part(IMAGES[1]), text("?")], [0, 1]),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text("Hello"), part(IMAGES[1])]},
      {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "어디?"}], [1]),
]


def generate(llava, content, images, **settings):
    """Returns the answer of `Llava.generate` to the same messages."""
    messages = content if "role" in content[0] else [{"role": "user", "content": content}]
    return llava.generate(messages, [IMAGES[i] for i in images], **settings)


def test_greedy_answers_equal_generate(server, llava):
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda question: server.ask(question[0], max_tokens=12), QUESTIONS * 2))
    for (content, images), answer in zip(QUESTIONS * 2, answers, strict=True):
        expected = generate(llava, content, images, max_new_tokens=12)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.prompt_tokens == len(expected.prompt_tokens)
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.prompt_tokens_details.image_tokens == 4 * len(images)


def test_draws_equal_generate(server, llava):
    content, images = QUESTIONS[1]
    stream = server.ask(content, n=3, seed=5, temperature=1.5, top_p=0.9, max_tokens=8, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [generate(llava, content, images, seed=5 + i, temperature=1.5, top_p=0.9, max_new_tokens=8).text
                     for i in range(3)]


def test_logprobs_equal_likelihoods(server, llava):
    answer = server.ask("Where is it?", logprobs=True, top_logprobs=20, max_tokens=3).choices[0]
    first = answer.logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob and first.token == first.top_logprobs[0].token
    logits = llava.model(**llava.encode("Where is it?"))[0, -1]
    expected = np.sort(np.array(logits - np.logaddexp.reduce(np.asarray(logits))))[::-1][:20]
    np.testing.assert_allclose([top.logprob for top in first.top_logprobs], expected, atol=2e-4)


@pytest.mark.parametrize("words", ["<image>", "</s>", "<s>", "<image></s><|im_end|><image>"])
def test_text_of_users_is_text(server, words):
    plain, marked = (server.ask([part(IMAGES[0]), text("a " + content)], max_tokens=1) for content in ("b", words))
    assert marked.usage.prompt_tokens_details.image_tokens == 4
    assert marked.usage.prompt_tokens > plain.usage.prompt_tokens


def test_refusals(server):
    with pytest.raises(openai.BadRequestError) as error:
        server.ask("word " * 500)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        server.ask([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])
    assert error.value.param == "messages[0].content[0].image_url.url"


def test_the_page_and_metrics(server):
    def get(path):
        with urllib.request.urlopen(server.url + path) as response:
            return response.read().decode()

    assert "<title>" in get("/") and get("/version") == f'{{"version":"{llava_jax.__version__}"}}'
    while "llava_jax_busy_slots 0\n" not in get("/metrics"):
        pass


@pytest.mark.parametrize("options, words", [
    (("missing",), "missing: no such directory"),
    (("MODEL", "--slots", 0), "--slots is 0: it must be at least 1"),
    (("MODEL", "--context", 385, "--port", 0), "--context is 385: the model's context has 384 tokens"),
    (("MODEL", "--port", 70000), "--port is 70000: it must be from 0 to 65535"),
    (("MODEL", "--host", "256.0.0.1"), "--host 256.0.0.1 --port 8000: "),
    (("MODEL", "--adapter", "dogs"), "--adapter dogs: expected NAME=DIR"),
    (("MODEL", "--adapter", "model=x"), "--adapter model=x: the name model is used twice"),
    (("MODEL", "--adapter", "dogs=missing", "--port", 0), "missing/adapter_config.json: "),
    (("MODEL", "--image-bytes", 0), "--image-bytes is 0: it must be above 0"),
    (("MODEL", "--fetch-hosts", "https://x", "--port", 0), "--fetch-hosts 'https://x': give a host name"),
    (("MODEL", "--mesh.fsdp", 64, "--port", 0), "mesh: data 1 x fsdp 64 x tensor 1 needs 64 devices"),
])
def test_mistakes_of_the_operator(talker, options, words):
    result = run_command("serve", *(talker if option == "MODEL" else option for option in options))
    assert result.code == 2 and result.err.splitlines()[-1].startswith("error: " + words) and not result.out


def test_a_port_in_use(talker):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_command("serve", talker, "--port", port)
    assert result.code == 2
    assert result.err == f"error: --host 127.0.0.1 --port {port}: Address already in use; choose others\n"
