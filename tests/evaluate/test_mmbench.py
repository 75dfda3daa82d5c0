import base64
import csv
import sys

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.mmbench import MMBench, MMBenchCN, is_missing, parse_letter

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split")
OPTIONS = ("red", "green", "blue", "black")
PICTURE = base64.b64encode(bytes(range(256)) * 800).decode()  # longer than csv's limit for a cell


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([row.get(name, "") for name in COLUMNS] for row in rows)


def row(index, /, **values):
    return {"index": index, "question": f"What, {index}?", "hint": "nan", **dict(zip("ABCD", OPTIONS, strict=True)),
            "answer": "ABCD"[index % 4], "category": ("colour", "place")[index % 2], "image": PICTURE,
            "l2-category": "coarse", "comment": "", "split": "dev"} | values


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "mmbench_dev_20230712.tsv", [
        row(3), row(0, hint='A "hint"\nof two lines'), row(1, D="None"), row(2, C="NA", D="never read"),
        row(7, question="中文?", A="1", B="2", C="3", D="4")])
    return tmp_path


def answers_to(questions, texts):
    return [Answer(question.id, text, question.prompt, {"round_id": question.fields["round_id"]})
            for question, text in zip(questions, texts, strict=True)]


def test_prompts(folder):
    questions = MMBench().load(str(folder))
    suffix = "\nAnswer with the option's letter from the given choices directly."
    assert [question.id for question in questions] == [3, 0, 1, 2, 7]
    assert questions[0].prompt == "What, 3?\nA. red\nB. green\nC. blue\nD. black"
    assert questions[0].text == questions[0].prompt + suffix
    assert questions[1].prompt.startswith('A "hint"\nof two lines\nWhat, 0?\nA. red')
    assert questions[2].prompt.endswith("\nB. green\nC. blue") and questions[2].choices == ("A", "B", "C")
    assert questions[3].prompt.endswith("\nA. red\nB. green")  # nothing after the first that is missing
    assert questions[0].images == (bytes(range(256)) * 800,) and "image" not in questions[0].row
    assert questions[0].fields == {"round_id": 0, "options": list(OPTIONS), "option_char": list("ABCD")}
    write(folder / "mmbench_dev_cn_20231003.tsv", [row(0)])
    assert MMBenchCN().load(str(folder))[0].text.endswith("D. black\n请直接回答选项字母。")


def test_rounds_turn_the_options(folder):
    questions = MMBench(all_rounds=True).load(str(folder))
    assert [question.id for question in questions] == [3] * 4 + [0] * 4 + [1] * 3 + [2] * 2 + [7] * 4
    assert questions[1].prompt == "What, 3?\nA. green\nB. blue\nC. black\nD. red"
    assert questions[3].fields == {"round_id": 3, "options": ["black", "red", "green", "blue"],
                                   "option_char": ["D", "A", "B", "C"]}


@pytest.mark.parametrize("text, letter", [
    ("A", "A"), (" b. ", "B"), ("..C..", "C"), ("D.", "D"), ("E", None), ("A. red", "A"), ("(B) green", "B"),
    ("C: blue", "C"), ("I think the answer is b. Yes", "B"), ("The answer is B", None), ("red", "A"), ("BLUE", "C"),
    ("bl", None), ("", None), ("purple", None), ("A or B", None), ("e", None), ("een", None), ("\n D \n", "D"),
    ("Red.", "A"),
])
def test_read_letter(text, letter):
    assert parse_letter(text, OPTIONS) == letter


def test_letters_beyond_the_options():
    assert parse_letter("D", OPTIONS[:3]) is None and parse_letter("D. black", OPTIONS[:3]) is None
    assert parse_letter("b", ("b", "a")) == "B" and parse_letter("x", ("x", "X")) is None


@pytest.mark.parametrize("seed", range(5))
def test_all_rounds_right_or_wrong(folder, seed):
    task = MMBench(all_rounds=True)
    questions = task.load(str(folder))
    texts = odd_texts(len(questions), seed, ("A", "B.", "C", "D"))
    for n, question in enumerate(questions):
        if question.id in (3, 7):  # right in all rounds: the option moves, and the letter with it
            option = question.row[question.row["answer"]]
            texts[n] = "ABCD"[question.fields["options"].index(option)]
    answers = answers_to(questions, texts)
    scores = task.score(str(folder), questions, answers)
    right = {}
    for question, text in zip(questions, texts, strict=True):
        letter = parse_letter(text, question.fields["options"])
        said = letter and question.fields["options"]["ABCD".index(letter)]
        right.setdefault(question.id, []).append(said == question.row[question.row["answer"]])
    assert scores.main == "circular"
    assert scores.figures["circular"] == pytest.approx(20 * sum(map(all, right.values())))
    assert scores.figures["accuracy"] == pytest.approx(100 * sum(map(sum, right.values())) / 17)
    assert scores.figures["category: place"] == pytest.approx(100 / 3 * sum(all(right[id]) for id in (3, 1, 7)))
    assert scores.figures["l2-category: coarse"] == scores.figures["circular"] >= 40
    less = task.score(str(folder), questions, [a for a in answers if (a.id, a.line["round_id"]) != (3, 2)])
    assert less.figures["circular"] == pytest.approx(scores.figures["circular"] - 20)


def test_copies_of_a_question_in_the_table(folder):
    """The published table has the rotations as rows of their own."""
    rows = [row(5), row(1_000_005, A="green", B="blue", C="black", D="red", answer="A"), row(4)]
    write(folder / "mmbench_dev_20230712.tsv", rows)
    questions = MMBench().load(str(folder))
    scores = MMBench().score(str(folder), questions, answers_to(questions, ["B", "B", "A"]))
    assert scores.figures["circular"] == 50 and scores.figures["accuracy"] == pytest.approx(200 / 3)
    single = MMBench().score(str(folder), questions[2:], answers_to(questions[2:], ["A"]))
    assert single.main == "accuracy" and "circular" not in single.figures


def test_answers_with_other_rounds_than_were_asked(folder):
    questions = MMBench().load(str(folder))
    with pytest.raises(UserError, match="round 1 of question 3, which was not asked; .*--all-rounds"):
        MMBench().score(str(folder), questions, [Answer(3, "A", "", {"round_id": 1})])


def test_table_without_answers(folder):
    write(folder / "mmbench_dev_20230712.tsv", [row(0, answer="")])
    questions = MMBench().load(str(folder))
    scores = MMBench().score(str(folder), questions, answers_to(questions, ["A"]))
    assert scores.figures == {} and any("upload" in note for note in scores.notes)


def test_upload(folder, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    questions = MMBench().load(str(folder))
    answers = answers_to(questions, ["first", "=1+1", "a\x00b\ud800", "é中", "9"])
    [path] = MMBench().write_submission(str(folder), questions, [*answers[:4], Answer(3, "last")], str(tmp_path / ""))
    table = [list(line) for line in openpyxl.load_workbook(path).active.iter_rows(values_only=True)]
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[1] == [3, "What, 3?", *OPTIONS, "last", "D", "dev"]
    assert table[2][6] == "=1+1" and openpyxl.load_workbook(path).active["G3"].data_type == "s"
    assert [line[6] for line in table[3:]] == ["ab?", "é中", None]
    assert table[3][5] is None and table[4][4:6] == [None, "never read"]
    assert [line[0] for line in table[1:]] == [3, 0, 1, 2, 7]


def test_upload_without_openpyxl(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    questions = MMBench().load(str(folder))
    with pytest.raises(UserError, match="pip install openpyxl"):
        MMBench().write_submission(str(folder), questions, answers_to(questions, ["A"] * 5), str(tmp_path))


@pytest.mark.parametrize("value", [None, "", "nan", "NaN", "NAN", "None", "none", "NONE", "NA", "N/A", "null", "<NA>"])
def test_no_value(value):
    assert is_missing(value)


@pytest.mark.parametrize("value", ["0", "na", "Nope", " ", "nil", "NaN."])
def test_a_value(value):
    assert not is_missing(value)


@pytest.mark.parametrize("rows, message", [
    ([row(0), row(0)], "1 rows have the index of another"), ([row(0, index="x")], "line 2: the index 'x'"),
    ([row(0, A="")], "no question or no options"), ([row(0, question="nan")], "no question or no options"),
    ([row(0, image="abcde")], "line 2: the image is not in base64"), ([], "the table has no rows"),
])
def test_broken_tables(tmp_path, rows, message):
    write(tmp_path / "mmbench_dev_20230712.tsv", rows)
    with pytest.raises(UserError, match=message):
        MMBench().load(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_the_table(folder):
    path, read = folder / "mmbench_dev_20230712.tsv", MMBench().load(str(folder))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert MMBench().load(str(folder)) == read
    path.write_bytes(path.read_text("utf-8-sig").encode("utf-16"))
    with pytest.raises(UserError, match=r"mmbench_dev_20230712\.tsv, after line 0: no UTF-8"):
        MMBench().load(str(folder))


def test_table_of_another_benchmark(tmp_path):
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("index\tquestion\tA\tB\n1\tQ\tx\ty\n")
    with pytest.raises(UserError, match="no column hint, C, D, image"):
        MMBench().load(str(tmp_path))
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("\t".join(COLUMNS) + "\n" + "1\t" * 20 + "\n")
    with pytest.raises(UserError, match="more cells than the first line"):
        MMBench().load(str(tmp_path))
