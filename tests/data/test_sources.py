"""Files told apart by content, rows read by random access, and one clear line for every file that is none."""

import gzip
import json
import os
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from llava_jax.data import json_rows
from llava_jax.data.records import BadRow
from llava_jax.data.sources import open_mixture, open_source
from llava_jax.errors import UserError
from llava_jax.image_files import open_image

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
TEXTS = ["plain", "naïve café", '日本語 [1, {2}] "quoted" \\ back', "😀\u2028 \x85\xa0", "a\nb\ttab", "", "}]"]


def row(number: int, text: str = "Hi", image: str | None = None) -> dict:
    question = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return {"id": number, "conversations": turns} | ({"image": image} if image else {})


ROWS = [row(number, text) for number, text in enumerate(TEXTS)]


def write(path, rows, how):
    if how == "lines":
        text = "".join(json.dumps(r) + "\n" for r in rows)
    elif how == "lines, raw text, blanks, no last newline":
        raw = [json.dumps(r, ensure_ascii=False) for r in rows]
        text = "\r\n" + "\n \n".join(raw)
    elif how == "list on one line":
        text = json.dumps(rows, separators=(",", ":"))
    elif how == "list, indented, raw text":
        text = "\n\n  " + json.dumps(rows, ensure_ascii=False, indent=2) + "\n\n"
    else:
        text = "\ufeff" + json.dumps(rows, ensure_ascii=False)
    path.write_bytes(text.encode())


WAYS = [
    "lines",
    "lines, raw text, blanks, no last newline",
    "list on one line",
    "list, indented, raw text",
    "list with a byte order mark, raw",
]


@pytest.mark.parametrize("piece", [1 << 26, 700, 61])
@pytest.mark.parametrize("how", WAYS)
def test_every_row_of_every_kind_of_file(how, piece, tmp_path, monkeypatch):
    """Also where the file is read in pieces smaller than its rows."""
    monkeypatch.setattr(json_rows, "PIECE_BYTES", piece)
    rows, path = ROWS, tmp_path / "data.txt"  # the name tells nothing
    write(path, rows, how)
    source = open_source(path)
    assert len(source) == len(rows)
    for index in reversed(range(len(rows))):
        record = source[index]
        assert record.id == str(rows[index]["id"]) and list(record.turns) == rows[index]["conversations"]
    with pytest.raises(IndexError):
        source[len(rows)]


def test_a_row_knows_its_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n" + json.dumps(ROWS[:3], indent=1))
    lines = path.read_text().split("\n")
    for index in range(3):
        where = open_source(path)[index].source
        line = int(where.split("(line ")[1].split(")")[0])
        assert where == f"{path}, row {index + 1} (line {line}), id {index}"
        assert lines[line].strip() == f'"id": {index},'  # the line after the opening brace


def test_images_are_joined_to_the_root(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(0, image="coco/1.jpg"), row(1, image="a/../b.jpg")]))
    assert open_source(path)[0].images == (f"{tmp_path}/coco/1.jpg",)
    assert open_source(path, tmp_path / "images")[1].images == (f"{tmp_path}/images/b.jpg",)


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg", "../images2/x.jpg", "."])
def test_a_path_that_leaves_the_root_is_refused(image, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(0, image=image)]))
    with pytest.raises(BadRow, match=r"row 1 \(line 1\), id 0: image .* is outside the image root .*images") as raised:
        open_source(path, tmp_path / "images")[0]
    assert raised.value.reason == "outside_root"
    absolute = tmp_path / "images" / "1.jpg"
    path.write_text(json.dumps([row(0, image=str(absolute))]))
    assert open_source(path, tmp_path / "images")[0].images == (str(absolute),)


ROW = '{"id": 1, "conversations": [{"from": "human", "value": "Hi"}]}'


@pytest.mark.parametrize("piece", [1 << 26, 50])
@pytest.mark.parametrize(
    "content, says",
    [
        ("", "the file is empty"),
        ("  \n\n ", "the file has no rows"),
        ("[]", "the file has no rows"),
        ("\n[\n]\n", "the file has no rows"),
        ('[{"id": 1},\n {"id": 2}', "line 2: broken JSON .a comma or the end.* the 2 rows before are whole"),
        ('[{"id": 1},\n {"id": 2}\n,', "line 3: broken JSON .Expecting value"),
        ('[{"id": 1},\n{"id": "2', "line 2: broken JSON .Unterminated string"),
        ('[{"id": 1}\n{"id": 2}]', "line 2: broken JSON .a comma"),
        ('[{"id": 1}]\n\n{"id": 2}', "line 3: broken JSON .there is more"),
        ('{\n "images": [],\n "annotations": []}', "line 1: the file is neither a JSON list of rows nor JSON lines"),
        ("\nid,image\n1,a.jpg", "line 2: the file is neither"),
        ("\x89PNG\r\n\x1a\n", "line 1: the file is neither"),
        ("\0" * 200, "line 1: the file is neither .* NUL bytes"),
        ("[" * 100_000, "line 1: broken JSON"),
        ("x" * 100_000, "line 1: the file is neither"),
        (gzip.compress(b"[]", mtime=0), "packed with gzip"),
        (ROW.encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ('{"data": [' + ROW + "]}", "of no known format: a row needs conversations, .*; the first row has data"),
        ("[1, 2]", "of no known format: .* the first rows are no objects"),
        (ROW[:-1] + ', "messages": []}', r"row 1 .line 1.: the row is ambiguous: it has conversations and messages"),
        (ROW + '\n{"messages": []}\n', "the file is ambiguous: row 1 has conversations, row 2 has messages; split it"),
    ],
)
def test_files_that_are_none(content, says, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "PIECE_BYTES", piece)
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as raised:
        open_source(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_missing_files_folders_and_loops(tmp_path):
    with pytest.raises(UserError, match="none.json: no such data file"):
        open_source(tmp_path / "none.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: .*symbolic links"):
        open_source(tmp_path / "loop")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is no regular file"):
        open_source(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: the image cannot be read .it is no regular file"):
        open_image(tmp_path / "pipe")


def test_a_broken_first_line_is_a_bad_row_too(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 2, "conv\n' + json.dumps(ROWS[1]))
    source = open_source(path)
    assert source[1].id == "1"
    with pytest.raises(BadRow, match=r"row 1 \(line 1\): broken JSON"):
        source[0]


def test_a_number_of_thousands_of_digits_in_a_list_is_a_bad_row(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"id": ' + "1" * 5000 + "}, " + json.dumps(ROWS[1]) + "]")
    assert open_source(path)[1].id == "1"
    with pytest.raises(BadRow, match="broken JSON"):
        open_source(path)[0]


def write_parquet(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": number, "messages": MESSAGES} for number in numbers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


LAYOUTS = [  # files, with a row each of their number -> the ids by split, or what is wrong without one
    (["data/train-00000-of-00002-ab.parquet", "data/train-00001-of-00002-cd.parquet"], {"": [0, 1], "train": [0, 1]}),
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {"train": [0], "test": [1]}),
    (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
     {"train": [0, 1], "default/test": [2]}),
    (["train.parquet", "validation.parquet"], {"train": [0], "validation": [1]}),
    (["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"], {"a/train": [0], "b/train": [1]}),
    (["coco2014.parquet", "coco2017.parquet"], {"coco2014": [0], "coco2017": [1]}),
    (["part-1.parquet", "part-10.parquet", "part-2.parquet"], {"": [0, 1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize("files, splits", LAYOUTS)
def test_folders_of_parquet_files(files, splits, tmp_path):
    for number, file in enumerate(files):
        write_parquet(tmp_path / file, number)
    (tmp_path / "loop").symlink_to(tmp_path)
    for split, ids in splits.items():
        source = open_source(f"{tmp_path}:{split}" if split else tmp_path)
        assert [source[i].id for i in range(len(source))] == [str(number) for number in ids]
    if "" not in splits:
        with pytest.raises(UserError, match="has several splits; there are .*, "):
            open_source(tmp_path)
    with pytest.raises(UserError, match="has no split nothing; there are"):
        open_source(f"{tmp_path}:nothing")


def test_a_column_that_python_cannot_hold_is_left_alone(tmp_path):
    """A record is read without it; the row as stored is not, rather than without saying so."""
    times = pyarrow.array([1], pyarrow.timestamp("ns", "Nowhere/At_All"))
    rows = pyarrow.Table.from_pylist([{"messages": MESSAGES}]).append_column("time", times)
    pyarrow.parquet.write_table(rows, tmp_path / "data.parquet")
    source = open_source(tmp_path / "data.parquet")
    assert source[0].turns[1]["value"] == "Hi"
    with pytest.raises(BadRow, match="cannot be read"):
        source.row(0)


def test_a_missing_shard_of_parquet(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00003.parquet", 0)
    write_parquet(tmp_path / "train-00002-of-00003.parquet", 2)
    with pytest.raises(UserError, match="shard 00001 of 3 of split train is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize("line", [b'{"id": 2, "conversations": ', b"\xff\xfe", b"[1, 2]", b'"text"'])
def test_a_broken_line_is_a_bad_row_and_the_rest_stands(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n" + json.dumps(ROWS[1]).encode())
    source = open_source(path)
    with pytest.raises(BadRow, match=r"row 2 \(line 3\): ") as raised:
        source[1]
    assert raised.value.reason == "malformed"
    assert source[2].id == "1"


def test_pickles_small_and_reads_elsewhere(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row(n, "word " * 200)) + "\n" for n in range(1000)))
    source = open_source(path)
    assert source[999].id == "999"
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000  # the index is a file that every process maps
    assert pickle.loads(pickled)[17] == source[17]


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MIN_INDEXED_BYTES", 1)
    path, index = tmp_path / "data.jsonl", tmp_path / ".data.jsonl.index.npy"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert open_source(path)[3].id == "3" and index.exists()
    with monkeypatch.context() as patch:
        patch.setattr(json_rows, "_find_rows", lambda *_: pytest.fail("the file was read again"))
        assert open_source(path)[3].id == "3"
    about = path.stat()
    path.write_text("\n" + "".join(json.dumps(r) + "\n" for r in reversed(ROWS)))
    assert open_source(path)[0].id == str(len(ROWS) - 1)  # another size
    path.write_text("\n" + "".join(json.dumps(r) + "\n" for r in ROWS))
    os.utime(path, ns=(0, about.st_mtime_ns + 1))
    assert open_source(path)[0].id == "0"  # the same size, another time
    for spoilt in (b"", b"x" * 100, index.read_bytes()[:-30]):
        index.write_bytes(spoilt)
        assert [open_source(path)[i].id for i in range(len(ROWS))] == [str(r["id"]) for r in ROWS]
    assert sorted(os.listdir(tmp_path)) == [index.name, path.name]


def test_mixtures_name_their_sources_and_shares(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([row(n, image="1.jpg") for n in range(10)]))
    (tmp_path / "sub" / "b.jsonl").write_text("".join(json.dumps({"messages": MESSAGES}) + "\n" for n in range(4)))

    def mixture(*parts, **more):
        (tmp_path / "mix.json").write_text(json.dumps({"mixture": parts, **more}, indent=1))
        return open_mixture(tmp_path / "mix.json")

    a, b = {"path": "a.json"}, {"path": "sub/b.jsonl"}
    assert mixture(a, b).counts == (10, 4)
    assert mixture(a | {"epochs": 0.25}, b | {"count": 7}).counts == (2, 7)
    assert mixture(a | {"weight": 1}, b | {"weight": 3.0}).counts == (4, 10)
    found = mixture(a | {"image_root": "pictures"}, b)
    assert found.sources[0][3].images == (f"{tmp_path}/pictures/1.jpg",) and found.starts == (0, 10, 14)
    plain = open_mixture(tmp_path / "a.json")
    assert plain.counts == (10,) and plain.sources[0][3].images == (f"{tmp_path}/1.jpg",)
    for parts, more, says in [
        ((a | {"weight": 1}, b), {}, "part 2 of the mixture has no weight"),
        ((a | {"count": 0},), {}, "part 1 of the mixture: count must be a positive whole number"),
        ((a | {"epochs": True},), {}, "epochs must be a positive number"),
        ((a | {"epochs": 0.01}, b), {}, "part 1 gives no row"),
        ((a | {"count": 1, "epochs": 1},), {}, "give one of epochs and count"),
        ((a, {"image_root": "x"}), {}, "part 2 of the mixture: path is missing"),
        ((a | {"share": 1},), {}, "share is unknown; there are path"),
        ((a,), {"seed": 1}, "and nothing else"),
        ((), {}, "and nothing else"),
        ((a, 5), {}, "part 2 of the mixture: it must be an object"),
    ]:
        with pytest.raises(UserError, match=says) as raised:
            mixture(*parts, **more)
        assert str(raised.value).startswith(f"{tmp_path}/mix.json: ")
    mixture(a)
    (tmp_path / "outer.json").write_text(json.dumps({"mixture": [{"path": "mix.json"}]}))
    with pytest.raises(UserError, match="outer.json: mix.json is a mixture itself"):
        open_mixture(tmp_path / "outer.json")
    with pytest.raises(UserError, match="nothing.json: no such data file"):
        mixture(a, {"path": "nothing.json"})
