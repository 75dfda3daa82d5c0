"""Every kind of bad row found with its place, none where there is none, and figures against brute force."""

import errno
import io
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import GOLDEN, make_data
from PIL import Image

from llava_jax import cli
from llava_jax.data.packing import pack
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture, open_source
from llava_jax.errors import UserError
from llava_jax.preparation import audit as audit_module
from llava_jax.preparation.audit import audit
from llava_jax.preparation.check import Check, describe
from llava_jax.preparation.findings import KINDS, ROW, Checker, Finding, Words, separators
from llava_jax.preparation.settings import Settings
from llava_jax.text.encode import IGNORE, NoSupervisedTokens, encode_conversation
from llava_jax.text.templates import TEMPLATES, spans
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = GOLDEN / "tokenizer.model"


def encoded(mode="RGB", size=(40, 30), kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(sum(size)).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 99)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def strip(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def frames(kind="GIF") -> bytes:
    file = io.BytesIO()
    pages = [Image.new("L", (8, 8), shade) for shade in (0, 99, 200)]
    pages[0].save(file, kind, save_all=True, append_images=pages[1:])
    return file.getvalue()


IMAGES = {
    "good.jpg": encoded(), "other.jpg": encoded(size=(41, 30)), "good.jpeg": encoded(size=(42, 30)),
    "grey.png": encoded("L", kind="PNG"), "clear.png": encoded("RGBA", kind="PNG"), "no_suffix": encoded(size=(43, 30)),
    "cut.jpg": encoded()[:-200], "cut.png": encoded(kind="PNG")[:-900], "empty.jpg": b"",
    "text.jpg": b"<html>404</html>", "bomb.png": bomb(), "strip.png": strip(1, 3000), "wide.png": strip(17000, 200),
    "png.jpg": encoded(kind="PNG", size=(44, 30)),
    "bomb.webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0\x2f\xfe\xbf\xff\x0f" + bytes(9),
    "scans.jpg": encoded()[:-2] + b"\xff\xda\0\x08" * 2999 + b"\xff\xd9",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "turned.jpg": encoded(size=(45, 30), exif=turned(6)),
    "faint.png": saved(Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))),
    "glass.png": saved(Image.new("LA", (9, 8), (70, 99))),
    "phone.jpg": encoded(kind="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    "moving.gif": frames(), "moving.jpg": frames(), "pages.tiff": frames("TIFF"),
    "zero.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 5, 1, 24, 0, 0, 0, 0, 0, 0),
}


def row(number, question="What is in corner {}?", answer="A dog.", image=None, **more):
    """A good row whose texts no other has."""
    images = [] if image is None else [image] if isinstance(image, str) else image
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question.format(number)},
             {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": turns, **({"image": image} if images else {}), **more}


def turns(*texts, first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


# Each with what must be found in it: kinds and a part of their messages.
LONG = "word " * 1300
DEFECTS = {
    "good": (row(0, image="good.jpg"), []),
    "jpeg suffix": (row(0, image="good.jpeg"), []),
    "grey": (row(0, image="grey.png"), []),
    "transparent": (row(0, image="clear.png"), []),
    "no suffix": (row(0, image="no_suffix"), []),
    "a camera's preview": (row(0, image="phone.jpg"), []),
    "no JSON": ('{"id": 3, "conversations": [', [("malformed", "broken JSON")]),
    "no object": ([1, 2], [("malformed", "a row must be an object")]),
    "turns no list": ({"id": "r0", "conversations": "Hi"}, [("malformed", "the turns must be a list")]),
    "unknown role": (row(0, conversations=[{"from": "robot", "value": "Hi"}]), [("role", "turn 1 is from 'robot'")]),
    "empty role": (row(0, conversations=[{"from": "", "value": "Hi"}]), [("role", "turn 1 names no role")]),
    "twice the same role": (row(0, conversations=[*turns("a0"), *turns("b", "c")]),
                            [("turn_order", "turns 1 and 2 are both from 'human'")]),
    "no human": (row(0, conversations=turns("Hi", first="gpt")), [("turn_order", "there is no human turn")]),
    "image without mark": (row(0, image="good.jpg", conversations=turns("Hi", "Ho")),
                           [("image_count", "1 images, but 0 times <image>")]),
    "mark without image": (row(0, conversations=turns("<image> Hi", "Ho")), [("image_count", "0 images, but 1 times")]),
    "image in a turn that is left out": (
        row(0, image="other.jpg", conversations=turns("<image>", "Hi r0", "Ho", first="gpt")),
        [("image_count", "1 images, but 0 in the turns that are used")]),
    "outside": (row(0, image="../secret.jpg"), [("outside_root", "image ../secret.jpg is outside the image root")]),
    "missing": (row(0, image="sub/none.jpg"), [("missing_image", "sub/none.jpg: no such image file")]),
    "a folder as image": (row(0, image="folder.jpg"), [("broken_image", "folder.jpg: cannot be read (it is no regul")]),
    "truncated JPEG": (row(0, image="cut.jpg"), [("broken_image", "cut.jpg: cannot be read (image file is truncated")]),
    "truncated PNG": (row(0, image="cut.png"), [("broken_image", "cut.png: cannot be read (")]),
    "empty image": (row(0, image="empty.jpg"), [("broken_image", "empty.jpg: the file is empty (0 bytes)")]),
    "HTML as image": (row(0, image="text.jpg"), [("broken_image", "text.jpg: not an image")]),
    "no pixels": (row(0, image="zero.bmp"), [("broken_image", "zero.bmp: not an image")]),
    "bomb": (row(0, image="bomb.png"), [("broken_image", "bomb.png: cannot be read (Image size (900000000 pixels)")]),
    "long, but not too long to pad": (row(0, image="wide.png"), []),
    "too many scans": (row(0, image="scans.jpg"), [("broken_image", "cannot be read (a JPEG of 3,000 scans, more")]),
    "WebP bomb": (row(0, image="bomb.webp"), [("broken_image", "cannot be read (16,383 x 16,383 pixels, more than")]),
    "Git LFS": (row(0, image="pointer.jpg"), [("broken_image", "not an image but a Git LFS pointer")]),
    "HEIC": (row(0, image="phone.heic"), [("broken_image", "phone.heic: an HEIC image, as iPhones write it")]),
    "EPS": (row(0, image="drawing.eps"), [("broken_image", "drawing.eps: not an image but PostScript")]),
    "no answer": (row(0, conversations=turns("Hi r0")), [("no_supervised_tokens", "no answer with text")]),
    "answer without text": (row(0, answer=""), [("no_supervised_tokens", "no answer with text")]),
    "too many tokens": (row(0, answer=LONG), [("too_long", "tokens, {over} more than --max-length 1200")]),
    "too many images": (row(0, image=["good.jpg"] * 3),
                        [("too_long", "3 images, but a packed row has 2 slots (--images-per-row)"),
                         ("too_long", "tokens, {over} more than --max-length 1200")]),
    "missing, broken and too long": (
        row(0, image=["none.jpg", "empty.jpg"], answer=LONG),
        [("missing_image", "none.jpg: no such"), ("broken_image", "empty.jpg: the file"), ("too_long", "{over} more")]),
    "an empty answer among others": (row(0, conversations=turns("Hi r0", "Ho", "And?", "")),
                                     [("empty_answer", "turn 4 has no text")]),
    "a blank answer": (row(0, answer=" \n"), [("empty_answer", "turn 2 has no text")]),
    "an empty question": (row(0, conversations=turns("Hi r0", "Ho", " ", "Hm")),
                          [("empty_question", "turn 3 has neither text nor image")]),
    "an image is a question": (row(0, image="grey.png", conversations=turns("<image>", "Ho")), []),
    "an empty opening that is left out": (row(0, conversations=turns("", "Hi r0", "Ho", first="gpt")), []),
    "PNG as JPEG": (row(0, image="png.jpg"), [("wrong_type", "png.jpg: holds PNG, but is named .jpg")]),
    "EXIF rotation": (row(0, image="turned.jpg"), [("rotated", "turned.jpg: EXIF orientation 6: viewers turn it")]),
    "hardly a difference": (row(0, image="faint.png"), [("faint", "its values from 0 to 299 become 0 to 1 of 255")]),
    "glass": (row(0, image="glass.png"), [("transparent", "glass.png: has transparent pixels")]),
    "GIF of three frames": (row(0, image="moving.gif"), [("animated", "moving.gif: has several frames")]),
    "TIFF of three pages": (row(0, image="pages.tiff"), [("animated", "pages.tiff: has several frames")]),
    "GIF as JPEG": (row(0, image="moving.jpg"),
                    [("wrong_type", "holds GIF, but is named .jpg"), ("animated", "moving.jpg: has several")]),
    "separators": (row(0, conversations=turns("r0 </s>", "USER: a </s> ASSISTANT: b")),
                   [("separator", "turn 1 holds '</s>', turn 2 holds 'USER:', turn 2 holds 'ASSISTANT:'")]),
    "no separators": (row(0, question="r0 user: <div> [1] <br/> # Assistant"), []),
    "special token": (row(0, question="r0 <unk>"), [("separator", "turn 1 holds '<unk>'")]),
}


def write(folder, rows, name="data.jsonl"):
    for image, content in IMAGES.items():
        (folder / image).write_bytes(content)
    (folder / "folder.jpg").mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def run(path, settings=None, workers=0, max_length=1200, **more):
    """Findings and report; of a file without tokens by default."""
    mixture, found = open_mixture(path), []
    checker = Checker(mixture.sources, settings or Settings(), max_length, more.pop("images_per_row", 2))
    result = audit(checker, mixture, workers, found.append)
    return found, result.report(max_length, checker.images_per_row, more.pop("rows", 128), more.pop("allow", ()))


@pytest.fixture(scope="module")
def with_tokens():
    return Settings(tokenizer=Tokenizer.load(TOKENIZER))


def expected_message(text, r, settings):
    if "{over}" not in text:
        return text
    tokens = encode_conversation(r["conversations"], settings.template, settings.tokenizer).tokens
    return text.format(over=len(tokens) - 1200)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_alone(name, tmp_path, with_tokens):
    bad, expected = DEFECTS[name]
    path = write(tmp_path, [row("first"), "", bad])
    found, report = run(path, with_tokens)
    unusable = {kind for kind, _ in expected} & set(KINDS[:9])
    assert [finding.kind for finding in found] == [kind for kind, _ in expected]
    for finding, (_, message) in zip(found, expected, strict=True):
        assert finding[:4] == (str(path), 2, 3, bad["id"] if isinstance(bad, dict) else "")
        assert expected_message(message, bad, with_tokens) in finding.message
        assert str(tmp_path) not in finding.message.replace(f"the image root {tmp_path}", "")
        assert finding.as_json()["usable"] == (finding.kind not in unusable)
    assert report["ok"] == (not expected)
    assert (report["rows"], report["good_rows"]) == (2, 1 if unusable else 2)


def test_all_defects_at_once_with_any_number_of_workers(tmp_path, with_tokens, monkeypatch):
    rows = [json.loads(re.sub("r0|(?<=corner )0", f"r{i}", json.dumps(bad)))
            for i, (bad, _) in enumerate(DEFECTS.values())]
    path = write(tmp_path, rows)
    here = run(path, with_tokens)
    expected = [(i + 1, kind) for i, (_, kinds) in enumerate(DEFECTS.values()) for kind, _ in kinds]
    assert [(finding.row, finding.kind) for finding in here[0]] == expected
    monkeypatch.setattr(audit_module, "CHUNK", 7)
    assert run(path, with_tokens, workers=2) == here


def test_without_a_tokenizer_all_else_is_found(tmp_path, with_tokens):
    rows = [bad for name, (bad, _) in DEFECTS.items() if name not in ("special token",)]
    path = write(tmp_path, rows)
    (full, counted), (found, report) = run(path, with_tokens), run(path)
    assert [f for f in full if f.kind != "too_long" or "tokens" not in f.message] == found
    assert report["tokens"] is report["packing"] is None and counted["tokens"] and counted["packing"]


def test_repeated_rows(tmp_path):
    question = row(1, image="good.jpg")
    rows = [question, row(2), {**row(3), "id": 17}, {**row(4), "id": "17"},
            {**row(5), "id": None}, {**row(6), "id": None},
            {**question, "id": 7}, row(8, question="What is in corner 1?", answer="A cat.", image="good.jpg"),
            row(9, question="What is in corner 2?", answer="Else."), row(10, question="What is in corner 2?"),
            {**question, "id": 11, "image": "other.jpg"},
            row(12, question="What is in corner 1?", answer="A cat.", image="good.jpg")]
    path = write(tmp_path, rows)
    found, _ = run(path)
    assert [(f.row, f.line, f.id, f.kind, f.message) for f in found] == [
        (4, 4, "17", "duplicate_id", "same id as row 3 (line 3)"),
        (7, 7, "7", "duplicate", "same images and texts as row 1 (line 1)"),
        (10, 10, "r10", "duplicate", "same images and texts as row 2 (line 2)"),
        (12, 12, "r12", "duplicate", "same images and texts as row 8 (line 8)"),
        (8, 8, "r8", "duplicate_question", "same images and questions as row 1 (line 1)"),
    ]


def test_a_mixture(tmp_path, with_tokens):
    first = write(tmp_path, [row(1), row(2, image="good.jpg"), row(3, image="none.jpg")], "first.jsonl")
    write(tmp_path, [row(1, question="else"), row(2, image="good.jpg")], "second.jsonl")
    path = tmp_path / "mixture.json"
    parts = [{"path": "first.jsonl", "epochs": 4}, {"path": "second.jsonl", "count": 1}]
    path.write_text(json.dumps({"mixture": parts}))
    found, report = run(path, with_tokens)
    assert [(os.path.basename(f.source), f.row, f.kind) for f in found] == [
        ("first.jsonl", 3, "missing_image"), ("second.jsonl", 2, "duplicate")]
    assert found[1].message == f"same images and texts as {first}, row 2 (line 2)"
    parts = [(s["rows"], s["good_rows"], s["rows_per_epoch"], s["findings"]) for s in report["sources"]]
    assert parts == [(3, 2, 12, {"missing_image": 1}), (2, 2, 1, {"duplicate": 1})]
    assert (report["rows"], report["good_rows"], report["text_only_rows"]) == (5, 4, 2)
    assert report["images"] == {"references": 3, "per_row": {"0": 2, "1": 2}, "distinct": 2}


def test_figures_against_brute_force(tmp_path, with_tokens):
    path = make_data(tmp_path, 90)
    source, settings = open_source(path), with_tokens
    examples = [encode_conversation(source[i].turns, settings.template, settings.tokenizer) for i in range(90)]
    limit = int(np.median([len(examples[i].tokens) for i in range(90) if len(source[i].images) == 2]))
    good = [i for i in range(90) if len(examples[i].tokens) <= limit]
    lengths = [len(examples[i].tokens) for i in good]
    images = [len(source[i].images) for i in good]
    assert images.count(2) in range(5, 20)
    _, report = run(path, settings, max_length=limit, rows=7)
    tokens = report["tokens"]
    learned = sum(int((examples[i].labels != IGNORE).sum()) for i in good)
    assert (tokens["total"], tokens["learned"]) == (sum(lengths), learned)
    assert tokens["learned_share"] == learned / sum(lengths)
    assert (tokens["min"], tokens["max"], tokens["median"]) == (min(lengths), max(lengths), statistics.median(lengths))
    assert tokens["mean"] == pytest.approx(statistics.mean(lengths))
    assert tokens["p95"] == pytest.approx(statistics.quantiles(lengths, n=20, method="inclusive")[-1])
    assert tokens["histogram"] == [
        [low, high, sum(low <= length < high for length in lengths)] for low, high, _ in tokens["histogram"]]
    assert sum(count for *_, count in tokens["histogram"]) == len(good) and len(tokens["histogram"]) <= 11
    assert report["images"]["per_row"] == {str(n): images.count(n) for n in (0, 1, 2)}
    assert report["images"]["references"] == report["images"]["distinct"] == len(list(tmp_path.glob("*.png")))
    packed = pack(lengths, images, limit, 2)  # of one window: the order makes no difference
    assert report["packing"] == {
        "row_length": limit, "images_per_row": 2,
        "rows": len(packed), "rows_per_step": 7, "steps": len(packed) // 7,
        "token_fill": sum(lengths) / len(packed) / limit, "image_fill": sum(images) / len(packed) / 2}
    batches = Batches(7, open_mixture(path), tokenizer=settings.tokenizer, template="vicuna_v1", tokens_per_image=576,
                      image_size=28, image_mode="pad", row_length=limit, images_per_row=2, bad_rows="skip")
    assert batches.count_rows() == len(packed)


def test_an_epoch_of_a_mixture_packs_as_often_as_it_is_read(tmp_path, with_tokens, monkeypatch):
    make_data(tmp_path, 200)
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"mixture": [{"path": "data.json", "epochs": 30}]}))
    whole = run(path, with_tokens, max_length=1900, images_per_row=8)[1]["packing"]
    mixture = open_mixture(path)
    rows = audit(Checker(mixture.sources, with_tokens, 1900, 8), mixture, 0).rows
    assert whole["rows"] == len(pack(np.tile(rows["tokens"], 30), np.tile(rows["images"], 30), 1900, 8))
    monkeypatch.setattr(audit_module, "PACKED", 1500)  # a quarter of the epoch
    part = run(path, with_tokens, max_length=1900, images_per_row=8)[1]["packing"]
    assert part["token_fill"] != whole["token_fill"] == pytest.approx(part["token_fill"], rel=0.03)
    assert part["rows"] == pytest.approx(whole["rows"], rel=0.03)


@pytest.mark.parametrize("span", [1, 9, 10, 11, 25, 26, 99, 101, 2047, 123456])
def test_bins_are_few_and_wide_enough(span):
    width = audit_module._bin_width(span)
    assert width * 10 >= span and isinstance(width, int) and (width == 1 or width < span)


def test_rows_of_parquet(tmp_path, with_tokens):
    import pyarrow
    import pyarrow.parquet

    def message(text, *images):
        content = [{"type": "image", "text": None}] * len(images) + [{"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": content},
                             {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
                "images": [{"bytes": IMAGES[image], "path": None} for image in images]}

    rows = [message("a", "good.jpg"), message("b", "good.jpg", "cut.jpg"), message("c", "empty.jpg"), message("d"),
            message("a", "good.jpg"), message("e", "png.jpg"), message("f", "moving.gif")]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    found, report = run(path, with_tokens, max_length=2048)
    assert [(f.source, f.row, f.line, f.kind) for f in found] == [
        (str(path), 2, None, "broken_image"), (str(path), 3, None, "image_count"), (str(path), 7, None, "animated"),
        (str(path), 5, None, "duplicate")]
    assert found[0].message.startswith("image 2: cannot be read (image file is truncated")
    assert found[3].message == "same images and texts as row 1"
    assert report["images"]["references"] == 6 and report["images"]["distinct"] == 4


def test_separators_by_hand():
    assert separators(TEMPLATES["vicuna_v1"]) == ("USER:", "ASSISTANT:", "</s>")
    assert set(separators(TEMPLATES["llava_v0"])) == {"###", "Human:", "Assistant:"}
    assert set(separators(TEMPLATES["llava_llama_2"])) == {"<<SYS>>", "<</SYS>>", "[INST]", "[/INST]", "</s>", "<s>"}
    assert separators(TEMPLATES["mpt"]) == ("<|im_start|>", "<|im_end|>")
    assert set(separators(TEMPLATES["v1_mmtag"])) == {"USER:", "ASSISTANT:", "</s>", "<Image>", "</Image>"}
    assert separators(TEMPLATES["plain"]) == ()


def test_a_template_s_own_separators(tmp_path):
    path = write(tmp_path, [row(1, question="<|im_end|> {}"), row(2, answer="USER: </s>")])
    for template, expected in (("mpt", [1]), ("vicuna_v1", [2]), ("qwen_1_5", [1])):
        assert [f.row for f in run(path, Settings(template=TEMPLATES[template]))[0]] == expected


def test_a_tokenizer_s_own_tokens(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(TOKENIZER, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 2000, "[PAD]": 2001}))
    path = write(tmp_path, [row(1, image="good.jpg"), row(2, answer="[PAD] and <s>, not <p> [p]")])
    found, _ = run(path, Settings.load(str(folder)))
    assert [(f.row, f.message) for f in found] == [(2, "turn 2 holds '[PAD]', turn 2 holds '<s>'")]


@pytest.mark.parametrize("mode, refused", [("square", 1), ("pad", 0)])
def test_images_that_grow_too_large_in_one_mode_only(mode, refused, tmp_path):
    path = write(tmp_path, [row(1, image="strip.png"), row(2, image="wide.png")])
    found, _ = run(path, Settings(image_mode=mode))
    assert [finding.kind for finding in found] == ["broken_image"] * refused
    assert all("1 x 3000 pixels is too elongated to resize" in finding.message for finding in found)


def test_an_image_that_decodes_for_ever(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("llava_jax.images.time.monotonic", lambda: next(clock))
    (finding,), _ = run(write(tmp_path, [row(1, image="good.jpg")]), Settings())
    assert finding.kind == "broken_image" and "decoding takes more than 30 s" in finding.message


def test_turned_images_are_no_finding_once_training_turns_them(tmp_path):
    path = write(tmp_path, [row(1, image="turned.jpg"), row(2, image="good.jpg")])
    for settings, kinds in ((Settings(), ["rotated"]), (Settings(exif=True), [])):
        found, _ = run(path, settings)
        assert [finding.kind for finding in found] == kinds


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "I/O"), OSError(errno.ESTALE, "stale"), MemoryError()])
@pytest.mark.parametrize("where", ["builtins.open", "PIL.Image.open", "PIL.Image.Image.load"])
def test_a_fault_of_the_machine_is_no_finding(fault, where, tmp_path, monkeypatch):
    path = write(tmp_path, [row(1, image="good.jpg")])
    checker = Checker(open_mixture(path).sources, Settings(), 2048, None)
    real = open

    def fail(*args, **options):
        if where == "builtins.open" and not str(args[0]).endswith("good.jpg"):
            return real(*args, **options)
        raise fault

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(fault)) as raised:
        checker((0, 0, 1))
    assert raised.value is fault


def test_captions(tmp_path):
    caption = [row(1, "{}", "a dog", "good.jpg"), row(2, "{}", "a dog"), row(3, "{}", "", "good.jpeg"),
               row(4, image="grey.png", conversations=turns("<image>", "a", "b", "c"))]
    found, _ = run(write(tmp_path, caption), Settings(template=TEMPLATES["plain"]))
    assert [(f.row, f.kind) for f in found] == [(2, "malformed"), (3, "empty_answer"), (4, "malformed")]
    assert "has no <image>" in found[0].message and "not several rounds" in found[2].message


@pytest.mark.parametrize("template", TEMPLATES)
def test_words_stand_in_for_a_tokenizer(template):
    rng = np.random.default_rng(0)
    texts = ["", " ", "\n", "a", "a b\n", "</s>", " . "]
    for _ in range(40):
        rounds = 1 if template == "plain" else int(rng.integers(1, 4))
        answers = rng.choice(texts, rounds).tolist()
        pairs = [(role, text) for answer in answers for role, text in (("user", "<image>"), ("assistant", answer))]
        conversation = [{"from": "gpt" if role == "assistant" else "human", "value": text} for role, text in pairs]
        learns = any(span.learned for span in spans(pairs, TEMPLATES[template]))
        try:
            example = encode_conversation(conversation, template, Words(), 1)
        except NoSupervisedTokens:
            assert not learns
        else:
            assert learns and (example.tokens == -200).sum() == rounds


def test_a_row_takes_32_bytes():
    assert ROW.itemsize <= 32


def check(*args):
    return cli.parse(Check, [str(arg) for arg in args], prog="check").run()


def test_json_and_the_file_of_bad_rows(tmp_path, capsys):
    rows = [{**row(i), "id": 5} for i in range(1100)] + [row(5000, image="none.jpg")]
    path, file = write(tmp_path, rows), tmp_path / "bad.jsonl"
    assert check(path, "--json", "--bad-rows", file, "--workers", 0, "--allow", "duplicate_id") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == {"missing_image": 1, "duplicate_id": 1099} and report["allowed"] == ["duplicate_id"]
    assert not report["ok"] and len(report["bad_rows"]) == 1000
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved[:1000] == report["bad_rows"] and len(saved) == 1100
    assert saved[0] == {"source": str(path), "row": 1101, "line": 1101, "id": "r5000", "kind": "missing_image",
                        "message": "none.jpg: no such image file", "usable": False}
    assert saved[-1] == {"source": str(path), "row": 1100, "line": 1100, "id": "5", "kind": "duplicate_id",
                         "message": "same id as row 1 (line 1)", "usable": True}
    assert check(path, "--json", "--workers", 0, "--allow", "duplicate_id", "missing_image") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["ok"] and again == {**report, "ok": True, "allowed": ["duplicate_id", "missing_image"]}


def test_the_file_of_bad_rows_is_whole_or_not_there(tmp_path, monkeypatch):
    path, file = write(tmp_path, [row(1, image="none.jpg")]), tmp_path / "bad.jsonl"
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(audit_module, "_find_repeats", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check(path, "--bad-rows", file, "--workers", 0)
    for target in (path, tmp_path, tmp_path / "none" / "bad.jsonl"):
        with pytest.raises(UserError, match="--bad-rows .*: (there is something|this is a folder|cannot be written)"):
            check(path, "--bad-rows", target, "--workers", 0)
    assert sorted(tmp_path.iterdir()) == before
    assert check(path, "--bad-rows", file, "--workers", 0) == 1 and file.exists()


def test_text_for_people(tmp_path, capsys):
    rows = [row(i, image=f"{'folder/' * 20}{i}.jpg") for i in range(30)]
    rows += [{**row(100 + i, answer="</s>"), "id": "\x1b[31m\nred" * 9} for i in range(8)]
    path = write(tmp_path, [*rows, row(200, image="good.jpg")])
    assert check(path, "--model", TOKENIZER, "--workers", 0, "--allow", "separator") == 1
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in text
    assert all(f"{i}.jpg: no such image file" in " ".join(text.split()) for i in range(5))  # wrapped, never cut
    findings = [line.split()[0] for line in lines if ", id " in line]
    assert findings == ["missing_image"] * 5 + ["separator"] * 5 + ["duplicate_id"] * 5
    assert "... and 30 more (--bad-rows FILE writes all of them)" in lines
    assert any(line.split()[:3] == ["separator", "8", "allowed"] for line in lines)
    assert "rows      39, of which 9 can be used" in lines and any(line.startswith("packing") for line in lines)
    check(path, "--workers", 0)
    assert "tokens    not counted: lengths, too_long and packing need --model" in capsys.readouterr().out


def test_what_is_wrong_is_never_cut(tmp_path, capsys):
    bad = row(1, conversations=[{"from": "human", "value": "a"}, {"from": "bot\x1b[31m", "value": "b"}])
    path = write(tmp_path, [{**bad, "id": "conversation-" + "0" * 40}])
    assert check(path, "--workers", 0) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "turn 2 is from 'bot\\x1b[31m'; it must be from 'human' (user) or 'gpt' (assistant)" in text


def test_fields_that_nothing_reads_are_counted(tmp_path, capsys):
    rows = [row(i) | {"score": i, "source": None} for i in range(3)]
    rows[1]["conversations"][0]["name\u202e"] = "x"
    path = write(tmp_path, rows)
    assert check(path, "--json", "--workers", 0) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unknown_keys"] == found["sources"][0]["unknown_keys"] == {"score": 3, "turn.name\u202e": 1}
    check(path, "--workers", 0)
    assert "not read  score in 3, turn.name\ufffd in 1 rows" in capsys.readouterr().out


def test_a_rare_kind_is_shown_behind_a_thousand_of_another(tmp_path, capsys):
    path = write(tmp_path, [{**row(i), "id": 5} for i in range(1100)] + [{**row(7), "id": 6}])
    check(path, "--workers", 0)
    assert "duplicate            row 1101 (line 1101), id 6: same images and texts as row 8" in capsys.readouterr().out


def test_at_most_twenty_findings_are_shown(tmp_path):
    _, report = run(write(tmp_path, [row(1)]))
    shown = [Finding("f", i, None, "", KINDS[i % 9], "no") for i in range(20)]
    text = describe({**report, "findings": {kind: 5 for kind in KINDS}}, shown)
    assert text.count(": no\n") == 20 and f"... and {5 * len(KINDS) - 20} more" in text


def test_nothing_usable_at_all(tmp_path, capsys):
    path = write(tmp_path, [row(1, image="none.jpg")])
    assert check(path, "--model", TOKENIZER, "--workers", 0) == 1
    assert "rows      1, of which 0 can be used" in capsys.readouterr().out


def test_the_help_names_every_kind_and_field(tmp_path):
    _, report = run(write(tmp_path, [row(1)]), Settings(tokenizer=Tokenizer.load(TOKENIZER)))
    names = {*KINDS, *report, *report["tokens"], *report["images"], *report["packing"], *report["sources"][0]}
    assert not [name for name in names if name not in Check.__doc__]


@pytest.mark.parametrize("options, says", [
    (["--max-length", 99], "--max-length needs --model"),
    (["--tokens-per-image", 99], "--tokens-per-image needs --model"),
    (["--allow", "duplicates"], "--allow duplicates: there is no such kind of finding; there are malformed, "),
    (["--images-per-row", 0], "--images-per-row is 0: it must be at least 1"),
    (["--workers", -1], "--workers is -1"),
    (["--template", "vicuna"], "unknown template 'vicuna'; did you mean 'vicuna_v1'"),
    (["--model", "none"], "none: no such model or tokenizer"),
])
def test_options_that_cannot_be(options, says, tmp_path):
    path = write(tmp_path, [row(1)])
    with pytest.raises((ValueError, FileNotFoundError), match=says) as raised:
        check(path, *options)
    assert "\n" not in str(raised.value)


def test_exit_codes_of_the_command(tmp_path):
    good, bad = write(tmp_path, [row(1)], "good.jsonl"), write(tmp_path, [row(1, image="none.jpg")], "bad.jsonl")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": 1, "conversations": []},')
    for path, code in ((good, 0), (bad, 1), (broken, 2)):
        command = [sys.executable, "-m", "llava_jax.prepare", "check", str(path), "--json", "--workers", "0"]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == code, ran.stderr
        if code == 2:
            assert ran.stdout == "" and "broken JSON" in ran.stderr and ran.stderr.count("\n") == 1
        else:
            assert json.loads(ran.stdout)["ok"] == (code == 0) and ran.stderr == ""
