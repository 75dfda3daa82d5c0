"""Packed rows against the records they are made of, one by one; order, resume and skips against plain enumeration."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.pipeline import BINS, SKIPS_PER_ROW, _finish_row, batches, count_rows, packed_rows
from llava_jax.data.records import REASONS, BadRow
from llava_jax.data.sources import Source
from llava_jax.images import prepare
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, encode_conversation
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer.model"
SIZE, PER_IMAGE, LENGTH, SLOTS = 14, 4, 160, 3


def png(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(5, 40, 2), 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_rows(folder: Path, count: int, seed: int = 0, images=(0, 1, 1, 1, 2)) -> list[dict]:
    """Rows with 0 to 2 images each, 1 or 2 questions, and answers of which no two are alike."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        names = [f"{number}-{k}.png" for k in range(rng.choice(images))]
        for name in names:
            (folder / name).write_bytes(png(rng))
        turns = []
        for turn in range(rng.integers(1, 3)):
            question = "<image>\n" * (len(names) if turn == 0 else 0) + "What is here?"
            answer = f"Row {number} of {seed}." + " It is red." * rng.integers(0, 3)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{seed}-{number}", "image": names, "conversations": turns})
    return rows


def write_file(folder: Path, rows: list[dict], name: str = "data.json") -> Source:
    (folder / name).write_text(json.dumps(rows))
    return Source(folder / name)


def settings(*sources: Source, **changes) -> dict:
    return {
        "sources": sources,
        "tokenizer": Tokenizer.load(TOKENIZER),
        "template": "vicuna_v1",
        "tokens_per_image": PER_IMAGE,
        "image_size": SIZE,
        "image_mode": "pad",
        "row_length": LENGTH,
        "images_per_row": SLOTS,
        "seed": 7,
        **changes,
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    return write_file(folder, write_rows(folder, 60))


def expected_example(source: Source, index: int) -> bytes:
    """Everything that a record must become, from the record alone."""
    record = source[index]
    example = encode_conversation(record.turns, "vicuna_v1", Tokenizer.load(TOKENIZER), PER_IMAGE)
    pixels = [prepare(Image.open(io.BytesIO(Path(path).read_bytes())), SIZE, "pad") for path in record.images]
    return pickle.dumps((example.tokens.tolist(), example.labels.tolist(), [p.tolist() for p in pixels]))


def examples_of(row: dict[str, np.ndarray]) -> list[bytes]:
    """Takes a row apart into its conversations, and checks that it holds nothing else."""
    segments, slots = row["segment_ids"], row["image_segment_ids"]
    found = []
    for number in range(1, segments.max() + 1):
        here = segments == number
        assert np.array_equal(row["positions"][here], np.arange(here.sum()))
        assert np.ptp(np.flatnonzero(here)) == here.sum() - 1
        pixels = [image[None].tolist() for image in row["images"][slots == number]]
        assert (row["tokens"][here] == IMAGE_TOKEN_ID).sum() == PER_IMAGE * len(pixels)
        found.append(pickle.dumps((row["tokens"][here].tolist(), row["labels"][here].tolist(), pixels)))
    padding = segments == 0
    assert not row["tokens"][padding].any() and (row["labels"][padding] == IGNORE).all()
    assert not row["images"][slots == 0].any() and set(slots) <= set(segments) | {0}
    visual = segments[row["tokens"] == IMAGE_TOKEN_ID]
    assert np.array_equal(visual, np.repeat(slots[slots > 0], PER_IMAGE))  # the k-th token belongs to the k-th image
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [{name: np.array(value) for name, value in next(iterator).items()} for _ in range(count)]


def skips(rows) -> dict[str, int]:
    found = np.concatenate([np.ravel(row["skipped"]) for row in rows])
    return {reason: int((found == 1 + index).sum()) for index, reason in enumerate(REASONS) if 1 + index in found}


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_record_of_every_epoch_is_in_some_row_exactly_once(source, epochs):
    rows = list(packed_rows(**settings(source, epochs=epochs)))
    found = [example for row in rows for example in examples_of(row)]
    assert sorted(found) == sorted([expected_example(source, i) for i in range(len(source))] * epochs)
    for row in rows:
        shapes = {name: (value.shape, str(value.dtype)) for name, value in row.items()}
        assert shapes == {
            "tokens": ((LENGTH,), "int32"),
            "labels": ((LENGTH,), "int32"),
            "positions": ((LENGTH,), "int32"),
            "segment_ids": ((LENGTH,), "int32"),
            "images": ((SLOTS, SIZE, SIZE, 3), "uint8"),
            "image_segment_ids": ((SLOTS,), "int32"),
            "skipped": ((SKIPS_PER_ROW,), "int32"),
        }
        assert not row["skipped"].any()


def test_rows_are_well_filled(source):
    """Conversations of 91 tokens and an image on average; filling one row at a time would reach 83 %."""
    rows = list(packed_rows(**settings(source, epochs=20, row_length=400, images_per_row=5)))
    assert np.mean([row["segment_ids"] > 0 for row in rows]) > 0.88


def order_of(source: Source, rows) -> list[int]:
    index = {expected_example(source, i): i for i in range(len(source))}
    return [index[example] for row in rows for example in examples_of(row)]


def test_shuffle_is_global_seeded_and_new_in_every_epoch(tmp_path):
    count = 200  # well beyond what packing alone moves about
    source = write_file(tmp_path, write_rows(tmp_path, count, images=[0]))

    def order(seed: int, epochs: int) -> np.ndarray:
        return np.array(order_of(source, packed_rows(**settings(source, seed=seed, epochs=epochs))))

    first = order(7, epochs=1)
    assert np.array_equal(first, order(7, epochs=1)) and not np.array_equal(first, order(8, epochs=1))
    # Two random orders put a record a third of the epoch apart on average.
    assert np.abs(first - np.arange(count)).mean() > count / 5
    both = order(7, epochs=2)
    places = np.array([np.flatnonzero(both == record) for record in range(count)])
    assert np.abs(places[:, 0] - (places[:, 1] - count)).mean() > count / 5


def test_without_shuffle_records_keep_their_order_up_to_packing(source):
    order = order_of(source, packed_rows(**settings(source, shuffle=False, epochs=1)))
    assert order[0] == 0 and sorted(order) == list(range(len(source)))
    assert np.abs(order - np.arange(len(source))).max() < 2 * BINS  # the rows filled side by side hold two each


def test_several_sources_are_one_data_set(tmp_path):
    sources = [write_file(tmp_path, write_rows(tmp_path, n, seed=n), f"{n}.json") for n in (9, 1, 5)]
    rows = packed_rows(**settings(*sources, epochs=1))
    found = sorted(example for row in rows for example in examples_of(row))
    assert found == sorted(expected_example(source, i) for source in sources for i in range(len(source)))


def test_workers_import_neither_jax_nor_grain():
    code = "import sys, llava_jax.data.examples; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_do_not_depend_on_the_number_of_workers(source, workers):
    here = list(packed_rows(**settings(source, epochs=2)))
    there = list(packed_rows(**settings(source, epochs=2, workers=workers)))
    assert len(here) == len(there) and all(map(same, here, there))


def test_processes_share_an_epoch_without_overlap(source):
    found, counts = [], []
    for process in range(3):
        rows = list(packed_rows(**settings(source, epochs=1, process_index=process, process_count=3)))
        found += [example for row in rows for example in examples_of(row)]
        counts.append(len(rows))
    assert sorted(found) == sorted(expected_example(source, i) for i in range(len(source)))
    assert counts == [count_rows(**settings(source, process_index=process, process_count=3)) for process in range(3)]


RESUMES = [(0, 0, 0), (1, 0, 0), (17, 0, 0), (40, 0, 0), (17, 2, 2), (5, 2, 0)]


@pytest.mark.parametrize("stop, before, after", RESUMES)
def test_resume_is_bit_identical(source, before, after, stop):
    """Also with another number of workers, and through JSON, as the checkpoint keeps it."""
    straight = take(iter(batches(2, **settings(source))), stop + 12)
    iterator = iter(batches(2, **settings(source, workers=before)))
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = iter(batches(2, **settings(source, workers=after)))
    resumed.set_state(state)
    assert all(map(same, take(resumed, 12), straight[stop:]))
    resumed.set_state(state)  # an iterator in use can be set back too
    assert same(next(resumed), straight[stop])
    resumed.close()


def test_resume_in_another_process(source, tmp_path):
    iterator = iter(batches(2, **settings(source)))
    take(iterator, 11)
    state = json.dumps(iterator.get_state())
    code = """
import sys; sys.path[:0] = sys.argv[1:2]
from test_pipeline import *
rows = iter(batches(2, **settings(Source(sys.argv[2]))))
rows.set_state(json.loads(sys.argv[3]))
np.savez(sys.argv[4], **{f"{i}-{name}": value for i, row in enumerate(take(rows, 5)) for name, value in row.items()})
"""
    out = tmp_path / "rows.npz"
    subprocess.run([sys.executable, "-c", code, Path(__file__).parent, source.path, state, out], check=True)
    with np.load(out) as there:
        for i, row in enumerate(take(iterator, 5)):
            assert all(np.array_equal(there[f"{i}-{name}"], value) for name, value in row.items())


def spoil(rows: list[dict], folder: Path) -> dict[str, list[int]]:
    """Makes some rows bad, in every way; -> the places of each reason's rows."""
    (folder / "broken.png").write_bytes(png(np.random.default_rng(0))[:60])
    ask, answer = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
    text = {"from": "human", "value": "What?"}
    bad = {
        "malformed": {"conversations": "none"},
        "missing_image": {"image": "nowhere.png", "conversations": [ask, answer]},
        "broken_image": {"image": "broken.png", "conversations": [ask, answer]},
        "image_count": {"conversations": [ask, answer]},
        "no_supervised_tokens": {"conversations": [text]},
        "too_long": {"conversations": [text, {"from": "gpt", "value": "word " * 2 * LENGTH}]},
    }
    places = {}
    for number, (reason, row) in enumerate(bad.items()):
        places[reason] = list(range(number, len(rows), 11 + number))
        for place in places[reason]:
            rows[place] = {"id": place, **row}
    taken = {}
    for reason, indices in places.items():  # a later reason overwrites an earlier one
        taken |= {index: reason for index in indices}
    return {reason: [index for index in taken if taken[index] == reason] for reason in bad}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt")
    rows = write_rows(folder, 80)
    places = spoil(rows, folder)
    return write_file(folder, rows), places


@pytest.mark.parametrize("workers", [0, 2])
def test_every_skip_is_counted_once_with_its_reason(spoilt, workers):
    source, places = spoilt
    rows = list(packed_rows(**settings(source, epochs=2, bad_rows="skip", workers=workers)))
    assert skips(rows) == {reason: 2 * len(places[reason]) for reason in REASONS}
    good = set(range(len(source))) - {index for indices in places.values() for index in indices}
    found = [example for row in rows for example in examples_of(row)]
    assert sorted(found) == sorted([expected_example(source, index) for index in good] * 2)


def test_skips_are_counted_exactly_across_a_resume(spoilt):
    source, places = spoilt
    rows = settings(source, epochs=4, bad_rows="skip")
    iterator = iter(packed_rows(**rows))
    before = take(iterator, 23)
    state, iterator = iterator.get_state(), iter(packed_rows(**rows))
    iterator.set_state(state)
    assert skips([*before, *iterator]) == {reason: 4 * len(indices) for reason, indices in places.items()}


@pytest.mark.parametrize("reason, workers", [*[(reason, 0) for reason in REASONS], ("missing_image", 2)])
def test_a_bad_row_stops_with_its_one_line(reason, workers, tmp_path):
    rows = write_rows(tmp_path, 40)
    place = spoil(list(rows), tmp_path)[reason][0]
    bad = list(rows)
    spoil(bad, tmp_path)
    rows[place] = bad[place]
    source = write_file(tmp_path, rows)
    with pytest.raises(BadRow, match=rf"data.json, row {place + 1} \(line 1\), id {place}: ") as raised:
        list(packed_rows(**settings(source, epochs=1, workers=workers)))
    assert raised.value.reason == reason and "\n" not in str(raised.value)


def test_too_many_images_for_a_row(tmp_path):
    source = write_file(tmp_path, write_rows(tmp_path, 3, images=[SLOTS + 1]))
    with pytest.raises(BadRow, match=r"4 images do not fit into the 3 slots of a row") as raised:
        next(iter(packed_rows(**settings(source))))
    assert raised.value.reason == "too_long"


def test_an_image_in_a_turn_that_is_not_used(tmp_path):
    row = write_rows(tmp_path, 1, images=[1])[0]
    row["conversations"].insert(0, {"from": "gpt", "value": "<image>"})
    row["conversations"][1]["value"] = "What is here?"
    with pytest.raises(BadRow, match="1 images, but 0 in the turns that are used") as raised:
        next(iter(packed_rows(**settings(write_file(tmp_path, [row])))))
    assert raised.value.reason == "image_count"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_bad_rows_alone_ends_in_an_error(tmp_path, workers):
    source = write_file(tmp_path, [{"id": n, "conversations": []} for n in range(5)])
    with pytest.raises(ValueError, match="none of the first 5 rows can be used, .*: .*data.json, row .* conversations"):
        packed_rows(**settings(source, bad_rows="skip", workers=workers))


def test_one_good_row_among_many_bad_ones_is_enough(tmp_path):
    rows = [{"id": n, "conversations": []} for n in range(400)]
    rows[123] = write_rows(tmp_path, 1, images=[1])[0]
    source = write_file(tmp_path, rows)
    found = list(packed_rows(**settings(source, bad_rows="skip", epochs=1)))
    assert skips(found) == {"malformed": 399}
    assert [example for row in found if row["segment_ids"].any() for example in examples_of(row)] == [
        expected_example(source, 123)
    ]


def test_fewer_rows_than_processes(source, tmp_path):
    small = write_file(tmp_path, write_rows(tmp_path, 2))
    with pytest.raises(ValueError, match="data.json: 2 rows for 3 processes"):
        packed_rows(**settings(small, process_count=3))


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_data_sets_repeat_for_ever(tmp_path, count):
    source = write_file(tmp_path, write_rows(tmp_path, count))
    iterator = iter(packed_rows(**settings(source, process_index=count - 1, process_count=count)))
    assert len(order_of(source, take(iterator, 20))) >= 20


def test_batches_stack_rows_and_fill_up_the_last(source):
    rows = list(packed_rows(**settings(source, epochs=1)))
    size = next(n for n in (4, 5, 7) if len(rows) % n)
    made = list(batches(size, **settings(source, epochs=1)))
    assert len(made) == -(-len(rows) // size)
    for number, row in enumerate(rows):
        assert same({name: value[number % size] for name, value in made[number // size].items()}, row)
    for empty in range(len(rows) % size, size):
        last = {name: value[empty] for name, value in made[-1].items()}
        assert (last.pop("labels") == IGNORE).all() and not any(value.any() for value in last.values())


def test_count_rows_opens_no_image(spoilt, monkeypatch):
    source, places = spoilt
    rows = settings(source, bad_rows="skip")
    monkeypatch.setattr("llava_jax.data.examples.open_image", lambda path: pytest.fail("an image was opened"))
    counted = list(packed_rows(**rows, epochs=1, decode_images=False))
    assert count_rows(**rows) == len(counted)
    assert skips(counted) == {reason: len(places[reason]) for reason in REASONS if reason != "broken_image"}


def test_mixed_up_images_are_noticed(source):
    row = next(row for row in packed_rows(**settings(source)) if row["image_segment_ids"].max() > 1)
    packed = {
        "tokens": row["tokens"], "labels": row["labels"], "tokens_positions": row["positions"],
        "tokens_segment_ids": row["segment_ids"], "images": row["images"], "skipped": row["skipped"],
    }  # fmt: skip
    assert same(_finish_row({**packed, "images_segment_ids": row["image_segment_ids"]}, PER_IMAGE), row)
    with pytest.raises(RuntimeError, match="mixed up"):
        _finish_row({**packed, "images_segment_ids": row["image_segment_ids"][::-1]}, PER_IMAGE)
