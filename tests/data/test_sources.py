"""Files told apart by content, rows read by random access, and one clear line for every file that is none."""

import json
import pickle

import pytest

from llava_jax.data.records import BadRow
from llava_jax.data.sources import Source

TEXTS = ["plain", "naïve café", '日本語 [1, {2}] "quoted" \\ back', "😀\u2028 \x85\xa0 \ud83d", "a\nb\ttab", "", "}]"]


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
    path.write_bytes(text.encode("utf-8", "surrogatepass" if "raw" not in how else "strict"))


WAYS = [
    "lines",
    "lines, raw text, blanks, no last newline",
    "list on one line",
    "list, indented, raw text",
    "list with a byte order mark, raw",
]


@pytest.mark.parametrize("how", WAYS)
def test_every_row_of_every_kind_of_file(how, tmp_path):
    rows = [r for r in ROWS if "raw" not in how or "\ud83d" not in r["conversations"][1]["value"]]
    path = tmp_path / "data.txt"  # the name tells nothing
    write(path, rows, how)
    source = Source(path)
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
        where = Source(path)[index].source
        line = int(where.split("(line ")[1].split(")")[0])
        assert where == f"{path}, row {index + 1} (line {line}), id {index}"
        assert lines[line].strip() == f'"id": {index},'  # the line after the opening brace


def test_images_are_joined_to_the_root(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(0, image="coco/1.jpg"), row(1, image="a/../b.jpg")]))
    assert Source(path)[0].images == (f"{tmp_path}/coco/1.jpg",)
    assert Source(path, tmp_path / "images")[1].images == (f"{tmp_path}/images/b.jpg",)


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg", "../images2/x.jpg", "."])
def test_a_path_that_leaves_the_root_is_refused(image, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(0, image=image)]))
    with pytest.raises(BadRow, match=r"row 1 \(line 1\), id 0: image .* is outside the image root .*images") as raised:
        Source(path, tmp_path / "images")[0]
    assert raised.value.reason == "malformed"
    absolute = tmp_path / "images" / "1.jpg"
    path.write_text(json.dumps([row(0, image=str(absolute))]))
    assert Source(path, tmp_path / "images")[0].images == (str(absolute),)


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "the file is empty"),
        ("  \n\n ", "the file has no rows"),
        ("[]", "the file has no rows"),
        ("\n[\n]\n", "the file has no rows"),
        ('[{"id": 1},\n {"id": 2}', "line 2: broken JSON .a comma or the end of the list is missing"),
        ('[{"id": 1},\n {"id": 2}\n,', "line 3: broken JSON .Expecting value"),
        ('[{"id": 1},\n{"id": "2', "line 2: broken JSON .Unterminated string"),
        ('[{"id": 1}\n{"id": 2}]', "line 2: broken JSON .a comma"),
        ('[{"id": 1}]\n\n{"id": 2}', "line 3: broken JSON .there is more"),
        ('{\n "images": [],\n "annotations": []}', "line 1: the file is neither a JSON list of rows nor JSON lines"),
        ("\nid,image\n1,a.jpg", "line 2: the file is neither"),
        ("\x89PNG\r\n\x1a\n", "line 1: the file is neither"),
    ],
)
def test_files_that_are_none(content, says, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says) as raised:
        Source(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such data file"):
            Source(path)


@pytest.mark.parametrize("line", [b'{"id": 2, "conversations": ', b"\xff\xfe", b"[1, 2]", b'"text"'])
def test_a_broken_line_is_a_bad_row_and_the_rest_stands(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n" + json.dumps(ROWS[1]).encode())
    source = Source(path)
    with pytest.raises(BadRow, match=r"row 2 \(line 3\): ") as raised:
        source[1]
    assert raised.value.reason == "malformed"
    assert source[2].id == "1"


def test_pickles_small_and_reads_elsewhere(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row(n, "word " * 200)) + "\n" for n in range(1000)))
    source = Source(path)
    assert source[999].id == "999"
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000 * 24 + 1000
    assert pickle.loads(pickled)[17] == source[17]
