"""Lengths that hosts measure in shares and store beside the data: what is read, and files that cannot be trusted."""

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image
from pipeline_data import LENGTH, SIZE, packed_rows, png, settings, write_file, write_rows

from llava_jax.data import lengths as module
from llava_jax.data import pipeline
from llava_jax.data.examples import DataSpec
from llava_jax.data.lengths import Lengths
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import Mixture, Source, open_source
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.text.templates import TEMPLATES

ANYRES = ImageProcessor(SIZE, "anyres", patches=2, pinpoints=((SIZE, 2 * SIZE), (2 * SIZE, SIZE)))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW", 32)
    monkeypatch.setattr(pipeline, "TASK_RECORDS", 4)


class CountingSource(Source):
    """Counts the reads of every row."""

    def __init__(self, source: Source):
        self.__dict__ |= source.__dict__ | {"reads": Counter()}

    def __getitem__(self, index: int):
        self.reads[index] += 1
        return super().__getitem__(index)


def run_hosts(work, count: int) -> list:
    """Calls `work(index, allgather)` in `count` threads, each as a host, and returns the results."""
    barrier, values, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def host(index: int) -> None:
        def allgather(name: str, value):
            values[index] = name, json.loads(json.dumps(value))
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            assert {found for found, _ in gathered} == {name}
            return [value for _, value in gathered]

        try:
            results[index] = work(index, allgather)
        except Exception as error:
            results[index] = error
            barrier.abort()

    threads = [threading.Thread(target=host, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def cache_of(source: Source) -> Path:
    [path] = Path(source.path).parent.glob(".data.json.lengths-*")
    return path


def same_rows(one, other) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(mine[name], theirs[name]) for mine, theirs in zip(one, other, strict=True) for name in mine)


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_read_their_share_and_their_rows(tmp_path, count):
    """Two epochs of each host: its share of the lengths is read once, the records of its sequences once an epoch."""
    rows = write_rows(tmp_path, 75)
    rows[11]["image"].append("one-too-many.png")
    rows[40]["image"] = ["gone.png"] * len(rows[40]["image"])
    source, options = write_file(tmp_path, rows), dict(epochs=2, bad_rows="skip", shuffle=True)
    alone = list(Batches(batch_size=24, **settings(source, **options)))
    cache_of(source).unlink()
    hosts = [CountingSource(source) for _ in range(count)]

    def work(index: int, allgather) -> list:
        return list(Batches(batch_size=24, process_index=index, process_count=count, allgather=allgather,
                            **settings(hosts[index], **options)))

    shares = run_hosts(work, count)
    for i, batch in enumerate(alone):
        joined = {name: np.concatenate([share[i][name] for share in shares]) for name in batch if name != "skipped"}
        assert all(np.array_equal(batch[name], joined[name]) for name in joined)
        assert np.array_equal(batch["skipped"], sum(share[i]["skipped"] for share in shares))
    total = sum((host.reads for host in hosts), Counter())
    first = Batches(batch_size=24, **settings(source)).order.window(0, 0)[0]  # tried by every host before it starts
    assert total == Counter({number: 1 if number == 11 else 3 for number in range(75)}) + Counter({first: 2 * count})
    assert max(host.reads.total() for host in hosts) <= 3 * 75 / count + 75 / 2

    for host in hosts:
        host.reads.clear()
    shares = run_hosts(work, count)  # the lengths are stored
    assert sum(host.reads.total() for host in hosts) == 2 * 74 + 2 * count


def test_images_of_a_packed_set_are_read_by_the_host_that_shows_them(tmp_path):
    pytest.importorskip("array_record")
    from llava_jax.prepare.pack import Pack

    write_file(tmp_path, write_rows(tmp_path, 40))
    assert Pack(data=str(tmp_path / "data.json"), out=str(tmp_path / "packed"), workers=0).run() == 0
    source = open_source(tmp_path / "packed")
    hosts = [CountingSource(source) for _ in range(2)]
    for reads in (80, 40):  # measured and shown, then shown alone
        run_hosts(lambda index, allgather: list(Batches(
            batch_size=2, process_index=index, process_count=2, allgather=allgather,
            **settings(hosts[index], epochs=1))), 2)
        assert sum((host.reads for host in hosts), Counter()) == Counter({i: reads // 40 for i in range(40)})
        assert min(host.reads.total() for host in hosts) > reads / 4
        for host in hosts:
            host.reads.clear()


@pytest.mark.parametrize("count", [1, 3])
def test_counting_measures_every_record_once(tmp_path, count):
    source = write_file(tmp_path, write_rows(tmp_path, 75))
    expected = len(list(packed_rows(**settings(source, epochs=1))))
    cache_of(source).unlink()
    hosts = [CountingSource(source) for _ in range(count)]
    for reads in (75, 0):
        found = run_hosts(lambda index, allgather: Batches(
            batch_size=3, process_index=index, process_count=count, allgather=allgather,
            **settings(hosts[index])).count_rows(), count)
        assert sum(found) == expected and sum(host.reads.total() for host in hosts) == reads
        for host in hosts:
            host.reads.clear()


def test_counting_measures_what_an_epoch_of_a_mixture_reads(tmp_path):
    sources = [CountingSource(write_file(tmp_path, write_rows(tmp_path, n, seed=n), f"{n}.json")) for n in (40, 9)]
    options = settings(mixture=Mixture(tuple(sources), (10, 20)))
    expected = len(list(packed_rows(**options, epochs=1)))
    for path in tmp_path.glob(".*lengths*"):
        path.unlink()
    for source in sources:
        source.reads.clear()
    [found] = run_hosts(lambda _, allgather: Batches(batch_size=1, allgather=allgather, **options).count_rows(), 1)
    assert found == expected and [source.reads.total() for source in sources] == [10, 9]


def test_one_host_encodes_a_text_once_in_its_first_epoch(tmp_path, monkeypatch):
    source = CountingSource(write_file(tmp_path, write_rows(tmp_path, 50)))
    calls = Counter()
    original = DataSpec._encode
    monkeypatch.setattr(DataSpec, "_encode", lambda spec, record: calls.update([record.id]) or original(spec, record))
    for expected in (1, 2):
        list(packed_rows(**settings(source, epochs=1)))
        assert set(calls.values()) == {expected} and len(calls) == 50


CHANGES = {"template": TEMPLATES["mistral_instruct"], "sequence_length": LENGTH + 1, "tiles_per_sequence": 4,
           "exif": True, "context": LENGTH - 1, "processor": ImageProcessor(SIZE, patches=3)}


@pytest.mark.parametrize("change", [*CHANGES, "tokenizer", "data"])
def test_lengths_of_other_data_or_settings_are_not_used(tmp_path, change, tiny_tokenizer):
    rows = write_rows(tmp_path, 40)
    source = write_file(tmp_path, rows)
    list(packed_rows(**settings(source, epochs=1)))
    options = {"epochs": 1} | {name: value for name, value in CHANGES.items() if name == change}
    if change == "tokenizer":
        options["tokenizer"] = tiny_tokenizer
    if change == "data":
        rows[0], rows[1] = rows[1], rows[0]  # the file has the same size
        source = write_file(tmp_path, rows)
    unused = write_file(tmp_path, rows, "other.json")
    assert not Lengths(settings(source, **options)["spec"])[range(40)].any()
    assert same_rows(list(packed_rows(**settings(source, **options))), list(packed_rows(**settings(unused, **options))))


@pytest.fixture
def tiny_tokenizer(tmp_path):
    import tokenizers

    from llava_jax.text.tokenizer import Tokenizer

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<unk>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator([TEMPLATES["vicuna_v1"].system, "What is here? Row of. It is red."] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_damaged_file_is_replaced(tmp_path):
    source = write_file(tmp_path, write_rows(tmp_path, 20))
    spec = settings(source)["spec"]
    Batches(spec, 1).count_rows()
    cache, expected = cache_of(source), Lengths(spec)[range(20)]
    complete = cache.read_bytes()
    assert (expected[:, 0] > 0).all() and len(complete) == 32 + 20 * 8
    damaged = [complete[:place] + bytes([complete[place] ^ 4]) + complete[place + 1 :]
               for place in range(0, len(complete), 7)]
    for content in (*damaged, complete[:100], complete + bytes(8), b""):
        cache.write_bytes(content)
        assert not Lengths(spec)[range(20)].any()
    Batches(spec, 1).count_rows()
    assert cache.read_bytes() == complete


def test_a_process_that_is_killed_as_it_writes_leaves_no_half_file(tmp_path):
    source = write_file(tmp_path, write_rows(tmp_path, 20))
    code = """
import os, signal, sys; sys.path.insert(0, sys.argv[1])
from pipeline_data import *
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Batches(batch_size=1, **settings(open_source(sys.argv[2]))).count_rows()
"""
    command = [sys.executable, "-c", code, Path(__file__).parents[1], source.path]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    names = {path.name for path in tmp_path.glob(".*")}
    assert len(names) == 1 and names.pop().endswith(".tmp")
    Batches(batch_size=1, **settings(source)).count_rows()
    assert [path.name for path in tmp_path.glob(".*")] == [cache_of(source).name]


# Measures every second record, again and again.
RUN = """
import sys; sys.path.insert(0, sys.argv[1])
from pipeline_data import *
from llava_jax.data.lengths import Lengths
spec, half = settings(open_source(sys.argv[2]))["spec"], np.arange(int(sys.argv[3]), 2000, 2)
for _ in range(300):
    lengths = Lengths(spec)
    lengths.add(half, [(1 + number, number % 3) for number in half])
    lengths.save()
"""


def test_two_runs_store_lengths_of_the_same_data(tmp_path):
    source = write_file(tmp_path, write_rows(tmp_path, 20, images=[0]) * 100)
    spec, numbers = settings(source)["spec"], np.arange(2000)
    expected = np.stack([1 + numbers, numbers % 3], 1)
    commands = [[sys.executable, "-c", RUN, Path(__file__).parents[1], source.path, half] for half in "01"]
    runs, counts = [subprocess.Popen(command) for command in commands], Counter()
    while any(run.poll() is None for run in runs):
        stored = bool(list(tmp_path.glob(".data.json.lengths-*")))
        found = Lengths(spec)[numbers]
        known = found[:, 0] > 0
        assert np.array_equal(found[known], expected[known]) and not found[~known].any()
        assert not stored or known[0::2].all() or known[1::2].all()  # also while the file is replaced
        counts[known.sum()] += stored
    assert [run.returncode for run in runs] == [0, 0] and counts[2000]


def test_a_folder_that_is_not_writable_costs_one_line(tmp_path, monkeypatch, capsys):
    source = write_file(tmp_path, write_rows(tmp_path, 40))
    expected = list(packed_rows(**settings(source, epochs=1)))
    cache_of(source).unlink()

    def refuse(path: str, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(module, "_write", refuse)
    batches = Batches(batch_size=1, **settings(CountingSource(source), epochs=1))
    assert batches.count_rows() == len(expected)
    batches.spec.mixture.sources[0].reads.clear()
    assert len(list(batches)) == len(expected) and batches.spec.mixture.sources[0].reads.total() == 40
    [line] = capsys.readouterr().err.splitlines()
    assert "stay in memory" in line and "Permission denied" in line


def test_images_may_be_mended_and_must_not_change(tmp_path):
    rows = write_rows(tmp_path, 12, images=[1])
    source, name = write_file(tmp_path, rows), rows[5]["image"][0]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    options = dict(processor=ANYRES, tiles_per_sequence=6, epochs=1)
    skipped = [row["skipped"].sum() for row in packed_rows(**settings(source, bad_rows="skip", **options))]
    assert sum(skipped) == 1
    (tmp_path / name).write_bytes(content)
    for bad_rows in ("skip", "error"):
        found = list(packed_rows(**settings(source, bad_rows=bad_rows, **options)))
        assert not any(row["skipped"].any() for row in found)
    assert sum(row["segment_ids"].max() for row in found) == 12
    sizes = [png(np.random.default_rng(seed)) for seed in range(20)]
    with pytest.raises(UserError, match=r"data.json, row 6 .*remove \S+/\.data\.json\.lengths-\w{8}, if"):
        for other in sizes:  # of which some have another shape
            (tmp_path / name).write_bytes(other)
            list(packed_rows(**settings(source, **options)))


@pytest.mark.parametrize("change", ["none", "mended", "replaced"])
def test_a_resumed_run_says_that_its_images_have_changed(tmp_path, capsys, change):
    rows = write_rows(tmp_path, 12, images=[1])
    source, image = write_file(tmp_path, rows), tmp_path / rows[5]["image"][0]
    content = image.read_bytes()
    if change == "mended":
        image.unlink()
    options = dict(batch_size=2, process_count=2, processor=ANYRES, tiles_per_sequence=6, epochs=2, bad_rows="skip")
    iterator = iter(Batches(**settings(source, **options)))
    next(iterator)
    state, seen = iterator.get_state(), iterator.lengths_hash
    iterator.close()
    if change == "replaced":
        Image.new("RGB", (SIZE, 4 * SIZE)).save(image)
        cache_of(source).unlink()  # as the error says
    else:
        image.write_bytes(content)
    for index in range(2):
        resumed = iter(Batches(**settings(source, **options), process_index=index))
        resumed.set_state(json.loads(json.dumps(state)), seen)
        list(resumed)
        line = "data.json: since the stop, records near this position got other numbers of tokens or tiles"
        told = capsys.readouterr().err
        assert told.count("\n") == told.count(line) == (change != "none" and index == 0), told


def test_a_row_whose_image_was_made_smaller_is_used(tmp_path):
    processor = ImageProcessor(SIZE, "anyres", patches=2, pinpoints=((SIZE, SIZE), (2 * SIZE, 2 * SIZE)))
    source = write_file(tmp_path, write_rows(tmp_path, 3, images=[1]))
    for side, skipped in ((2 * SIZE, 3), (SIZE, 0)):  # 5 tiles, then 2
        for number in range(3):
            Image.new("RGB", (side, side)).save(tmp_path / f"{number}-0.png")
        options = settings(source, processor=processor, bad_rows="skip", tiles_per_sequence=4)
        Batches(batch_size=1, **options).count_rows()
        assert (Lengths(options["spec"])[range(3)][:, 0] > 0).sum() == 3 - skipped


def test_a_damaged_shard_may_be_replaced(tmp_path):
    pytest.importorskip("array_record")
    from llava_jax.prepare.pack import Pack

    write_file(tmp_path, write_rows(tmp_path, 8))
    assert Pack(data=str(tmp_path / "data.json"), out=str(tmp_path / "packed"), workers=0).run() == 0
    [shard] = (tmp_path / "packed").glob("*.array_record-*")
    content = shard.read_bytes()
    place = content.index(b"conversations") + 40
    shard.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    for skipped in (1, 0):
        options = settings(open_source(tmp_path / "packed"), bad_rows="skip")
        Batches(batch_size=1, **options).count_rows()
        assert (Batches(batch_size=1, **options).lengths[range(8)][:, 0] > 0).sum() == 8 - skipped
        shard.write_bytes(content)


def test_bad_rows_are_stored_and_still_an_error_where_they_are_one(tmp_path):
    rows = write_rows(tmp_path, 12)
    rows[3]["image"].append("one-too-many.png")
    source = CountingSource(write_file(tmp_path, rows))
    Batches(batch_size=1, **settings(source, bad_rows="skip")).count_rows()
    source.reads.clear()
    skips = Batches(batch_size=1, **settings(source, bad_rows="skip")).lengths[3]
    assert skips.tolist() == [-1 - module.REASONS.index("image_count"), 0] and not source.reads
    with pytest.raises(UserError, match="row 4"):
        list(packed_rows(**settings(source, epochs=1)))


def test_hosts_with_other_data_are_told(tmp_path):
    sources = [write_file(tmp_path, write_rows(tmp_path, n), f"{n}.json") for n in (10, 12)]
    found = run_hosts(lambda index, allgather: Lengths(settings(sources[index])["spec"], index, 2, allgather), 2)
    assert any("files of process 1 have other names or sizes" in str(error) for error in found)


def test_a_bucket_holds_them(tmp_path, monkeypatch):
    """With a folder in the place of the bucket."""
    source = write_file(tmp_path, write_rows(tmp_path, 10))
    path, stored = Lengths.path, {}

    class Object:
        def __init__(self, name: str):
            self.name = name

        def write_bytes(self, content: bytes) -> None:
            stored[self.name] = content

        def read_bytes(self) -> bytes:
            return stored[self.name]

    monkeypatch.setattr(Lengths, "path", lambda lengths, number: "gs://" + path(lengths, number))
    monkeypatch.setattr(epath, "Path", Object)
    expected = Batches(batch_size=1, **settings(source)).count_rows()
    assert [name[:5] for name in stored] == ["gs://"] and not list(tmp_path.glob(".*"))
    counting = CountingSource(source)
    assert Batches(batch_size=1, **settings(counting)).count_rows() == expected and not counting.reads
