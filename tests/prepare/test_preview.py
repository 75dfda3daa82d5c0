"""The preview page, read back with an HTML parser that knows nothing of how it was written."""

import base64
import dataclasses
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llava_jax import cli
from llava_jax.data.examples import DataSpec
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.images import ImageProcessor
from llava_jax.prepare.preview import Preview, draw_rows, read_rows
from llava_jax.prepare.preview_page import render_page
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, encode_conversation
from llava_jax.text.templates import get, render
from llava_jax.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer.model"
HOSTILE = "</pre></span><script>alert('1')</script><img src=x onerror=\"alert(2)\"> &amp; &#60; ' \""
PIECES = ["The", " dog", ": ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "\u2581", "\u00a0", "\u202e", "\u200b"]
PIECES += ["é", "ﬁ", "한국", "🦙", "👩\u200d🚀", "<", "</", "s>", "</s>", "###", "مرحبا", "\ue000", "&lt;", HOSTILE]
EMPTY = ("meta", "img", "br")  # tags without an end


class Node:
    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.children = tag, dict(attributes), []
        self.classes = self.attributes.get("class", "").split()

    def all(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.all()

    def find(self, name):
        """Elements of a class or tag."""
        return [node for node in self.all() if name in (node.tag, *node.classes)]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def flex(self):
        return int(self.attributes["style"].removeprefix("flex:"))


class Parser(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open = [Node("page")]
        self.feed(page.replace("\r\n", "\n").replace("\r", "\n"))  # as browsers do first of all
        self.close()
        assert len(self.open) == 1

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes)
        self.open[-1].children.append(node)
        if tag not in EMPTY:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page):
    return Parser(page).open[0]


def conversation(*texts):
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def row(number, *texts, **fields):
    return {"id": number, "conversations": conversation(*texts)} | fields


def write_rows(folder, rows):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def draw_image(path, size=(50, 20), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def show(path, settings, numbers=None, sequence_length=2048, tiles_per_sequence=2):
    mixture = open_mixture(path)
    spec = DataSpec(mixture=mixture, **vars(settings), sequence_length=sequence_length,
                    tiles_per_sequence=tiles_per_sequence)
    shown = read_rows(range(len(mixture.sources[0])) if numbers is None else numbers, spec)
    return parse(render_page("A title", {}, shown, settings, sequence_length, tiles_per_sequence))


@pytest.fixture(scope="module")
def settings():
    return Settings(Tokenizer.load(GOLDEN), processor=ImageProcessor(28, patches=2))


def test_the_canvas_of_anyres_is_shown_as_the_model_gets_it(settings, tmp_path):
    draw_image(tmp_path / "wide.png", (80, 30))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [{"id": "1", "image": "wide.png", "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    processor = settings.processor.with_mode("anyres", "(56x28),(56x56)")
    page = show(tmp_path / "data.json", dataclasses.replace(settings, processor=processor), tiles_per_sequence=3)
    captions = [" ".join(found.text.split()) for found in page.find("figcaption")]
    assert captions[1:] == ["the model sees 28 × 28, shown × 8", "and 2 tiles of 56 × 28, shown × 4"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE with hardly more tokens than bytes, as a tokenizer.json. It drops U+200B."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["The dog is a 한국 dog 🦙"] * 5, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def read_tokens(card, per_image):
    """(rendered text, tokens, supervised) of a card."""
    text, tokens, supervised = "", [], []
    (body,) = card.find("tokens")
    for node in body.children:
        if "image" in node.classes:
            assert node.text == f"image {tokens.count(IMAGE_TOKEN_ID) // per_image + 1}: {per_image} tokens"
            text += "<image>"
            tokens += [IMAGE_TOKEN_ID] * per_image
            supervised += [False] * per_image
        else:
            text += node.text
            if "gap" not in node.classes:
                tokens.append(int(node.attributes["title"]))
                supervised.append("l" in node.classes)
    return text, tokens, supervised


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen_1_5", "v0_mmtag"])
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece, not legacy", "bytes"])
def test_tokens_of_the_page_are_those_of_training(kind, template, byte_level, tmp_path):
    tokenizer = byte_level if kind == "bytes" else Tokenizer.load(GOLDEN, legacy=False if "not" in kind else None)
    settings = Settings(tokenizer, get(template), ImageProcessor(28, patches=2))
    rng = random.Random(0)
    draw_image(tmp_path / "a.png")

    def text():
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 9)))

    rows = []
    for i in range(12):
        images = "<image>\n" if i % 3 == 1 else text() + "<image><image>" if i % 3 == 2 else ""
        rows.append(row(i, images + text(), text(), text(), text() + "."))
        rows[-1] |= {"image": ["a.png"] * (i % 3)} if i % 3 else {}
    page = show(write_rows(tmp_path, rows), settings)
    cards = page.find("card")
    assert len(cards) == len(rows)
    for card, original in zip(cards, rows, strict=True):
        turns = original["conversations"]
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        expected = encode_conversation(turns, template, tokenizer, 4)
        text_seen, tokens, supervised = read_tokens(card, 4)
        assert text_seen == render(messages, template)
        assert tokens == expected.tokens.tolist()
        assert supervised == (expected.labels != IGNORE).tolist()
        counts = f"{len(tokens):,} tokens, {sum(supervised):,} supervised ({sum(supervised) / len(tokens):.1%})"
        assert counts in card.text


def test_what_has_no_text_or_cannot_be_seen_has_a_sign(settings, tmp_path):
    page = show(write_rows(tmp_path, [row(0, "日", "a\u202e\tb\n\n")]), settings)
    (body,) = page.find("tokens")
    signs = [node.attributes["data-sign"] for node in body.all() if "data-sign" in node.attributes]
    assert signs == ["<s>", "␣", "+", "+", "+", "+", "U+202E", "⇥", "↵", "↵"]
    special = [node.text or node.attributes["data-sign"] for node in body.find("s")]
    assert special == ["<s>", "</s>"]


def test_text_that_tokenizing_drops_is_shown_as_such(byte_level, tmp_path):
    draw_image(tmp_path / "a.png")
    texts = ("a\u200b\u200bb<image>c\u200b<image>", "Yes.")
    page = show(write_rows(tmp_path, [row(0, *texts, image=["a.png"] * 2)]),
                Settings(byte_level, processor=ImageProcessor(patches=2)))
    (body,) = page.find("tokens")
    gaps = [i for i, node in enumerate(body.children) if "gap" in node.classes]
    assert [body.children[i].text for i in gaps] == ["\u200b\u200b", "\u200b"]
    assert body.children[gaps[0] + 1].text == "b" and body.children[gaps[1] - 1].text == "c"


def test_system_text_and_an_opening_answer(settings, tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, *conversation("Hello.", "Hi.", "You?", "Me.")]
    page = show(write_rows(tmp_path, [{"conversations": turns}, {"conversations": turns[2:]}]), settings)
    texts = [read_tokens(card, 4)[0] for card in page.find("card")]
    assert texts[0] == "Be brief. USER: Hello. ASSISTANT: Hi.</s>USER: You? ASSISTANT: Me.</s>"
    assert texts[1].endswith("questions. USER: You? ASSISTANT: Me.</s>")


def test_nothing_of_the_data_is_markup(settings, tmp_path):
    name = HOSTILE.replace("/", "")
    Image.new("RGB", (9, 9)).save(tmp_path / name, "PNG")
    rows = [
        row(HOSTILE, "<image>\n" + HOSTILE, HOSTILE, image=name, more={HOSTILE: HOSTILE}),
        row(HOSTILE, "<image>", "no", image="missing" + name),
        {"id": HOSTILE, "conversations": [{"from": HOSTILE, "value": HOSTILE}]},
    ]
    folder = tmp_path / "<b>&amp;'"
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps(rows))
    output = tmp_path / "page.html"
    assert run(folder / "data.json", "--model", GOLDEN, "--image-root", tmp_path, "--out", output, "--first") == 0
    page = parse(output.read_text())
    tags = "page html head meta title style body h1 h2 h3 div span b p a i article figure figcaption img br details"
    tags += " summary pre"
    attributes = "class id title style href src alt width height data-sign lang charset name content http-equiv"
    for node in page.all():
        assert node.tag in tags.split() and {*node.attributes} <= {*attributes.split()}
        assert node.attributes.get("src", "data:image/").startswith("data:image/")
        assert node.attributes.get("href", "#record-").startswith("#record-")
    assert "url(" not in (style := page.find("style")[0].text) and "@import" not in style
    first, second, third = page.find("card")
    assert HOSTILE in read_tokens(first, 576)[0] and str(tmp_path / name) in first.text
    assert json.loads(first.find("pre")[0].text) == rows[0]
    assert first.find("h3")[0].text == f"Record 1 id {HOSTILE}"
    assert "missing image" in second.text and "missing" + name in second.text
    assert "role" in third.text and json.loads(third.find("pre")[0].text) == rows[2]
    assert str(folder) in page.find("h1")[0].text


def test_a_bad_record_is_a_card_with_its_reason(settings, tmp_path):
    good = draw_image(tmp_path / "good.png", size=(300, 200))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    deep: dict = {}
    for _ in range(600):
        deep = {"a": deep}
    bad = {
        "missing image": row(0, "<image>", "Yes.", image="none.png"),
        "broken image": row(1, "<image>", "Yes.", image="cut.png"),
        "outside root": row(2, "<image>", "Yes.", image="../x.png"),
        "image count": row(3, "<image>", "Yes."),
        "no supervised tokens": row(4, "What?", ""),
        "too long": row(5, "What?", "word " * 500),
        "turn order": {"conversations": conversation("a", "b")[:1] * 2},
        "malformed": {"conversations": 7, "more": deep},
    }
    rows = [row("good", "What?", "Yes."), *bad.values()]
    lines = "".join(json.dumps(line) + "\n" for line in rows) + '{"conversations": [\n'
    (tmp_path / "data.jsonl").write_text(lines)
    page = show(tmp_path / "data.jsonl", settings, sequence_length=256)
    cards = page.find("card")
    reasons = [[node.text.removeprefix("✗ ") for node in card.find("bad")] for card in cards]
    assert reasons == [[], *([reason] for reason in bad), ["malformed"]]
    for card, line, number in zip(cards[1:], [*bad.values(), None], range(2, 99), strict=False):
        assert f"{tmp_path / 'data.jsonl'}, row {number} (line {number})" in card.text
        if line is not None and "more" not in line:
            assert json.loads(card.find("pre")[0].text) == line
    assert read_tokens(cards[1], 4)[0].endswith("<image> ASSISTANT: Yes.</s>")  # what is good of it is shown
    assert not cards[2].find("img") and not cards[-1].find("pre")
    assert [node.attributes["href"] for node in page.find("segment")] == ["#record-1"]


def test_a_page_without_a_good_record(settings, tmp_path):
    page = show(write_rows(tmp_path, [row(0, "<image>", "Yes.", image="none.png")]), settings)
    assert not page.find("bar") and "No record is good." in page.text


@pytest.mark.parametrize("mode,size", [("pad", 28), ("crop", 28), ("pad", 336)])
def test_pictures_are_what_prepare_makes(mode, size, settings, tmp_path):
    long, clear = draw_image(tmp_path / "long.png", (300, 20)), draw_image(tmp_path / "clear.png", (60, 210), "RGBA")
    noise = draw_image(tmp_path / "noise.png", (500, 400))
    url = "data:image/png;base64," + base64.b64encode(clear.read_bytes()).decode()
    frames = [Image.new("RGB", (30, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]}]
    rows += [{"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Yes."}],
              "images": [name]} for name in ("long.png", "noise.png", "moving.gif")]
    settings = Settings(settings.tokenizer, processor=ImageProcessor(size, mode, patches=2))
    page = show(write_rows(tmp_path, rows), settings)
    about = [f"embedded, {clear.stat().st_size:,} bytes", str(long), str(noise), str(tmp_path / "moving.gif")]
    kinds = ["60 × 210PNG RGBA", "300 × 20PNG RGB", "500 × 400PNG RGB", "30 × 40GIF P, first of 3 frames"]
    images = [clear.read_bytes(), long, noise, tmp_path / "moving.gif"]
    for card, image, where, kind in zip(page.find("card"), images, about, kinds, strict=True):
        small, seen = card.find("img")
        expected = settings.processor(open_image(image))[0]
        decoded = np.asarray(decode(seen))
        assert decoded.shape == expected.shape
        difference = np.abs(decoded.astype(int) - expected)
        assert not difference.any() if decode(seen).format == "PNG" else size == 336 and difference.mean() < 20
        times = int(seen.attributes["width"]) // size
        assert seen.attributes["width"] == seen.attributes["height"] == str(size * times) and 168 < size * times <= 336
        original = open_image(image)
        assert max(decode(small).size) == min(144, max(original.size))
        assert decode(small).width / decode(small).height == pytest.approx(original.width / original.height, rel=0.1)
        assert where in card.text and f"original: {kind}" in card.text
        assert len(card.text) < 30_000 < len(url)  # the row as stored leaves most of an image out


def decode(image):
    about, data = image.attributes["src"].split(";base64,")
    opened = Image.open(io.BytesIO(base64.b64decode(data)))
    assert about == f"data:image/{opened.format.lower()}"
    return opened


def test_packed_rows_are_drawn_to_scale(settings, tmp_path):
    draw_image(tmp_path / "a.png")
    rng = random.Random(1)
    rows = []
    for i in range(11):
        words = " ".join(rng.choices(["dog", "The", "yes"], k=rng.randrange(1, 60)))
        rows.append(row(i, "<image>" * (i % 3) + " What?", words, "And?", words[:9]))
        rows[-1] |= {"image": ["a.png"] * (i % 3)} if i % 3 else {}
    rows[4]["image"] = ["none.png"]  # bad: in no row
    page = show(write_rows(tmp_path, rows), settings, sequence_length=300, tiles_per_sequence=3)
    examples = [encode_conversation(row["conversations"], "vicuna_v1", settings.tokenizer, 4) for row in rows]
    places = {node.attributes["id"] for node in page.find("card")}
    drawn = []
    for drawn_row in page.find("row"):
        segments, used, slots = drawn_row.find("segment"), 0, 0
        for segment in segments:
            number = int(segment.text)
            assert segment.attributes["href"] == f"#record-{number}" and f"record-{number}" in places
            tokens, labels = examples[number - 1]
            assert segment.flex == len(tokens)
            parts = [kind for part in segment.find("i") for kind in part.classes * part.flex]
            assert parts == ["visual" if token == IMAGE_TOKEN_ID else "prompt" if label == IGNORE else "supervised"
                             for token, label in zip(tokens, labels, strict=True)]
            drawn.append(number)
            used += len(tokens)
            slots += (number - 1) % 3
        assert sum(node.flex for node in drawn_row.find("padding")) == 300 - used >= 0
        assert f"{used:,} of 300 tokens ({used / 300:.1%}), {slots} of 3 tiles" in drawn_row.text
        assert drawn_row.find("slots")[0].text == "■" * slots + "□" * (3 - slots)
    assert sorted(drawn) == [i + 1 for i in range(11) if i != 4]


def run(*args):
    return cli.parse(Preview, [str(arg) for arg in args], prog="preview").run()


def test_the_same_seed_draws_the_same_page(data, tmp_path, capsys):
    pages, ids = {}, {}
    for name, args in {"a": [], "b": ["--seed", 0], "c": ["--seed", 1], "first": ["--first"], "rows": ["--rows", 24, 3],
                       "all": ["-n", 99]}.items():
        output = tmp_path / f"{name}.html"
        assert run(data, "-n", 5, "--model", GOLDEN, "--out", output, *args) == 0
        assert capsys.readouterr().out.startswith(f"{output}: ")
        pages[name] = output.read_bytes()
        cards = parse(pages[name].decode()).find("card")
        ids[name] = [json.loads(card.find("pre")[0].text)["id"] for card in cards]
    assert pages["a"] == pages["b"] and ids["a"] != ids["c"] and ids["a"] != ids["first"]
    assert all(len(set(ids[name])) == 5 for name in "abc")
    assert ids["first"] == [0, 1, 2, 3, 4] and ids["rows"] == [23, 2] and sorted(ids["all"]) == list(range(24))


def test_a_mixture_is_drawn_as_an_epoch_reads_it(tmp_path):
    for name, count in (("large", 1000), ("small", 10), ("rare", 500)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row(i, "What?", "Yes.") for i in range(count)]))
    shares = {"large": {"count": 100}, "small": {"epochs": 10}, "rare": {"count": 1}}
    parts = [{"path": f"{name}.json"} | share for name, share in shares.items()]
    (tmp_path / "mixture.json").write_text(json.dumps({"mixture": parts}))
    mixture = open_mixture(tmp_path / "mixture.json")
    numbers = [number for seed in range(100) for number in draw_rows(mixture, 10, seed)]
    share = np.mean([n < 1000 for n in numbers])
    assert 0.44 < share < 0.56 and np.mean([n >= 1010 for n in numbers]) < 0.02
    everything = draw_rows(mixture, 10**6, 0)
    assert len(everything) == len(set(everything)) == 100 + 10 + 1
    assert {n for n in everything if 1000 <= n < 1010} == set(range(1000, 1010))


def test_mistakes_are_one_line_and_leave_nothing_behind(data, tmp_path):
    listed = sorted(tmp_path.iterdir())

    def mistake(match, *args):
        with pytest.raises(UserError, match=match) as caught:
            run(data, *args)
        assert "\n" not in str(caught.value)

    page = ("--model", GOLDEN, "-n", 1, "--out")
    mistake("--model, the directory of a model or of a tokenizer")
    mistake("no such model or tokenizer", "--model", tmp_path / "none")
    mistake("page.html: no such folder", *page, tmp_path / "none" / "page.html")
    mistake("something else than a page", *page, tmp_path)
    mistake("no row 25; the rows are 1 to 24", *page, tmp_path / "page.html", "--rows", 3, 25)
    mistake("--count is 0", *page, tmp_path / "page.html", "-n", 0)
    before = data.read_bytes()
    mistake("something else than a page; give --out another name", *page, data)
    assert data.read_bytes() == before and sorted(tmp_path.iterdir()) == listed


def test_an_earlier_page_stays_whole_when_the_disk_is_full(data, tmp_path, monkeypatch):
    output = tmp_path / "page.html"
    link = tmp_path / "link.html"
    link.symlink_to(output)
    assert run(data, "--model", GOLDEN, "-n", 1, "--out", output) == 0
    before = output.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(UserError, match="page.html: No space left on device; make room"):
            run(data, "--model", GOLDEN, "-n", 2, "--out", output)
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == [link, output]
    assert run(data, "--model", GOLDEN, "-n", 2, "--out", link) == 0
    assert output.read_bytes() != before and link.is_symlink()


def test_a_turned_image_and_an_answer_that_is_not_supervised(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    rows = [{"image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "purple", "loss": False},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "red"}]}]
    path = write_rows(tmp_path, rows)
    for options, size in (((), "50 × 20"), (("--exif",), "20 × 50")):
        assert run(path, "--model", GOLDEN, "--out", tmp_path / "page.html", *options) == 0
        page = (tmp_path / "page.html").read_text()
        assert f"original: {size}" in page
    supervised = re.findall(r'<span class="t l[^"]*"[^>]*>([^<]*)', page)
    assert "red" in "".join(supervised) and "purple" not in "".join(supervised) and "purple" in page
