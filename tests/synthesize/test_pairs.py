"""Stage-1 records from every kind of input, each pair once, and the filter's choice."""

import json
from collections import Counter

import pytest

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.errors import UserError
from llava_jax.prepare import __main__ as prepare
from llava_jax.prepare.check import Check
from llava_jax.synthesize import __main__ as synthesize

PAIRS = [{"id": f"{i:09d}", "image": f"GCC_train_{i:09d}.jpg", "caption": f"a dog on beach number {i}"}
         for i in range(200)]


def run(data, out, *options):
    assert synthesize.main(["pairs", str(data), "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def write(path, rows, lines):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n".join(f"Instruction {i}." for i in range(11)))
    return ["--questions", str(path)]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_rows_become_records(tmp_path, questions, lines, chat):
    rows = PAIRS
    if chat:
        rows = [{**row, "conversations": [{"from": "human", "value": "Old words\n<image>"},
                                          {"from": "gpt", "value": row["caption"]}], "caption": None} for row in PAIRS]
    records = run(write(tmp_path / "data.json", rows, lines), tmp_path / "out.json", *questions, "--prefix", "cc3m/")
    for record, row in zip(records, PAIRS, strict=True):
        assert (record["id"], record["image"]) == (row["id"], "cc3m/" + row["image"])
        assert record["conversations"][1] == {"from": "gpt", "value": row["caption"]}
    asked = Counter(record["conversations"][0]["value"].replace("<image>", "").strip() for record in records)
    assert len(asked) == 11 and min(asked.values()) > 5  # 18 expected of each
    before = sum(record["conversations"][0]["value"].startswith("<image>\n") for record in records)
    assert 70 < before < 130
    assert all(record["conversations"][0]["value"].count("<image>") == 1 for record in records)


def test_the_seed_decides(tmp_path, questions):
    data = write(tmp_path / "data.json", PAIRS, False)
    one, same, other = (run(data, tmp_path / f"{i}.json", *questions, "--seed", seed) for i, seed in enumerate("001"))
    assert one == same != other


def test_a_coco_file_gives_one_caption_of_every_image(tmp_path, questions):
    scenes.write(tmp_path, train=30, test=0)
    coco = json.loads((tmp_path / "annotations" / "captions_train.json").read_text())
    captions = {}
    for annotation in coco["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    records = run(tmp_path / "annotations" / "captions_train.json", tmp_path / "out.json", *questions)
    assert [record["image"] for record in records] == sorted(image["file_name"] for image in coco["images"])
    chosen = [captions[int(record["id"])].index(record["conversations"][1]["value"]) for record in records]
    assert len(set(chosen)) == 5
    check = Check(data=str(tmp_path / "out.json"), image_root=str(tmp_path / "train"), workers=0)
    assert check.run() == 0


def test_the_filter_keeps_what_prepare_filter_keeps(tmp_path, questions):
    rows = PAIRS + [{"id": i, "image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(
        ["a purple zeppelin"] * 3 + ["an odd gramophone", "seven violins"])]
    data = write(tmp_path / "data.jsonl", rows, True)
    assert prepare.main(["filter", str(data), str(tmp_path / "kept.jsonl"), "--workers", "0"]) == 0
    kept = [json.loads(line)["image"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    records = run(data, tmp_path / "out.json", *questions, "--filter", "--workers", "0")
    assert [record["image"] for record in records] == kept and 3 <= len(kept) < len(rows)


@pytest.mark.parametrize(("row", "words"), [
    ({"id": 1, "caption": "a dog"}, "row 201 .*: it names no image"),
    ({"image": 7, "caption": "a dog"}, "image must be the name of a file"),
    ({"image": "a.jpg"}, "neither caption nor conversations"),
    ({"image": "a.jpg", "caption": " "}, "the caption is empty"),
    ({"image": "a.jpg", "caption": "an <image>"}, "the caption holds <image>"),
    ({"image": "a.jpg", "caption": "a \0 dog"}, "the caption has a NUL"),
    ({"image": "a\0.jpg", "caption": "a dog"}, "image has a NUL"),
    ({"id": {"a": 1}, "image": "a.jpg", "caption": "a dog"}, "id is {'a': 1}; it must be text or a whole number"),
])
def test_bad_rows(tmp_path, questions, row, words):
    data = write(tmp_path / "data.jsonl", [*PAIRS, row], True)
    with pytest.raises(UserError, match=words):
        run(data, tmp_path / "out.json", *questions)
    assert not (tmp_path / "out.json").exists()
    assert len(run(data, tmp_path / "out.json", *questions, "--bad-rows", "skip")) == len(PAIRS)


def test_nothing_left(tmp_path, questions):
    one = write(tmp_path / "one.jsonl", [{"image": "a.jpg", "caption": "a dog"}], True)
    with pytest.raises(UserError, match="none of 1 pairs is left, for no phrase is in 3 of their captions"):
        run(one, tmp_path / "out.json", *questions, "--filter", "--workers", "0")
    bad = write(tmp_path / "bad.jsonl", [{"image": "a.jpg", "caption": " "}], True)
    with pytest.raises(UserError, match="none of 1 pairs is left$"):
        run(bad, tmp_path / "out.json", *questions, "--bad-rows", "skip")
    assert not (tmp_path / "out.json").exists()


def test_other_mistakes(tmp_path, questions):
    data = write(tmp_path / "data.jsonl", PAIRS, True)
    (tmp_path / "cc.tsv").write_text("a dog\thttp://h/1.jpg\n")
    new = tmp_path / "new.json"
    for source, out, options, words in [
        (tmp_path / "none.json", new, [], "no such file"), (tmp_path / "cc.tsv", new, [], "name no image files"),
        (data, data, [], "is the file that is read"), (data, tmp_path, [], "is a folder"),
        (data, new, ["--seed", "-1"], "--seed must be at least 0"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run(source, out, *questions, *options)
    run(data, tmp_path / "out.json", *questions)
    with pytest.raises(UserError, match="exists already; add --overwrite"):
        run(data, tmp_path / "out.json", *questions)
    run(data, tmp_path / "out.json", *questions, "--overwrite")
