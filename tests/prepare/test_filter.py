"""The rule against its plain words, every form of file byte for byte, and errors that leave nothing behind."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax import cli
from llava_jax.annotations import concept_filter as filter_module
from llava_jax.annotations.captions import CaptionFile
from llava_jax.annotations.concept_filter import CaptionPhrases, find_phrases, select
from llava_jax.annotations.noun_phrases import light_chunker
from llava_jax.errors import UserError
from llava_jax.prepare.filter import Filter


def phrases_of(found):
    """`CaptionPhrases` of rows whose phrases are given as texts, numbered in an order of chance."""
    texts = list({text for row in found for text in row})
    random.Random(len(texts)).shuffle(texts)
    ids = np.array([texts.index(text) for row in found for text in row], np.int32)
    return CaptionPhrases(texts, np.cumsum([0, *map(len, found)]), ids)


def plain_rule(found, min_frequency, max_per_phrase, seed):
    """The rule word by word, with dictionaries and sets."""
    captions_with = {}
    for number, phrases in enumerate(found):
        for phrase in phrases:
            captions_with.setdefault(phrase, []).append(number)
    generator, pool = np.random.default_rng(seed), set()
    for phrase in sorted(captions_with, key=lambda phrase: (len(captions_with[phrase]), phrase)):
        captions = captions_with[phrase]
        if len(captions) < min_frequency:
            continue
        if len(captions) > max_per_phrase:
            captions = generator.choice(captions, max_per_phrase, replace=False).tolist()
        pool |= set(captions)
    return pool


def random_corpus(rng):
    vocabulary = [f"phrase {number}" for number in range(rng.randrange(1, 60))]
    weights = [1 / (rank + 1) ** rng.uniform(0, 2) for rank in range(len(vocabulary))]
    rows = []
    for _ in range(rng.randrange(1, 120)):
        rows.append(list(dict.fromkeys(rng.choices(vocabulary, weights, k=rng.randrange(6)))))
    return rows


def test_the_rule_on_random_corpora():
    rng = random.Random(0)
    sizes = set()
    for number in range(500):
        found = random_corpus(rng)
        options = (rng.randrange(1, 6), rng.randrange(1, 20), number)
        kept = select(phrases_of(found), *options)
        assert set(np.flatnonzero(kept).tolist()) == plain_rule(found, *options)
        sizes.add(int(kept.sum()))
    assert len(sizes) > 50


def test_what_the_rule_promises():
    rng = random.Random(1)
    for number in range(200):
        found, least, most = random_corpus(rng), rng.randrange(1, 5), rng.randrange(1, 15)
        phrases = phrases_of(found)
        kept = select(phrases, least, most, number)
        before, after = phrases.frequencies(), phrases.frequencies(kept)
        for text, all_of_it, left in zip(phrases.texts, before, after, strict=True):
            assert all_of_it == sum(text in row for row in found)
            assert left == sum(text in row for row, keep in zip(found, kept, strict=True) if keep)
            if all_of_it >= least:
                assert left >= min(all_of_it, most)
        frequent = {text for text, count in zip(phrases.texts, before, strict=True) if count >= least}
        assert all(frequent & set(row) for row, keep in zip(found, kept, strict=True) if keep)


def test_a_common_phrase_gives_every_caption_the_same_chance():
    phrases = phrases_of([["sky"]] * 500)
    times = sum(select(phrases, 3, 100, seed).astype(int) for seed in range(400))
    assert times.sum() == 400 * 100
    # Binomial with 400 draws of 1 in 5: 80 on average, with a spread of 8.
    assert abs(times - 80).max() < 5 * 8 and 7 < times.std() < 9


# ---- files ----

WORDS = ["dog", "cat", "bird", "red car", "old house", "tree", "boat", "river", "man", "woman"]


def captions(count=60):
    rng = random.Random(count)
    made = []
    for number in range(count):
        things = rng.choices(WORDS, [1 / (rank + 1) for rank in range(len(WORDS))], k=2)
        made.append(f"a {things[0]} near the {things[1]} and a thing{number} – naïve")
    return made


def encode(form, texts):
    if form == "chat list":
        rows = [{"id": number, "image": f"{number}.jpg", "conversations": [
            {"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": text}]}
            for number, text in enumerate(texts)]  # fmt: skip
        return json.dumps(rows, indent=1)
    rows = [{"id": f"{number:04d}", "caption": text, "blip_caption": None} for number, text in enumerate(texts)]
    if form == "list":
        return json.dumps(rows, ensure_ascii=False)
    if form == "lines":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if form == "lines, blanks between, no last newline":
        return "\ufeff\r\n" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if form == "tsv":
        return "".join(f"{row['caption']}\thttp://x.org/{row['id']}.jpg\n" for row in rows)
    assert form == "tsv with names"
    return "url\tcaption\r\n" + "".join(f"http://x.org/{row['id']}\t{row['caption']}\r\n" for row in rows)


FORMS = ["list", "chat list", "lines", "lines, blanks between, no last newline", "tsv", "tsv with names"]


def expected_rows(texts, **options):
    found = light_chunker(texts)
    return sorted(plain_rule(found, options.get("min_frequency", 3), options.get("max_per_phrase", 100), 0))


def run(data, output, **options):
    return Filter(data=str(data), out=str(output), **{"workers": 0, "max_per_phrase": 5, **options}).run()


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_written_as_they_are(tmp_path, form, capsys):
    texts = captions()
    data, output = tmp_path / "data", tmp_path / "kept.json"
    data.write_bytes(encode(form, texts).encode())
    assert run(data, output) == 0
    rows = expected_rows(texts, max_per_phrase=5)
    assert 5 < len(rows) < 55
    if "list" in form:
        whole = json.loads(data.read_text())
        assert json.loads(output.read_text()) == [whole[row] for row in rows]
        assert output.read_text().startswith("[\n{")
    else:
        content = data.read_bytes().removeprefix(b"\xef\xbb\xbf")
        lines = [line for line in content.splitlines(keepends=True) if line.strip()]
        names = form == "tsv with names"
        assert output.read_bytes() == b"".join([*lines[:names], *(lines[names:][row] for row in rows)])
    printed = capsys.readouterr().out
    assert "captions: 60" in printed and f"captions kept: {len(rows)} ({len(rows) / 60:.1%})" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "kept.html", "kept.json"]


@pytest.mark.parametrize("form", ["list", "tsv"])
def test_what_was_kept_can_be_filtered_again(tmp_path, form):
    data, output, again = tmp_path / "data", tmp_path / "kept", tmp_path / "again"
    data.write_text(encode(form, captions()))
    run(data, output)
    run(output, again, max_per_phrase=100)
    assert again.read_bytes() == output.read_bytes()


def test_processes_batches_and_hash_seeds_do_not_matter(tmp_path, monkeypatch):
    data = tmp_path / "data.tsv"
    data.write_text(encode("tsv", captions(400)))
    run(data, tmp_path / "one")
    monkeypatch.setattr(filter_module, "BATCH_ROWS", 7)
    run(data, tmp_path / "small batches")
    for number, workers in enumerate((1, 2)):
        command = [sys.executable, "-m", "llava_jax.prepare", "filter", data, tmp_path / f"many {number}"]
        options = ["--max-per-phrase", "5", "--workers", str(workers)]
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": str(Path(cli.__file__).parents[1])}
        subprocess.run([*command, *options], check=True, env=environment, capture_output=True)
    run(data, tmp_path / "other seed", seed=1)
    first = (tmp_path / "one").read_bytes()
    assert all((tmp_path / name).read_bytes() == first for name in ("small batches", "many 0", "many 1"))
    assert (tmp_path / "other seed").read_bytes() != first


def test_phrases_of_a_file(tmp_path):
    data = tmp_path / "data.jsonl"
    texts = ["a dog and a dog", "nothing", "The dog near a cat"]
    data.write_text(encode("lines", texts))
    phrases, bad = find_phrases(CaptionFile(str(data)), light_chunker, workers=0)
    assert list(phrases.texts) == ["dog", "cat"] and not bad
    assert phrases.starts.tolist() == [0, 1, 1, 3] and phrases.ids.tolist() == [0, 0, 1]


BAD_ROWS = {
    "broken JSON": ("lines", '{"caption": "a dog', "broken JSON"),
    "not UTF-8": ("lines", b'{"caption": "\xff"}', "not UTF-8"),
    "no object": ("lines", '["a dog"]', "a row must be an object"),
    "no caption": ("lines", '{"id": 1}', "neither caption nor conversations"),
    "wrong type": ("lines", '{"caption": 7}', "caption must be text"),
    "empty": ("lines", '{"caption": "  "}', "the caption is empty"),
    "no answer": ("lines", '{"conversations": [{"from": "human", "value": "?"}]}', "0 answers from gpt"),
    "two answers": ("lines", json.dumps({"conversations": [{"from": "gpt", "value": "x"}] * 2}), "2 answers from gpt"),
    "answer of a wrong type": ("lines", '{"conversations": [{"from": "gpt", "value": []}]}', "answer must be text"),
    "conversation of a wrong type": ("lines", '{"conversations": "x"}', "0 answers from gpt"),
    "nested without end": ("lines", "[" * 100_000, "broken JSON"),
    "no tab": ("tsv", "a dog without a place", "no tab"),
    "empty in TSV": ("tsv", "\thttp://x.org/1.jpg", "the caption is empty"),
    "TSV that is not UTF-8": ("tsv", b"caf\xe9\thttp://x.org/1.jpg", "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row(tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(filter_module, "BATCH_ROWS", 7)
    form, row, reason = BAD_ROWS[name]
    data, output = tmp_path / "data", tmp_path / "kept"
    good = [line.encode() + b"\n" for line in encode(form, captions()).splitlines()]
    row = row if isinstance(row, bytes) else row.encode()
    data.write_bytes(b"".join([*good[:20], b"\n", row, b"\n", *good[20:]]))
    with pytest.raises(ValueError) as caught:
        run(data, output)
    assert str(caught.value).startswith(f"{data}, row 21 (line 22): ") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and "--bad-rows skip" in str(caught.value)
    assert os.listdir(tmp_path) == ["data"]
    run(data, output, bad_rows="skip")
    kept = [good[row] for row in expected_rows(captions(), max_per_phrase=5)]
    assert output.read_bytes() == b"".join(kept)
    printed = capsys.readouterr().out
    assert "rows without a caption, left out: 1\n" in printed and f"{data}, row 21 (line 22): " in printed


def test_a_bad_row_of_a_list(tmp_path):
    data = tmp_path / "data.json"
    data.write_text('[\n{"caption": "a dog"},\n{"caption": null}\n]')
    with pytest.raises(UserError, match=r"data.json, row 2 \(line 3\): it has neither caption nor conversations"):
        run(data, tmp_path / "kept")


def test_a_bad_row_at_the_start(tmp_path):
    data = tmp_path / "data.tsv"
    data.write_text("\n\thttp://x.org/1\na dog\thttp://x.org/2\n")
    with pytest.raises(UserError, match=r"data.tsv, row 1 \(line 2\): the caption is empty"):
        run(data, tmp_path / "kept")


def test_a_bad_row_below_the_names_of_columns(tmp_path):
    data = tmp_path / "data.tsv"
    data.write_text("url\tcaption\n\nhttp://x.org/1\ta dog\nhttp://x.org/2\n")
    with pytest.raises(UserError, match=r"data.tsv, row 2 \(line 4\): there is no tab"):
        run(data, tmp_path / "kept")


BAD_FILES = {
    b"": "the file is empty",
    b" \n\n": "the file is empty",
    b"caption\turl\n": "has no rows, only the names of its columns",
    b"just text\nand more\n": "neither a JSON list of rows, nor JSON lines, nor lines of caption, tab and URL",
    b'{\n "mixture": []\n}': "neither a JSON list",
    b'[["a dog", "http://x.org"]]': "neither a JSON list",
    b"[]": "no rows",
    b'[{"caption": "a dog"}, {"caption"': "broken JSON",
    b"\x1f\x8b\x08\x00": "gzip",
    b"PAR1\x15\x04": "neither a JSON list",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: repr(content)[:20])
def test_a_file_that_is_none(tmp_path, content):
    data = tmp_path / "data"
    data.write_bytes(content)
    with pytest.raises(UserError, match=BAD_FILES[content]) as caught:
        run(data, tmp_path / "kept")
    assert str(data) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["data"]


def test_mistakes_in_the_options(tmp_path):
    data = tmp_path / "data"
    data.write_text(encode("tsv", captions()))
    with pytest.raises(UserError, match="nothing.tsv: no such file"):
        run(tmp_path / "nothing.tsv", tmp_path / "kept")
    with pytest.raises(UserError, match="must be three files"):
        run(data, data)
    with pytest.raises(UserError, match="must be three files"):
        run(data, tmp_path / "kept", report=str(tmp_path / "kept"))
    with pytest.raises(UserError, match="--max-per-phrase is 0: it must be at least 1"):
        run(data, tmp_path / "kept", max_per_phrase=0)
    with pytest.raises(UserError, match="--seed is -1: it must be at least 0"):
        run(data, tmp_path / "kept", seed=-1)
    with pytest.raises(UserError, match="nothing is left of 60 captions.*lower --min-frequency"):
        run(data, tmp_path / "kept", min_frequency=100)
    assert os.listdir(tmp_path) == ["data"]
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="kept: is a folder; name a file"):
        run(data, tmp_path / "kept")
    (tmp_path / "old.html").write_text("")
    with pytest.raises(UserError, match="old.html: exists already; add --overwrite to replace it"):
        run(data, tmp_path / "old.json")
    assert not (tmp_path / "old.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "kept"
    data.write_text(encode("tsv", captions()))
    output.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        run(data, output, overwrite=True)
    assert output.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["data", "kept"]


def test_the_report(tmp_path):
    data, output, report = tmp_path / "<data>.tsv", tmp_path / "kept.tsv", tmp_path / "page.html"
    texts = [*captions(300), *["a <b>rare</b> r&b song"] * 3]
    data.write_text(encode("tsv", texts))
    run(data, output, report=str(report))
    page = report.read_text()
    found, rows = light_chunker(texts), expected_rows(texts, max_per_phrase=5)
    most = max(WORDS, key=lambda word: sum(word in row for row in found))
    before, after = sum(most in row for row in found), sum(most in found[row] for row in rows)
    assert before > after
    assert f"<tr><th>{most}</th><td>{before}</td><td>{after}</td></tr>" in page
    assert f"<td>{len(rows)} ({len(rows) / 303:.1%})</td>" in page
    assert "<th>r&amp;b song</th><td>3</td><td>3</td>" in page
    assert "&lt;data&gt;.tsv" in page and "<data>" not in page and "<b>" not in page
    assert page.count("<polyline") == 2 and "rank of the phrase" in page and "captions with the phrase" in page
    assert "http:" not in page and "https:" not in page and "<script" not in page  # nothing to fetch


def test_the_command_line():
    options = cli.parse(Filter, ["in.json", "out.json", "--max-per-phrase", "7", "--bad_rows", "skip"], prog="filter")
    assert options.max_per_phrase == 7 and options.bad_rows == "skip" and options.min_frequency == 3
    with pytest.raises(UserError, match="chunker"):
        cli.parse(Filter, ["in.json", "out.json", "--chunker", "nltk"], prog="filter")
