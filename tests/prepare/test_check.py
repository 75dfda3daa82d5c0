"""Every kind of bad row found with its place, none where there is none, and figures against brute force."""

import errno
import json
import os
import re
import shutil
import statistics

import numpy as np
import pytest
from check_data import (
    DEFECTS,
    IMAGES,
    TOKENIZER,
    row,
    run,
    turns,
    write,
)
from conftest import make_data

from llava_jax.data.examples import DataSpec
from llava_jax.data.packing import pack
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture, open_source
from llava_jax.images import ImageProcessor
from llava_jax.prepare import audit as audit_module
from llava_jax.prepare.audit import audit
from llava_jax.prepare.findings import KINDS, ROW, Checker, Words, separators
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, NoSupervisedTokens, encode_conversation
from llava_jax.text.templates import TEMPLATES, spans
from llava_jax.text.tokenizer import Tokenizer


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
    monkeypatch.setattr(audit_module, "TASK_ROWS", 7)
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
    _, report = run(path, settings, max_length=limit, batch_size=7)
    tokens = report["tokens"]
    learned = sum(int((examples[i].labels != IGNORE).sum()) for i in good)
    assert (tokens["total"], tokens["supervised"]) == (sum(lengths), learned)
    assert tokens["supervised_share"] == learned / sum(lengths)
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
        "sequence_length": limit, "tiles_per_sequence": 2,
        "sequences": len(packed), "batch_size": 7, "steps": len(packed) // 7,
        "token_fill": sum(lengths) / len(packed) / limit, "tile_fill": sum(images) / len(packed) / 2}
    spec = DataSpec(mixture=open_mixture(path), **vars(settings), sequence_length=limit, tiles_per_sequence=2,
                    bad_rows="skip")
    assert Batches(spec, 7).count_rows() == len(packed)


def test_an_epoch_of_a_mixture_packs_as_often_as_it_is_read(tmp_path, with_tokens, monkeypatch):
    make_data(tmp_path, 200)
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"mixture": [{"path": "data.json", "epochs": 30}]}))
    whole = run(path, with_tokens, max_length=1900, tiles_per_sequence=8)[1]["packing"]
    mixture = open_mixture(path)
    rows = audit(Checker(mixture.sources, with_tokens, 1900, 8), mixture, 0).rows
    assert whole["sequences"] == len(pack(np.tile(rows["tokens"], 30), np.tile(rows["images"], 30), 1900, 8))
    monkeypatch.setattr(audit_module, "PACKED_RECORDS", 1500)  # a quarter of the epoch
    part = run(path, with_tokens, max_length=1900, tiles_per_sequence=8)[1]["packing"]
    assert part["token_fill"] != whole["token_fill"] == pytest.approx(part["token_fill"], rel=0.03)
    assert part["sequences"] == pytest.approx(whole["sequences"], rel=0.03)


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
    assert [(f.row, f.message) for f in found] == [(2, "turn 2 contains '[PAD]', turn 2 contains '<s>'")]


@pytest.mark.parametrize("mode, refused", [("crop", 1), ("pad", 0)])
def test_images_that_grow_too_large_in_one_mode_only(mode, refused, tmp_path):
    path = write(tmp_path, [row(1, image="strip.png"), row(2, image="wide.png")])
    found, _ = run(path, Settings(processor=ImageProcessor(mode=mode)))
    assert [finding.kind for finding in found] == ["broken_image"] * refused
    assert all("1 x 3000 pixels is too elongated to resize" in finding.message for finding in found)


def test_an_image_that_decodes_for_ever(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("llava_jax.image_files.time.monotonic", lambda: next(clock))
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
        learns = any(span.supervised for span in spans(pairs, TEMPLATES[template]))
        try:
            example = encode_conversation(conversation, template, Words(), 1)
        except NoSupervisedTokens:
            assert not learns
        else:
            assert learns and (example.tokens == -200).sum() == rounds


def test_a_row_takes_32_bytes():
    assert ROW.itemsize <= 32
