"""synthesize against damaged files of its own and of users, and against text that wants to rule the terminal."""

import contextlib
import copy
import json
import random
import shutil
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI, error
from synthesis_data import answer_messages, write_images, write_prompts

from llava_jax import cli
from llava_jax.endpoint import batch
from llava_jax.errors import UserError
from llava_jax.synthesize import __main__ as synthesize

RULING = "\x1b[2J\x1b]0;title\x07\u202eevil\u2066\x9b31m\r\x7f"
ODD = (None, [], {}, "", 0, -1, 2.5, 1e308, 10**400, 10**18, float("nan"), float("inf"), "\ud800", "x" * 5000, True,
       RULING, [[[]]], {"a": {"b": 1}}, "../../../etc/passwd", "/etc/passwd")
PART = {"name": "batch-0123456789abcdef.jsonl", "requests": 3, "worst": 1.0, "fields": ["model"], "file": None,
        "since": 0, "batch": None, "status": "written", "done": 0, "alone": False, "collected": False}


def options_of(folder: Path, url: str, *more: str) -> list[str]:
    return ["--data", str(folder / "images.jsonl"), "--out", str(folder / "out"), "--model", "teacher", "--base-url",
            url, "--prompts", str(folder / "prompts"), "--questions", str(folder / "questions.txt"), "--concurrency",
            "2", "--retries", "0", *more]


def coco_of(folder: Path) -> list[str]:
    return ["run", "--teacher", "rules", "--captions", str(folder / "captions.json"), "--instances",
            str(folder / "instances.json"), "--out", str(folder / "by_rules")]


def write_all(folder: Path, url: str) -> None:
    """A run that is done, with every file that it can have."""
    folder.mkdir()
    write_images(folder, 3)
    write_prompts(folder)
    (folder / "prices.json").write_text(json.dumps({"teacher": {"prompt": 1, "completion": 4, "cached": 0.1}}))
    (folder / "questions.txt").write_text("Describe it.\nWhat is there?\n")
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 100, "height": 80} for i in range(1, 4)]
    texts = [{"id": i, "image_id": i, "caption": f"A dog and a chair {i}."} for i in range(1, 4)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20], "iscrowd": 0} for i in range(1, 4)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": boxes}))
    assert synthesize.main(["run", *options_of(folder, url, "--prices", str(folder / "prices.json"))]) == 0
    assert synthesize.main(coco_of(folder)) == 0
    (folder / "out" / "batches").mkdir()
    (folder / "out" / "batches" / "batches.json").write_text(json.dumps({"parts": [PART]}))
    duplicate = {"id": "000000", "image": "x", "kind": "conversation", "reason": "duplicate", "detail": "y"}
    (folder / "out" / "rejected.jsonl").write_text(json.dumps(duplicate) + "\n")


FILES = {
    "out/settings.json": ("status", "view", "run"),
    "out/progress.json": ("status", "run"),
    "out/manifest.json": ("status", "view"),
    "out/answers.jsonl": ("status", "view", "run", "estimate"),
    "out/rejected.jsonl": ("view",),
    "out/batches/batches.json": ("batch",),
    "prices.json": ("run", "estimate"),
    "questions.txt": ("preview",),
    "prompts/conversation/system_message.txt": ("preview",),
    "prompts/detail_description/000_conv.txt": ("preview",),
    "images.jsonl": ("preview",),
    "captions.json": ("coco",),
    "instances.json": ("coco",),
}


def command_of(name: str, folder: Path, url: str) -> list[str]:
    priced = options_of(folder, url, "--prices", str(folder / "prices.json"))
    return {
        "status": ["status", str(folder / "out")],
        "view": ["view", str(folder / "out")],
        "run": ["run", *priced],
        "batch": ["run", *priced, "--batch"],
        "preview": ["preview", *options_of(folder, url), "--dry-run"],
        "estimate": ["estimate", *[o for o in priced if o not in ("--concurrency", "--retries", "2", "0")]],
        "coco": coco_of(folder),
    }[name]


def paths_of(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*path, key))


def mutated_value(value, rng):
    """A value with one of its parts taken out, or put in place of by an odd one."""
    value, path = copy.deepcopy(value), rng.choice(list(paths_of(value)))
    if not path:
        return rng.choice(ODD)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.3:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(ODD)
    return value


def mutated(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError):
            return json.dumps(mutated_value(json.loads(content), rng)).encode()
        with contextlib.suppress(ValueError):
            first, _, rest = content.partition(b"\n")
            return json.dumps(mutated_value(json.loads(first), rng)).encode() + b"\n" + rest
    at = rng.randrange(len(content))
    odd = rng.choice([b"\xff\xfe", b"\0", b"[", b'"', b"\n", b"9" * 5000, b"\xed\xa0\x80", b"[" * 100_000])
    return rng.choice([content[:at], content[:at] + odd + content[at:], bytes([content[at] ^ 64]).join(
        [content[:at], content[at + 1 :]]), odd, b"", b"null", b"[]", b"version https://git-lfs.github.com/spec/v1\n"])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_does_no_harm(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch, "MIN_POLL_SECONDS", 0.001)
    refused = 0
    with FakeOpenAI(answer=answer_messages, batch_polls=0).serve() as url:
        write_all(tmp_path / "whole", url)
        for number in range(5):
            folder = tmp_path / str(number)
            shutil.copytree(tmp_path / "whole", folder)
            (folder / name).write_bytes(mutated((folder / name).read_bytes(), random.Random(f"{name} {number}")))
            for command in FILES[name]:
                try:
                    assert synthesize.main(command_of(command, folder, url)) in (0, 1)
                except UserError as error:  # any other is a bug
                    refused += 1
                    assert str(folder) in str(error), error
                    assert len(cli.one_line(error)) < 1000
                shown = "".join(capsys.readouterr())
                assert not set(shown) & set("\x1b\u202e\u2066\x9b\x07\x7f"), shown
    assert refused or name in ("out/manifest.json", "out/answers.jsonl", "questions.txt", "out/rejected.jsonl",
                               "prompts/conversation/system_message.txt", "prompts/detail_description/000_conv.txt")


class Ruling(FakeOpenAI):
    """All that it says wants to rule the terminal."""

    def complete(self, body, fault=None):
        said = super().complete(body, fault)
        said["choices"][0]["message"]["content"] += RULING
        return said | {"model": RULING, "system_fingerprint": RULING}

    async def _chat(self, body):
        number = next(self.numbers)
        if number % 4 == 1:
            return error(400, f"no {RULING}")
        return await super()._chat(body)

    async def respond(self, method, path, headers, body):
        response = await super().respond(method, path, headers, body)
        if response is not None and b'"validating"' in response.body:
            response.body = response.body.replace(b'"validating"', json.dumps(f"in {RULING}").encode())
        return response


def test_nothing_rules_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch, "MIN_POLL_SECONDS", 0.001)
    images = write_images(tmp_path, 6)
    images.write_text(images.read_text().replace("Room 0", json.dumps(f"{RULING} Room 0")[1:-1]))
    write_prompts(tmp_path)
    (tmp_path / "questions.txt").write_text(f"Describe {RULING} it.\n")
    (tmp_path / "prices.json").write_text(json.dumps({RULING: {}, "teacher": {"prompt": 1, RULING: 3}}))
    models = {"teacher": {"shutdown_date": RULING}, RULING: {}}
    errors = []
    with Ruling(answer=answer_messages, models=models, batch_polls=0, refuses=("temperature",)).serve() as url:
        options = options_of(tmp_path, url, "--temperature", "0", "--attempts", "1")
        for command in (["preview", *options, "-n", "6"], ["run", *options], ["run", *options, "--batch"],
                        ["status", str(tmp_path / "out")], ["view", str(tmp_path / "out")],
                        ["run", *options, "--model", RULING], ["run", *options, "--model", "techer"],
                        ["run", *options, "--prices", str(tmp_path / "prices.json")]):
            try:
                synthesize.main(command)
            except UserError as error:
                errors.append(cli.one_line(error))
    shown = "".join(capsys.readouterr()) + "".join(errors)
    assert "\N{REPLACEMENT CHARACTER}" in shown and len(errors) == 2
    assert not set(shown) & set("\x1b\u202e\u2066\x9b\x07\x7f\r"), shown
