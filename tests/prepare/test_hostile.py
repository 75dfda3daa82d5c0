"""Data that want to rule the terminal, and small files that are damaged: one line each, which steers nothing."""

import io
import json
import os
import random
import sys

import pytest
from conftest import GOLDEN
from PIL import Image

from llava_jax import cli
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
from llava_jax.prepare import __main__ as prepare
from llava_jax.prepare import pack
from llava_jax.prepare.pack import Pack
from llava_jax.prepare.subsets import read_findings

RULING = "\x1b[2J\x1b]0;title\x07\u202eevil\u2066\x9b31m\r\x7f\u2028"
FORBIDDEN = set("\x1b\u202e\u2066\x9b\x07\x7f\r\u2028")
TOKENIZER = str(GOLDEN / "tokenizer.model")


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def picture(path, **options):
    Image.new("RGB", (30, 20), "red").save(path, **options)


@pytest.fixture
def rows(tmp_path):
    """Rows of which all is ruling: ids, texts, roles, keys, file names; every kind of bad one, and a good one."""
    picture(tmp_path / f"{RULING}.png")
    (tmp_path / f"{RULING}.jpg").write_bytes(b"<html>")
    asked = turns(f"<image>{RULING}", RULING)
    return [
        {"id": RULING, "image": f"{RULING}.png", "conversations": asked, RULING: 1},
        {"id": RULING, "image": f"{RULING}.png", "conversations": turns("<image>", f"</s>{RULING}")},
        {"id": f"{RULING} 2", "image": f"{RULING}.none", "conversations": asked},
        {"id": f"{RULING} 3", "image": f"{RULING}.jpg", "conversations": asked},
        {"id": f"{RULING} 4", "image": f"../{RULING}", "conversations": asked},
        {"id": f"{RULING} 5", "conversations": turns(RULING, RULING, roles=("human", RULING))},
        {"id": f"{RULING} 6", "conversations": [{"from": "human", "value": [{"type": RULING}]}]},
        {"id": f"{RULING} 7", "video": RULING, "conversations": asked},
        {"id": f"{RULING} 8", "conversations": [{"from": "gpt", "weight": RULING, "value": RULING}]},
        {"id": {RULING: RULING}, "conversations": asked},
    ]


def write(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False))
    return str(path)


def run(capsys, monkeypatch, *args):
    """The exit code of a command, and all that it printed, which must not rule anything."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.run(prepare.main)
    printed = "".join(capsys.readouterr())
    assert not FORBIDDEN & set(printed), printed
    return ended.value.code, printed


def test_no_command_lets_data_rule_the_terminal(rows, tmp_path, capsys, monkeypatch):
    data, good = write(tmp_path / "data.json", rows), write(tmp_path / "good.json", rows[:2])
    bad, skip = tmp_path / "bad.jsonl", ("--bad-rows", "skip")
    commands = [
        (1, "check", data, "--workers", 0, "--bad-rows", bad), (1, "check", data, "--workers", 0, "--json"),
        (1, "check", data, "--workers", 0, "--model", TOKENIZER),
        (2, "pack", data, tmp_path / "out", "--workers", 0), (0, "pack", data, tmp_path / "out", "--workers", 0, *skip),
        (0, "preview", data, "--model", TOKENIZER, "--out", tmp_path / "page.html"),
        (0, "split", good, tmp_path / "parts", "--parts", "a=1,b=1", "--by", "row", "--workers", 0),
        (0, "sample", data, tmp_path / "sample.json", "--count", 1, "--exclude", bad, "--workers", 0),
        (2, "sample", data, tmp_path / "sample.json", "--count", 99, "--workers", 0),
        (0, "mix", tmp_path / "mix.json", good), (0, "check", tmp_path / "mix.json", "--workers", 0, "--allow",
                                                  "duplicate_id", "separator"),
    ]  # fmt: skip
    for code, *command in commands:
        assert run(capsys, monkeypatch, *command)[0] == code, command
    for content in ({"mixture": [{"path": RULING}]}, {"mixture": [{"path": "good.json", RULING: 1}]},
                    [{RULING: RULING}], {"mixture": RULING}, RULING):
        path = write(tmp_path / "odd.json", content)
        code, printed = run(capsys, monkeypatch, "check", path, "--workers", 0)
        assert code == 2 and printed.count("\n") == 1 and path in printed


FINDING = {"source": "data.json", "row": 3, "line": 3, "id": "x", "kind": "role", "message": "m", "usable": False}


@pytest.mark.parametrize("content, says", [
    (b"", None), (json.dumps(FINDING).encode(), None), (b"\xef\xbb\xbf" + json.dumps(FINDING).encode(), None),
    (b"\xff\xfe", "line 1"), (b"[1]", "line 1"), (b"[" * 10**5, "line 1"), (b"{}", "line 1"), (b"3", "line 1"),
    *((json.dumps(FINDING | change).encode(), "line 1") for change in
      ({"row": "3"}, {"row": True}, {"row": 1.0}, {"source": 7}, {"source": "a\0"}, {"kind": ["role"]})),
    (json.dumps(FINDING).encode() + b"\n\xff", "line 2"), (json.dumps(FINDING).encode() + b"\n\n", "line 2"),
])  # fmt: skip
def test_files_of_findings(content, says, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    if says is None:
        assert [found for _, found in read_findings(str(path))] == [("data.json", 3, "role")] * bool(content)
        return
    with pytest.raises(UserError, match=f"bad.jsonl, {says}: not what prepare check --bad-rows writes"):
        list(read_findings(str(path)))


def mutate(content: bytes, rng) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, how = rng.randrange(len(content) + 1), rng.random()
        if how < 0.4 and at < len(content):
            content[at] = rng.randrange(256)
        elif how < 0.7:
            del content[at : at + rng.randint(1, 30)]
        elif how < 0.9:
            content[at:at] = rng.choice([b"\0", b"\xff", b"{", b"[", b"]", b"null", b"-1", b"1e999", b'"', b"9" * 5000])
        else:
            content = bytearray(rng.choice([b"", b"[]", b"{}", b"null", b"7", b"\xff", b"[" * 9999]))
    return bytes(content)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_the_progress_of_a_pack_that_is_damaged(count, tmp_path, monkeypatch):
    """A damaged plan is told by its name, or made anew; a damaged note costs its shard; the result is the same."""
    data = write(tmp_path / "data.json", [{"id": i, "conversations": turns("Hi", f"Ho {i}")} for i in range(8)])
    out, finish = tmp_path / "set", pack.Pack._finish

    def stop(*_):
        raise Stopped

    def start():
        monkeypatch.setattr(pack.Pack, "_finish", stop)
        with pytest.raises(Stopped):
            Pack(data=data, out=str(out), workers=0, shards=2, overwrite=True).run()
        monkeypatch.setattr(pack.Pack, "_finish", finish)

    start()
    whole = {name: (out / ".pack" / name).read_bytes() for name in ("plan.json", "00000.json", "00001.json")}
    rng, refused = random.Random(0), 0
    for number in range(count):
        name = list(whole)[number % 3]
        (out / ".pack" / name).write_bytes(mutate(whole[name], rng))
        try:
            Pack(data=data, out=str(out), workers=0, shards=2).run()
        except UserError as error:
            assert name == "plan.json" and str(out) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            source = open_source(out)
            assert [source[i].turns[1]["value"] for i in range(len(source))] == [f"Ho {i}" for i in range(8)]
        start()
    assert refused > count // 6


def test_images_are_turned_where_pack_is_told_to(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "turned.jpg", exif=exif, quality=100)
    picture(tmp_path / "upright.png")
    rows = [{"image": name, "conversations": turns("<image>", "Red")} for name in ("turned.jpg", "upright.png")]
    data = write(tmp_path / "data.json", rows)
    sizes = {}
    for options in ({}, {"exif": True}, {"exif": True, "image_size": 28}, {"image_size": 28},
                    {"image_size": 500, "exif": True}):
        out = tmp_path / f"set{len(sizes)}"
        assert Pack(data=data, out=str(out), workers=0, image_format="png", **options).run() == 0
        source = open_source(out)
        images = [Image.open(io.BytesIO(source[i].images[0])) for i in range(2)]
        assert (images[0].getexif().get(0x0112, 1) == 1) == ("exif" in options or "image_size" in options)
        sizes[str(options)] = [image.size for image in images]
        if not options:
            assert source[0].images[0] == (tmp_path / "turned.jpg").read_bytes()
        assert source[1].images[0] == (tmp_path / "upright.png").read_bytes() or options.get("image_size") == 28
    assert list(sizes.values()) == [[(30, 20), (30, 20)], [(20, 30), (30, 20)], [(28, 28), (30, 20)],
                                    [(28, 28), (30, 20)], [(20, 30), (30, 20)]]
    assert os.path.exists(tmp_path / "set4")
