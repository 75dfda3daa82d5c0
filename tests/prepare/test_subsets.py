"""Parts, samples and mixtures: complete, disjoint, the same wherever and however often they are made."""

import base64
import json
import os
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llava_jax import cli
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, open_mixture, open_source
from llava_jax.errors import UserError
from llava_jax.prepare import ranking
from llava_jax.prepare.check import Check
from llava_jax.prepare.ranking import mix_rows, sample_rows, split_rows
from llava_jax.prepare.subsets import Mix, Sample, Split


def row(number, images=(), text="Yes"):
    question = "<image>\n" * len(images) + f"Question {number}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return {"id": number, "conversations": turns} | ({"image": list(images)} if images else {})


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows))
    return str(path)


def ids(path):
    source = open_source(path)
    return [source.row(i)["id"] for i in range(len(source))]


def some_rows(count, seed=0):
    """Rows of which a fifth has no image, most have one of a few, and some tie two images together."""
    rng = np.random.default_rng(seed)
    return [row(i, [f"{k}.jpg" for k in rng.choice(count // 3, rng.choice(3, p=(0.2, 0.7, 0.1)), replace=False)])
            for i in range(count)]


def run(kind, *args):
    return cli.parse(kind, [str(arg) for arg in args], prog="prepare").run()


# Samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "data.json", some_rows(600))


def sample(data, out, *args):
    assert run(Sample, data, out, "--workers", 0, *args) == 0
    return ids(out)


def test_samples_are_nested_and_keep_the_order(data, tmp_path):
    smaller: set = set()
    for count in (1, 10, 100, 599, 600):
        found = sample(data, tmp_path / f"{count}.json", "--count", count)
        assert len(found) == count and found == sorted(set(found)) and smaller < set(found)
        smaller = set(found)


def test_a_seed_gives_the_same_sample_for_ever(data, tmp_path):
    first = sample(data, tmp_path / "a.jsonl", "--fraction", 0.01)
    assert first == [23, 38, 103, 214, 272, 410]  # also in years: other hashes would be other subsets
    assert run(Sample, data, tmp_path / "b.json", "--count", 6, "--workers", 2) == 0
    assert ids(tmp_path / "b.json") == first
    assert sample(data, tmp_path / "c.json", "--count", 6, "--seed", 1) != first


def test_order_and_additions_do_not_matter(tmp_path):
    rows = some_rows(600)
    old = sample(write(tmp_path / "old.json", rows), tmp_path / "a.json", "--count", 100)
    shuffled = sample(write(tmp_path / "shuffled.jsonl", rows[::-1]), tmp_path / "b.json", "--count", 100)
    assert sorted(shuffled) == old
    more = rows[:300] + [row(1000 + i) for i in range(60)] + rows[300:]
    new = sample(write(tmp_path / "more.json", more), tmp_path / "c.json", "--count", 100)
    added = [i for i in new if i >= 1000]
    assert 0 < len(added) < 25 and len(set(old) - set(new)) == len(added)  # each pushes one out


def test_every_row_is_as_likely(tmp_path):
    source = open_source(write(tmp_path / "data.json", some_rows(40)))
    taken = np.zeros(40)
    for seed in range(400):
        _, hashes = ranking.Ranker(Mixture((source,), (len(source),)), seed, "row")(range(40))
        taken[sample_rows(np.array(hashes, np.uint64), 10)] += 1
    assert abs(taken - 100).max() < 4.5 * np.sqrt(400 * 0.25 * 0.75)


def test_equal_rows_are_counted_each(tmp_path):
    data = write(tmp_path / "data.json", [row(7)] * 9 + [row(8)] * 3)
    assert len(sample(data, tmp_path / "out.json", "--count", 7)) == 7


def test_excluded_rows(tmp_path, capsys):
    data = write(tmp_path / "data.json", some_rows(20))
    bad = tmp_path / "bad.jsonl"
    findings = [{"source": os.path.relpath(data), "row": 3, "kind": "missing_image", "message": "gone"},
                {"source": data, "row": 20}, {"source": data, "row": 3, "kind": "too_long"},
                {"source": data, "row": 5, "kind": "duplicate_id"}]
    bad.write_text("".join(json.dumps(found) + "\n" for found in findings))
    assert sample(data, tmp_path / "a.json", "--fraction", 1, "--exclude", bad) == [
        i for i in range(20) if i not in (2, 19)]
    assert "2 of 20 rows are left out" in capsys.readouterr().out
    assert sample(data, tmp_path / "b.json", "--fraction", 1, "--exclude", bad, "--exclude-kinds", "duplicate_id") == [
        i for i in range(20) if i not in (4, 19)]
    with pytest.raises(UserError, match="--exclude-kinds missing: there is no such kind"):
        sample(data, tmp_path / "c.json", "--fraction", 1, "--exclude", bad, "--exclude-kinds", "missing")
    lines = {'{"source": "other.json", "row": 1}': "line 1: there is no row 1 of other.json",
             json.dumps({"source": data, "row": 21}): "line 1: there is no row 21",
             json.dumps({"source": data, "row": 0}): "line 1: there is no row 0",
             '{"source": 3, "row": 1}': "line 1: not what", "[]": "line 1: not what", "x": "line 1: not what"}
    for line, says in lines.items():
        bad.write_text(line)
        with pytest.raises(UserError, match=says):
            sample(data, tmp_path / "c.json", "--fraction", 1, "--exclude", bad)


def test_rows_of_a_file_that_is_read_twice_are_excluded_twice(tmp_path):
    data = write(tmp_path / "data.json", [row(i) for i in range(3)])
    (tmp_path / "bad").write_text(json.dumps({"source": data, "row": 2, "kind": "malformed"}))
    run(Mix, tmp_path / "twice.json", data, f"{data},epochs=2")
    found = sample(tmp_path / "twice.json", tmp_path / "out.json", "--fraction", 1, "--exclude", tmp_path / "bad")
    assert found == [0, 2, 0, 2]


def test_a_row_that_cannot_be_read_is_named_and_can_be_excluded(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row(0)) + '\n{"id": \n' + json.dumps(row(2)))
    with pytest.raises(UserError, match=r"row 2 \(line 2\): broken JSON .*; leave it out with --exclude"):
        sample(data, tmp_path / "out.json", "--count", 2)
    assert os.listdir(tmp_path) == ["data.jsonl"]
    (tmp_path / "bad").write_text(json.dumps({"source": str(data), "row": 2, "kind": "malformed"}))
    assert sample(data, tmp_path / "out.json", "--count", 2, "--exclude", tmp_path / "bad") == [0, 2]


@pytest.mark.parametrize("args, says", [
    ([], "give either --count"), (["--count", 3, "--fraction", 0.5], "give either"), (["--count", -3], "give either"),
    (["--fraction", 1.5], "give either"), (["--count", 601], "601 rows are to be taken of 600"),
    (["--fraction", 0.0001], "0 rows are to be taken of 600"),
])
def test_wrong_sizes(args, says, data, tmp_path):
    with pytest.raises(UserError, match=says):
        run(Sample, data, tmp_path / "out.json", *args)


# Parts


def split(data, out, *args):
    assert run(Split, data, out, "--workers", 0, *args) == 0
    return {path.stem: ids(path) for path in sorted(out.iterdir())}


def images_of(rows, numbers):
    return {image for i in numbers for image in rows[i].get("image", ())}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parts", ["train=0.9,test=0.1", "a=0.5,b=100,c=rest", "a=20,b=rest", "a=.333,b=.333,c=.334"])
def test_parts_are_complete_and_share_no_image(parts, seed, tmp_path):
    rows = some_rows(600, seed)
    found = split(write(tmp_path / "data.json", rows), tmp_path / "out", "--parts", parts, "--seed", seed)
    assert set(found) == {part.split("=")[0] for part in parts.split(",")}
    assert sorted(sum(found.values(), [])) == list(range(600))
    assert sum(len(images_of(rows, numbers)) for numbers in found.values()) == len(images_of(rows, range(600)))
    for numbers in found.values():
        assert numbers == sorted(numbers)


def test_shares_are_met(tmp_path):
    data = write(tmp_path / "data.json", [row(i, [f"{i // 3}.jpg"]) for i in range(3000)])
    found = split(data, tmp_path / "a", "--parts", "a=0.7,b=0.2,c=0.1")
    assert [len(numbers) for numbers in found.values()] == pytest.approx([2100, 600, 300], abs=2)
    found = split(data, tmp_path / "b", "--parts", "a=0.7,b=201,c=rest", "--by", "row")
    assert [len(numbers) for numbers in found.values()] == [2100, 201, 699]


def test_rows_about_one_image_part_only_by_row(tmp_path):
    rows = [row(i, [f"{i // 3}.jpg"]) for i in range(300)]
    data = write(tmp_path / "data.json", rows)
    found = split(data, tmp_path / "a", "--parts", "a=0.5,b=0.5", "--by", "row")
    assert images_of(rows, found["a"]) & images_of(rows, found["b"])


def test_parts_do_not_depend_on_place_or_order(tmp_path):
    rows = some_rows(600)
    first = split(write(tmp_path / "a/data.json", rows), tmp_path / "a/out", "--parts", "a=0.8,b=0.2")
    moved = write(tmp_path / "elsewhere/b/data.jsonl", rows[::-1])
    other = split(moved, tmp_path / "b", "--parts", "a=0.8,b=0.2", "--image-root", tmp_path / "images", "--workers", 2)
    assert {part: sorted(numbers) for part, numbers in other.items()} == first
    again = split(moved, tmp_path / "c", "--parts", "a=0.8,b=0.2", "--seed", 1)
    assert {part: sorted(numbers) for part, numbers in again.items()} != first


def test_few_rows_change_parts_when_rows_are_added(tmp_path):
    rows = [row(i, [f"{i // 2}.jpg"]) for i in range(1000)]
    old = split(write(tmp_path / "a.json", rows), tmp_path / "a", "--parts", "a=0.8,b=0.2")
    more = write(tmp_path / "b.json", rows + [row(2000 + i) for i in range(100)])
    new = split(more, tmp_path / "b", "--parts", "a=0.8,b=0.2")
    assert len(set(old["b"]) - set(new["b"])) + len(set(new["b"]) & set(old["a"])) < 30


def test_the_same_image_in_two_sources(tmp_path):
    rows = [row(i, [f"{i}.jpg"]) for i in range(50)]
    write(tmp_path / "coco/a.json", rows)
    write(tmp_path / "b.json", [row(100 + i, [f"coco/{i}.jpg"]) for i in range(50)])
    run(Mix, tmp_path / "both.json", tmp_path / "coco/a.json", tmp_path / "b.json")
    found = split(tmp_path / "both.json", tmp_path / "out", "--parts", "a=0.5,b=0.5")
    assert len(found["a"]) == len(found["b"]) == 50
    assert {i % 100 for i in found["a"]}.isdisjoint(i % 100 for i in found["b"])
    source = open_source(tmp_path / "out/a.json", tmp_path)
    assert {source[i].images for i in range(50)} == {(f"{tmp_path}/coco/{i % 100}.jpg",) for i in found["a"]}


@pytest.mark.parametrize("parts, says", [
    ("train", "'train' must be a new name"), ("a=0.5,a=0.5", "'a=0.5' must be a new name"), ("a=x", "'a=x' must be"),
    ("a=../x", "must be"), ("../a=0.5,b=0.5", "must be"), ("a=rest,b=rest", "only one part can be the rest"),
    ("a=0.5,b=0.4", "these are 540 of 600 rows; shares must sum to 1"), ("a=0.5,b=0.6", "these are 660 of 600"),
    ("a=601,b=rest", "these are 601 of 600"), ("a=1.0,b=rest", "b would get no row of 600"),
    ("a=0.9999,b=0.0001", "b would get no row"),
])
def test_wrong_parts(parts, says, data, tmp_path):
    with pytest.raises(UserError, match=says):
        run(Split, data, tmp_path / "out", "--parts", parts, "--workers", 0)
    assert not (tmp_path / "out").exists()


# Mixtures


@pytest.fixture
def three(tmp_path):
    write(tmp_path / "sets/a.json", [row(i) for i in range(10)])
    write(tmp_path / "sets/b.jsonl", [row(100 + i, ["1.jpg"]) for i in range(20)])
    write(tmp_path / "c.json", [row(200 + i, ["c/2.jpg"]) for i in range(30)])
    return tmp_path


def test_a_mixture_file_can_be_moved_with_its_data(three, capsys):
    out = three / "mixes/mix.json"
    assert run(Mix, out, three / "sets/a.json,epochs=2", f"{three}/sets/b.jsonl,count=5,image_root={three}/images",
               three / "c.json,epochs=0.5") == 0
    assert json.loads(out.read_text()) == {"mixture": [
        {"path": "../sets/a.json", "epochs": 2}, {"path": "../sets/b.jsonl", "count": 5, "image_root": "../images"},
        {"path": "../c.json", "epochs": 0.5}]}
    assert "40 rows in an epoch" in capsys.readouterr().out
    moved = three.parent / f"{three.name}_moved"
    three.rename(moved)
    mixture = open_mixture(moved / "mixes/mix.json")
    assert mixture.counts == (20, 5, 15)
    assert os.path.normpath(mixture.sources[1][0].images[0]) == str(moved / "images/1.jpg")


def test_weights(three):
    run(Mix, three / "mix.json", three / "sets/a.json,weight=1", three / "c.json,weight=0.25")
    assert open_mixture(three / "mix.json").counts == (32, 8)


@pytest.mark.parametrize("parts, says", [
    (["a.json,epochs=x"], "part .*a.json,epochs=x: epochs must be a number, not 'x'"),
    (["a.json,epochs=1,epochs=2"], "epochs is given twice"),
    (["a.json,epochs=1,count=2"], "give one of epochs and count"),
    (["a.json,count=1.5"], "count must be a positive whole number"), (["a.json,epochs=0.01"], "gives no row"),
    (["a.json,weight=1", "b.jsonl"], "has no weight"), (["none.json"], "no such data file"),
])
def test_wrong_mixtures(parts, says, three):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as raised:
        run(Mix, three / "sets/mix.json", *(three / "sets" / part for part in parts))
    assert ".tmp" not in str(raised.value)
    assert sorted(os.listdir(three / "sets")) == ["a.json", "b.jsonl"]


def test_a_materialised_mixture_holds_what_the_mixture_file_says(three, capsys):
    parts = [f"{three}/sets/a.json,epochs=3.5", f"{three}/sets/b.jsonl,count=7", f"{three}/c.json,image_root={three}/c"]
    assert run(Mix, three / "all.jsonl", *parts, "--materialise", "--workers", 0) == 0
    assert f"--image-root {three}\n" in capsys.readouterr().out
    found = Counter(ids(three / "all.jsonl"))
    assert sum(found.values()) == 35 + 7 + 30
    assert {found[i] for i in range(10)} == {3, 4} and sum(found[i] for i in range(10)) == 35
    assert sum(found[100 + i] for i in range(20)) == 7 != sum(found[100 + i] for i in range(7))
    assert {found[200 + i] for i in range(30)} == {1}
    source = open_source(three / "all.jsonl", three)
    images = {source[i].images for i in range(len(source))}
    assert images == {(), (f"{three}/sets/1.jpg",), (f"{three}/c/c/2.jpg",)}
    assert run(Mix, three / "again.jsonl", *parts, "--materialise") == 0
    assert (three / "again.jsonl").read_bytes() == (three / "all.jsonl").read_bytes()
    assert run(Mix, three / "other.jsonl", *parts, "--materialise", "--workers", 0, "--seed", 1) == 0
    assert ids(three / "other.jsonl") != ids(three / "all.jsonl")


def test_the_mixed_order_is_mixed():
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 2**64, 1000, np.uint64), np.full(500, 7, np.uint64)]  # the second: equal rows
    order = mix_rows(hashes, (2000, 1000))
    counts = np.bincount(order)
    assert counts.tolist() == [2] * 1500
    place = np.arange(3000)
    for rows in (order < 1000, order >= 1000):  # the mean place of n of N shuffled things: a known spread
        spread = np.sqrt((3000**2 / 12) / rows.sum() * (1 - rows.sum() / 3000))
        assert abs(place[rows].mean() - 1499.5) < 4 * spread
    neighbours = np.mean((order[1:] >= 1000) == (order[:-1] >= 1000))
    assert abs(neighbours - 5 / 9) < 4 * np.sqrt(5 / 9 * 4 / 9 / 3000)


def test_formats_do_not_mix_in_one_file(three):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    write(three / "chat.jsonl", [chat] * 5)
    with pytest.raises(UserError, match="of one format, and these have conversations and messages; make a mix"):
        run(Mix, three / "all.jsonl", three / "c.json", three / "chat.jsonl", "--materialise", "--workers", 0)
    run(Mix, three / "mix.json", three / "c.json", three / "chat.jsonl")
    assert open_mixture(three / "mix.json").counts == (30, 5)


def test_names_of_turns_do_not_mix_in_one_file(tmp_path):
    first, second = row(1), row(2)
    second["conversation"] = second.pop("conversations")
    parts = [write(tmp_path / f"{i}.json", [rows]) for i, rows in enumerate((first, second))]
    with pytest.raises(UserError, match="a file holds rows of one format"):
        run(Mix, tmp_path / "all.json", *parts, "--materialise", "--workers", 0)


def test_a_mixture_file_keeps_its_name(three):
    with pytest.raises(UserError, match="mix.jsonl: the name of a mixture file must end in .json"):
        run(Mix, three / "mix.jsonl", three / "c.json")
    with pytest.raises(UserError, match="c.json: is read as part of"):
        run(Mix, three / "c.json", three / "c.json", "--overwrite")
    assert len(ids(three / "c.json")) == 30


def test_split_rows_by_hand():
    rows, hashes = np.array([0, 1, 1, 2, 3, 4]), np.array([5, 5, 9, 9, 1, 7], np.uint64)  # 0, 1 and 2 belong together
    assert split_rows(rows, hashes, (1, 4)).tolist() == [1, 1, 1, 0, 1]
    assert split_rows(rows, hashes, (4, 1)).tolist() == [0, 0, 0, 0, 1]
    assert split_rows(rows, hashes, (2, 3)).tolist() == [1, 1, 1, 0, 1]


def test_bad_rows_that_can_be_read_stay(tmp_path):
    rows = [row(0), {"id": 1, "conversations": []}, row(2, ["x.jpg"]) | {"image": None}, {"id": 3}]
    data = write(tmp_path / "data.json", rows)
    assert sample(data, tmp_path / "out.json", "--fraction", 1) == [0, 1, 2, 3]
    with pytest.raises(BadRow):
        open_source(tmp_path / "out.json")[1]


def test_images_in_parts_keep_rows_together_too(tmp_path):
    """Embedded in the row as base64, or as a data: URL."""
    for key in ("base64", "url"):
        rows = []
        for number in range(40):
            content = base64.b64encode(bytes([number % 5]) * 9).decode()
            part = {"type": "image", key: content if key == "base64" else f"data:;base64,{content}"}
            turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Yes"}]
            rows.append({"id": number, "messages": turns})
        split(write(tmp_path / f"{key}.json", rows), tmp_path / key, "--parts", "a=0.5,b=0.5")
        parts = [json.loads(part.read_text()) for part in (tmp_path / key).iterdir()]
        seen = [{row["messages"][0]["content"][0][key] for row in part} for part in parts]
        assert len(seen) == 2 and not seen[0] & seen[1] and len(seen[0] | seen[1]) == 5


def test_rows_of_a_folder_of_shards_are_excluded(tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    for shard in range(2):
        rows = [{"id": str(2 * shard + i), "messages": turns if i else turns[1:]} for i in range(2)]
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / f"data/train-0000{shard}-of-00002.parquet")
    assert run(Check, tmp_path / "data", "--bad-rows", tmp_path / "bad.jsonl", "--workers", 0) == 1
    out = tmp_path / "good.jsonl"
    run(Sample, tmp_path / "data", out, "--fraction", 1, "--exclude", tmp_path / "bad.jsonl")
    assert ids(out) == ["1", "3"]
