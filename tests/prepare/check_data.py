"""Rows with one defect each, and pictures for them; what several tests of `prepare check` start from."""

import io
import json
import struct
import zlib

import numpy as np
from conftest import GOLDEN
from image_data import png
from PIL import Image

from llava_jax.data.sources import open_mixture
from llava_jax.prepare.audit import audit
from llava_jax.prepare.findings import Checker
from llava_jax.prepare.settings import Settings

TOKENIZER = GOLDEN / "tokenizer.model"


def encoded(mode="RGB", size=(40, 30), kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(sum(size)).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""
    return png(30000, 30000, zlib.compress(b"\0" * 99))


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
                        [("too_long", "3 tiles, but a packed sequence has 2 (--tiles-per-sequence)"),
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
    "PNG as JPEG": (row(0, image="png.jpg"), [("wrong_type", "png.jpg: contains PNG, but is named .jpg")]),
    "EXIF rotation": (row(0, image="turned.jpg"), [("rotated", "turned.jpg: EXIF orientation 6: viewers rotate it")]),
    "hardly a difference": (row(0, image="faint.png"), [("faint", "its values from 0 to 299 become 0 to 1 of 255")]),
    "glass": (row(0, image="glass.png"), [("transparent", "glass.png: has transparent pixels")]),
    "GIF of three frames": (row(0, image="moving.gif"), [("animated", "moving.gif: has several frames")]),
    "TIFF of three pages": (row(0, image="pages.tiff"), [("animated", "pages.tiff: has several frames")]),
    "GIF as JPEG": (row(0, image="moving.jpg"),
                    [("wrong_type", "contains GIF, but is named .jpg"), ("animated", "moving.jpg: has several")]),
    "separators": (row(0, conversations=turns("r0 </s>", "USER: a </s> ASSISTANT: b")),
                   [("separator", "turn 1 contains '</s>', turn 2 contains 'USER:', turn 2 contains 'ASSISTANT:'")]),
    "no separators": (row(0, question="r0 user: <div> [1] <br/> # Assistant"), []),
    "special token": (row(0, question="r0 <unk>"), [("separator", "turn 1 contains '<unk>'")]),
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
    checker = Checker(mixture.sources, settings or Settings(), max_length, more.pop("tiles_per_sequence", 2))
    result = audit(checker, mixture, workers, found.append)
    return found, result.report(max_length, checker.tiles_per_sequence, more.pop("batch_size", 128),
                                more.pop("allow", ()))
