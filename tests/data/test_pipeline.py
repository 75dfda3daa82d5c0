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
from pipeline_data import (
    LENGTH,
    PER_IMAGE,
    PROCESSOR,
    SIZE,
    SLOTS,
    TOKENIZER,
    packed_rows,
    png,
    settings,
    write_file,
    write_rows,
)

from llava_jax.data import pipeline
from llava_jax.data.pipeline import Batches
from llava_jax.data.records import REASONS, BadRow
from llava_jax.data.sources import Mixture, Source
from llava_jax.errors import UserError
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, encode_conversation
from llava_jax.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Several windows an epoch, in this process (order and packing are not the workers' work)."""
    monkeypatch.setattr(pipeline, "WINDOW", 32)
    monkeypatch.setattr(pipeline, "TASK_RECORDS", 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    return write_file(folder, write_rows(folder, 60))


def expected_example(source: Source, index: int) -> bytes:
    """Everything that a record must become, from the record alone."""
    record = source[index]
    example = encode_conversation(record.turns, "vicuna_v1", Tokenizer.load(TOKENIZER), PER_IMAGE)
    pixels = [PROCESSOR(Image.open(io.BytesIO(Path(path).read_bytes()))) for path in record.images]
    return pickle.dumps((example.tokens.tolist(), example.labels.tolist(), [p.tolist() for p in pixels]))


def examples_of(row: dict[str, np.ndarray]) -> list[bytes]:
    """Takes a row apart into its conversations, and checks that it holds nothing else."""
    segments, slots = row["segment_ids"], row["tile_segment_ids"]
    found = []
    for number in range(1, segments.max() + 1):
        here = segments == number
        assert np.array_equal(row["positions"][here], np.arange(here.sum()))
        assert np.ptp(np.flatnonzero(here)) == here.sum() - 1
        pixels = [image[None].tolist() for image in row["tiles"][slots == number]]
        features = [slot * PER_IMAGE + patch for slot in np.flatnonzero(slots == number) for patch in range(PER_IMAGE)]
        assert row["visual_index"][here & (row["tokens"] == IMAGE_TOKEN_ID)].tolist() == features
        found.append(pickle.dumps((row["tokens"][here].tolist(), row["labels"][here].tolist(), pixels)))
    padding = segments == 0
    assert (row["visual_index"][row["tokens"] != IMAGE_TOKEN_ID] == -1).all()
    assert not row["tokens"][padding].any() and (row["labels"][padding] == IGNORE).all()
    assert not row["tiles"][slots == 0].any() and set(slots) <= set(segments) | {0}
    visual = segments[row["tokens"] == IMAGE_TOKEN_ID]
    assert np.array_equal(visual, np.repeat(slots[slots > 0], PER_IMAGE))  # the k-th token belongs to the k-th image
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [{name: np.array(value) for name, value in next(iterator).items()} for _ in range(count)]


def skips(rows) -> dict[str, int]:
    found = np.sum([row["skipped"] for row in rows], axis=0)
    return {reason: int(count) for reason, count in zip(REASONS, found, strict=True) if count}


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
            "visual_index": ((LENGTH,), "int32"),
            "tiles": ((SLOTS, SIZE, SIZE, 3), "uint8"),
            "tile_segment_ids": ((SLOTS,), "int32"),
            "images": ((), "int32"),
            "skipped": ((len(REASONS),), "int32"),
        }
        assert not row["skipped"].any()


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
    assert np.abs(order - np.arange(len(source))).max() < 32  # a window's records


def test_several_sources_are_one_data_set(tmp_path):
    sources = [write_file(tmp_path, write_rows(tmp_path, n, seed=n), f"{n}.json") for n in (9, 1, 5)]
    rows = packed_rows(**settings(*sources, epochs=1))
    found = sorted(example for row in rows for example in examples_of(row))
    assert found == sorted(expected_example(source, i) for source in sources for i in range(len(source)))


def test_workers_import_neither_jax_nor_grain():
    code = "import llava_jax.data.examples, sys; sys.exit(bool({'jax', 'grain'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_do_not_depend_on_the_number_of_workers(source, workers):
    here = list(packed_rows(**settings(source, epochs=2)))
    there = list(packed_rows(**settings(source, epochs=2, workers=workers)))
    assert len(here) == len(there) and all(map(same, here, there))


@pytest.mark.parametrize("count", [2, 4])
def test_batches_are_the_same_for_any_number_of_processes(source, count):
    alone = list(Batches(batch_size=8, **settings(source, epochs=2)))
    options = [settings(source, epochs=2, process_index=i, process_count=count) for i in range(count)]
    shares = [list(Batches(batch_size=8, **process)) for process in options]
    for i, batch in enumerate(alone):
        joined = {name: np.concatenate([share[i][name] for share in shares]) for name in batch}
        assert same(batch, joined | {"skipped": sum(share[i]["skipped"] for share in shares)})
    assert [len(share) for share in shares] == [len(alone)] * count


def test_rows_are_counted_in_shares(source):
    counts = [Batches(**settings(source, batch_size=3, process_index=i, process_count=3)).count_rows()
              for i in range(3)]
    assert sum(counts) == len(list(packed_rows(**settings(source, epochs=1)))) and min(counts[:2]) > 0


RESUMES = [(0, 0, 0), (1, 0, 0), (17, 0, 0), (40, 0, 0), (17, 2, 2), (5, 2, 0)]


@pytest.mark.parametrize("stop, before, after", RESUMES)
def test_resume_is_bit_identical(source, before, after, stop):
    """Also with another number of workers, and through JSON, as the checkpoint keeps it."""
    straight = take(iter(Batches(batch_size=2, **settings(source))), stop + 12)
    iterator = iter(Batches(batch_size=2, **settings(source, workers=before)))
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = iter(Batches(batch_size=2, **settings(source, workers=after)))
    resumed.set_state(state)
    assert all(map(same, take(resumed, 12), straight[stop:]))
    resumed.set_state(state)  # an iterator in use can be set back too
    assert same(next(resumed), straight[stop])
    resumed.close()


@pytest.mark.parametrize("before, after", [(1, 2), (4, 2), (2, 1)])
def test_resume_with_another_number_of_processes_goes_on_in_the_same_order(source, before, after):
    def batches(count: int) -> list:
        return [iter(Batches(**settings(source, batch_size=4, process_index=i, process_count=count)))
                for i in range(count)]

    straight = take(iter(Batches(batch_size=4, **settings(source))), 20)
    states = []
    for process in batches(before):
        take(process, 13)
        states.append(process.get_state())
    assert all(state == states[0] for state in states)
    found = []
    for process in batches(after):
        process.set_state(states[0])
        found.append(take(process, 7))
    for i, batch in enumerate(straight[13:]):
        joined = {name: np.concatenate([share[i][name] for share in found]) for name in batch if name != "skipped"}
        assert all(np.array_equal(batch[name], value) for name, value in joined.items())


def test_resume_in_another_process(source, tmp_path):
    iterator = iter(Batches(batch_size=2, **settings(source)))
    take(iterator, 11)
    state = json.dumps(iterator.get_state())
    code = """
import sys; sys.path[:0] = sys.argv[1:2]
from pipeline_data import *
from llava_jax.data import pipeline
pipeline.WINDOW = 32
rows = iter(Batches(batch_size=2, **settings(open_source(sys.argv[2]))))
rows.set_state(json.loads(sys.argv[3]))
np.savez(sys.argv[4], **{f"{i}-{name}": value for i in range(5) for name, value in next(rows).items()})
"""
    out = tmp_path / "rows.npz"
    subprocess.run([sys.executable, "-c", code, Path(__file__).parents[1], source.path, state, out], check=True)
    with np.load(out) as there:
        for i, row in enumerate(take(iterator, 5)):
            assert all(np.array_equal(there[f"{i}-{name}"], value) for name, value in row.items())


def test_a_mixture_takes_its_counts_and_no_row_again_before_all(tmp_path):
    """A third of one source an epoch, another twice: over three epochs every row of the first comes once."""
    small = write_file(tmp_path, write_rows(tmp_path, 5, seed=1, images=[0]), "small.json")
    large = write_file(tmp_path, write_rows(tmp_path, 30, seed=2, images=[0]), "large.json")
    options = settings(mixture=Mixture((small, large), (10, 10)), epochs=3)
    names = {expected_example(source, i): (name, i) for name, source in (("s", small), ("l", large))
             for i in range(len(source))}
    found = [names[example] for row in packed_rows(**options) for example in examples_of(row)]
    assert sorted(found) == sorted([("s", i) for i in range(5)] * 6 + [("l", i) for i in range(30)])
    assert {name for name, _ in found[:10]} == {"s", "l"}
    for epoch in range(3):
        here = found[20 * epoch : 20 * (epoch + 1)]
        assert sorted(here)[10:] == sorted([("s", i) for i in range(5)] * 2)


def spoil(rows: list[dict], folder: Path) -> dict[str, list[int]]:
    """Makes some rows bad, in every way; -> the places of each reason's rows."""
    (folder / "broken.png").write_bytes(png(np.random.default_rng(0))[:60])
    ask, answer = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
    text = {"from": "human", "value": "What?"}
    bad = {
        "malformed": {"conversations": "none"},
        "role": {"conversations": [text, {"from": "tool", "value": "7"}]},
        "turn_order": {"conversations": [text, text]},
        "outside_root": {"image": "../1.png", "conversations": [ask, answer]},
        "missing_image": {"image": "nowhere.png", "conversations": [ask, answer]},
        "broken_image": {"image": "broken.png", "conversations": [ask, answer]},
        "image_count": {"conversations": [ask, answer]},
        "no_supervised_tokens": {"conversations": [text]},
        "too_long": {"conversations": [text, {"from": "gpt", "value": "word " * 2 * LENGTH}]},
        "unsupported": {"audio": "a.mp3", "conversations": [text, {"from": "gpt", "value": "word"}]},
    }
    places = {}
    for number, (reason, row) in enumerate(bad.items()):
        places[reason] = list(range(number, len(rows), 19 + number))
        for place in places[reason]:
            rows[place] = {"id": place, **row}
    taken = {}
    for reason, indices in places.items():  # a later reason overwrites an earlier one
        taken |= {index: reason for index in indices}
    return {reason: [index for index in taken if taken[index] == reason] for reason in bad}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt")
    rows = write_rows(folder, 120)
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
    iterator = iter(Batches(batch_size=1, **rows))
    before = take(iterator, 23)
    state, iterator = iterator.get_state(), iter(Batches(batch_size=1, **rows))
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


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_nothing_is_lost(workers, tmp_path):
    """The iterator stands where it stood, and goes on once the image is there."""
    rows = write_rows(tmp_path, 40, images=[1])
    missing = tmp_path / rows[17]["image"][0]
    content = missing.read_bytes()
    expected = list(Batches(batch_size=2, **settings(write_file(tmp_path, rows), epochs=1)))
    missing.unlink()
    iterator, found = iter(Batches(batch_size=2, **settings(write_file(tmp_path, rows), epochs=1, workers=workers))), []
    with pytest.raises(BadRow, match="no such image file"):
        while True:
            found.append(next(iterator))
    with pytest.raises(BadRow, match="no such image file"):
        next(iterator)
    missing.write_bytes(content)
    found += iterator
    assert len(found) == len(expected) and all(map(same, found, expected))


def test_a_negative_seed_is_a_seed(source):
    assert len(list(Batches(batch_size=2, **settings(source, seed=-1, epochs=1)))) > 3


def test_images_are_turned_and_limited_as_the_options_say(tmp_path):
    rows = write_rows(tmp_path, 1, images=[1])
    [name] = rows[0]["image"]
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    source = write_file(tmp_path, rows)
    for turns, expected in ((False, pixels), (True, np.rot90(pixels, -1))):
        [row] = packed_rows(**settings(source, epochs=1, exif=turns))
        np.testing.assert_array_equal(row["tiles"][0], PROCESSOR(Image.fromarray(expected))[0])
    assert list(packed_rows(**settings(source, epochs=1, max_pixels=180)))
    with pytest.raises(BadRow, match=r"20 x 9 pixels, more than the limit of 179 \(max_pixels\)") as raised:
        list(packed_rows(**settings(source, epochs=1, max_pixels=179)))
    assert raised.value.reason == "broken_image"


def test_answers_that_are_not_learned_have_no_labels(tmp_path):
    turns = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "purple", "loss": False},
             {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "green"}]
    [row] = packed_rows(**settings(write_file(tmp_path, [{"conversations": turns}]), epochs=1))
    assert Tokenizer.load(TOKENIZER).decode(row["labels"][row["labels"] != IGNORE].tolist(), True) == "green"


def test_too_many_images_for_a_row(tmp_path):
    source = write_file(tmp_path, write_rows(tmp_path, 3, images=[SLOTS + 1]))
    with pytest.raises(BadRow, match="4 tiles do not fit into the 3 of a sequence") as raised:
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
    with pytest.raises(UserError, match="none of the first 5 rows can be used, .*: .*data.json, row .* turns must be"):
        next(packed_rows(**settings(source, bad_rows="skip", workers=workers)))


def test_one_good_row_among_many_bad_ones_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW", 500)
    rows = [{"id": n, "conversations": []} for n in range(400)]
    rows[123] = write_rows(tmp_path, 1, images=[1])[0]
    source = write_file(tmp_path, rows)
    found = list(packed_rows(**settings(source, bad_rows="skip", epochs=1)))
    assert skips(found) == {"malformed": 399}
    assert [example for row in found if row["segment_ids"].any() for example in examples_of(row)] == [
        expected_example(source, 123)
    ]


def test_rows_that_do_not_divide_over_the_processes(source):
    with pytest.raises(UserError, match="batch_size 4 is not divisible by the 3 processes"):
        Batches(batch_size=4, **settings(source, process_count=3))


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_data_sets_repeat_for_ever(tmp_path, count):
    source = write_file(tmp_path, write_rows(tmp_path, count))
    iterator = iter(packed_rows(**settings(source)))
    assert len(order_of(source, take(iterator, 20))) >= 20


def test_batches_stack_rows_and_fill_up_the_last(source):
    rows = list(packed_rows(**settings(source, epochs=1)))
    size = next(n for n in (4, 5, 7) if len(rows) % n)
    made = list(Batches(batch_size=size, **settings(source, epochs=1)))
    assert len(made) == -(-len(rows) // size)
    for batch in made:
        assert not batch.pop("skipped").any()
    for number, row in enumerate(rows):
        row.pop("skipped")
        assert same({name: value[number % size] for name, value in made[number // size].items()}, row)
    for empty in range(len(rows) % size, size):
        last = {name: value[empty] for name, value in made[-1].items()}
        assert (last.pop("labels") == IGNORE).all() and (last.pop("visual_index") == -1).all()
        assert not any(value.any() for value in last.values())


def test_count_rows_opens_no_image(spoilt, monkeypatch):
    source, _ = spoilt
    rows = settings(source, bad_rows="skip")
    expected = len(list(packed_rows(**rows, epochs=1)))
    monkeypatch.setattr("llava_jax.data.examples.open_image", lambda path: pytest.fail("an image was opened"))
    assert Batches(batch_size=1, **rows).count_rows() == expected
