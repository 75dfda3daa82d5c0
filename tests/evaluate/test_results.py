"""What a run leaves behind: figures beside the published ones, a page, and two runs side by side."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.runner import compare, published, results, results_page, tables
from llava_jax.evaluate.runner.answer_file import make_line, to_answer
from llava_jax.evaluate.runner.compare import CompareRuns
from llava_jax.evaluate.runner.results_page import QuestionCard, ShownAnswer
from llava_jax.evaluate.tasks.base import TASKS, Question, ScoredAnswer, Scores
from llava_jax.evaluate.tasks.scenes import Scenes

NASTY = "<script>alert('\"&$body\ud800</b> | *é\nx"


@pytest.fixture
def data(tmp_path):
    """Five questions about two pictures, one of which is not there."""
    Image.new("RGB", (400, 100), (200, 30, 30)).save(tmp_path / "a.png")
    rows = [{"question_id": i, "image": ("a.png", "gone.png")[i == 4], "text": f"{NASTY} {i}?", "answer": "red",
             "kind": ("colour", NASTY)[i % 2]} for i in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write(data, name, texts):
    """A run's folder, as `EvaluateCommand` writes it."""
    folder = data / name
    folder.mkdir()
    questions = Scenes().load(str(data))
    lines = [make_line(question, text, name) for question, text in zip(questions, texts, strict=False)]
    scores = Scenes().score("", questions[: len(lines)], [to_answer(line) for line in lines])
    settings = {"name": name, "benchmark": "scenes", "data": str(data), "options": {}, "model": None,
                "questions_hash": results.hash_questions(questions)}
    results.write(str(folder), Scenes(), settings, questions, lines, scores, [str(folder / "upload.json")])
    return folder


class Reader(HTMLParser):
    """The text of a page's elements by their classes, and every tag with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(dict(attributes).get("class", tag))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))


def test_a_run_can_be_read_again(data):
    folder = write(data, "one", ["Red.", "blue", "red", NASTY, ""])
    result = json.loads((folder / "results.json").read_text(errors="replace"))
    assert result["figures"]["overall"] == 40 and result["main"] == "overall" and result["uploads"] == ["upload.json"]
    assert result["versions"]["jax"] and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", result["date"])
    items = [json.loads(line) for line in open(folder / "items.jsonl", errors="replace")]
    assert [item["score"] for item in items] == [1, 0, 1, 0, 0] and items[0]["read"] == "red"
    assert "| overall " in (folder / "results.md").read_text() and "40.00" in (folder / "results.md").read_text()


def test_the_page_shows_every_question_and_runs_nothing_of_it(data):
    page = (write(data, "one", ["Red.", "blue", "red", NASTY, ""]) / "results.html").read_text()
    reader = Reader(page)
    shown = NASTY.replace("\ud800", "\\ud800")
    assert [text for kind, text in reader.texts if kind == "question"] == [f"{shown} {i}?" for i in range(5)]
    assert shown in [text for kind, text in reader.texts if kind == "answer-text"]
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert not [value for _, attributes in reader.tags for value in attributes.values() if "http" in (value or "")]
    articles = [attributes for tag, attributes in reader.tags if tag == "article"]
    assert [article["data-state"] for article in articles] == ["right", "wrong", "right", "wrong", "wrong"]
    assert {article["data-category"] for article in articles} == {"colour", shown}
    # One picture for four questions, in the page itself; a missing one is told.
    [data_url] = re.findall(r"url\(data:image/png;base64,([^)]*)\)", page)
    picture = Image.open(io.BytesIO(base64.b64decode(data_url)))
    assert picture.size == (288, 72) and picture.getpixel((9, 9)) == pytest.approx((200, 30, 30), abs=4)
    assert len([1 for tag, attributes in reader.tags if "picture" in attributes.get("class", "")]) == 4
    assert any("no picture:" in text and "gone.png" in text for _, text in reader.texts)


def test_pictures_from_outside_are_never_on_a_page(data):
    """Neither by a way out, nor by a link; a picture in the folder, and a folder that is a link itself, are fine."""
    secret = data.parent / f"{data.name}-secret.png"
    Image.new("RGB", (40, 40), (9, 99, 9)).save(secret)
    (data / "link.png").symlink_to(secret)
    (data / "linked").symlink_to(secret.parent)
    (data / "inside.png").symlink_to(data / "a.png")
    names = ["a.png", f"../{secret.name}", str(secret), "link.png", f"linked/{secret.name}", "inside.png", "x\0.png"]
    rows = [{"question_id": i, "image": name, "text": "Q", "answer": "red", "kind": "k"}
            for i, name in enumerate(names)]
    (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = write(data, "one", ["red"] * len(names))
    (data / "moved").symlink_to(data)
    assert CompareRuns(str(one), str(one), all=True).run() == 0
    for page in ((one / "results.html").read_text(), (one / "compare.html").read_text()):
        pictures = [Image.open(io.BytesIO(base64.b64decode(url))) for url in re.findall(r"base64,([^)]*)\)", page)]
        assert [picture.getpixel((5, 5)) == pytest.approx((200, 30, 30), abs=4) for picture in pictures] == [True, True]
        assert page.count("is outside of") == 5
    settings = {"name": "m", "benchmark": "scenes", "data": str(data / "moved"), "options": {}, "questions_hash": ""}
    task, lines = Scenes(), [{"question_id": 0, "text": "red", "prompt": "Q"}]
    questions = task.load(str(data / "moved"))[:1]
    results.write(str(one), task, settings, questions, lines, Scores({}, ""), [])
    assert "base64" in (one / "results.html").read_text()


def test_no_text_of_others_steers_the_terminal(tmp_path, capsys):
    """Neither categories, answers, models and figures, nor reviews, whatever their files hold."""
    steer = "\x1b[2J\x1b]0;x\x07\u202e\x9b1m"
    rows = [{"question_id": f"{n}{steer}", "image": "a.png", "text": f"Q{steer}", "answer": "red", "kind": f"k{steer}"}
            for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"question_id": row["question_id"], "text": f"{steer}!", "prompt": row["text"], "model_id": f"m{steer}"}
             for row in rows]
    path, out = tmp_path / "answers.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.main(["scenes", "--data", str(tmp_path), "--answers", str(path), "--out", str(out)]) == 0
    assert evaluate.main(["compare", str(out / "scenes"), str(out / "scenes")]) == 0
    reviews = tmp_path / f"reviews{steer}.jsonl"
    reviews.write_text("".join(json.dumps({"question_id": n, "category": f"c{steer}", "content": steer, "tuple": pair})
                               + "\n" for n, pair in enumerate(([8, 7], [-1, -1]))))
    assert evaluate.main(["reviews", str(reviews), "--max-failed", "1"]) == 0
    assert evaluate.main(["reviews", str(reviews), "--compat"]) == 0
    printed = capsys.readouterr()
    assert "3 of 3 answers are no word" in printed.out and "k\ufffd[2J" in printed.out and "c\ufffd[2J" in printed.out
    assert not set(printed.out + printed.err) & set("\x1b\x07\x9b\u202e")


def test_of_many_questions_the_page_shows_some_of_each():
    def cards(right, wrong):
        return [QuestionCard(n, "", "", "", "right" if n < right else "wrong", [ShownAnswer("", "", "", None)], ())
                for n in range(right + wrong)]

    for right, wrong, shown_right, shown_wrong in ((600, 400, 600, 400), (5000, 5000, 300, 700), (5000, 10, 990, 10),
                                                   (50, 5000, 50, 950)):
        chosen = results_page.choose_cards(cards(right, wrong), ("right",))
        states = [card.state for card in chosen]
        assert (states.count("right"), states.count("wrong")) == (shown_right, shown_wrong)
        numbers = [card.id for card in chosen]
        assert numbers == sorted(set(numbers)) and numbers[-1] > (right + wrong) * 0.99 - 10


def test_rows_find_their_items():
    """Items of another order than the answers, and some that are missing; ids that are doubled."""
    lines = [{"question_id": id, "text": str(n)} for n, id in enumerate(["a", "b", "a", "c"])]
    items = [ScoredAnswer("b", 0.5), ScoredAnswer("a", 0.1), ScoredAnswer("a", 0.2)]
    rows = results.item_rows(Scores({}, "", items), lines)
    assert [row["score"] for row in rows] == [0.1, 0.5, 0.2, None]


def test_figures_stand_beside_the_published(data):
    scores = Scores({"IMG-accuracy": 66.75, "Avg": 70.123, "other": 1}, "IMG-accuracy")
    table = results.beside_published(scores, "mine", published.published_results()["scienceqa"])
    by_name = {row[0]: dict(zip(table[0], row, strict=True)) for row in table}
    assert by_name["mine"]["IMG-accuracy"] == "66.75" and by_name["mine"]["Avg"] == "70.12"
    assert by_name["LLaVA-1.5 7B"]["IMG-accuracy"] == "66.8" and by_name["LLaVA + GPT-4, judge"]["Avg"] == "92.53"
    assert by_name["mine"]["NAT"] == "" and "other" not in table[0]
    wild = {row.model: row for row in published.published_results()["llava-bench-wild"]}
    assert wild["BLIP-2"].cell("conv") == "54.6 ± 1.4" and wild["BLIP-2"].cell("x") == ""


def test_published_figures_are_of_benchmarks_that_there_are():
    for task, rows in published.published_results().items():
        assert task in TASKS and all(row.source and row.figures for row in rows)
        assert len({row.model for row in rows}) == len(rows)


def test_markdown_tables():
    text = tables.markdown([["", "a|b", "F1"], ["one\nline", "1", tables.number(1234.567)], ["", "", tables.number(7)]])
    assert text.splitlines() == ["|          | a\\|b |       F1 |", "|----------|-----:|---------:|",
                                 "| one line |    1 | 1,234.57 |", "|          |      |        7 |"]
    assert tables.number(None) == ""


def test_two_runs_side_by_side(data, capsys):
    write(data, "one", ["red", "blue", "red", "red"])
    write(data, "two", ["red", "red", "green", "Red.", "red"])
    assert CompareRuns(str(data / "one"), str(data / "two")).run() == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| overall +\| +75\.00 \| +80\.00 \| +\+5\.00 \|", printed)
    for line in ("4 questions; 3 are answered in other words", "both right: 2", "one is better: 1", "two is better: 1",
                 "one run has more answers"):
        assert line in printed
    reader = Reader((data / "two" / "compare.html").read_text())
    states = [attributes["data-state"] for tag, attributes in reader.tags if tag == "article"]
    assert states == ["two is better", "one is better", "both right"]
    answers = [text for kind, text in reader.texts if kind == "answer-text"]
    assert answers == ["blue", "red", "red", "green", "red", "Red."]
    assert CompareRuns(str(data / "one"), str(data / "one"), out=str(data / "x.html"), all=True).run() == 0
    assert "(2)" in (data / "x.html").read_text()


def test_what_cannot_be_compared_is_told(data):
    one = write(data, "one", ["red"])
    with pytest.raises(UserError, match=r"results\.json: no such file; a run is a folder"):
        CompareRuns(str(one), str(data)).run()
    other = data / "other"
    other.mkdir()
    (other / "results.json").write_text("[]")
    with pytest.raises(UserError, match="not results of evaluate"):
        CompareRuns(str(one), str(other)).run()
    result = json.loads((one / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(result | {"benchmark": "pope"}))
    (other / "items.jsonl").write_text("")
    with pytest.raises(UserError, match="is a run of scenes, and .* of pope"):
        CompareRuns(str(one), str(other)).run()
    (other / "results.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="no question in common"):
        CompareRuns(str(one), str(other)).run()
    with pytest.raises(UserError, match=r"results\.json: there is something else than a page; give --out another"):
        CompareRuns(str(one), str(one), out=str(one / "results.json")).run()
    assert json.loads((one / "results.json").read_text()) == result
    assert compare.pair([], []) == []


def test_hashes_tell_runs_apart(tmp_path):
    one = [Question(1, "a", ("x/b.png",)), Question(2, "b", (b"1",))]
    assert results.hash_questions(one) == results.hash_questions([Question(1, "a", ("y/b.png",)), one[1]])
    others = [one[:1], one[::-1], [one[0], Question(2, "b", (b"2",))], [Question(1, "a", ("x/c.png",)), one[1]],
              [Question(1, "a ", ("x/b.png",)), one[1]], [Question("1", "a", ("x/b.png",)), one[1]]]
    assert len({results.hash_questions(questions) for questions in [one, *others]}) == 7
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3_000_000))
    before = results.hash_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("not the model")
    assert results.hash_model(str(tmp_path)) == before
    for place in (0, 1_500_000, 2_999_999):  # in weights of several megabytes, a change of some kilobytes
        content = bytearray(3_000_000)
        content[max(0, place - 12_000) : place + 12_000] = b"\1" * len(content[max(0, place - 12_000) : place + 12_000])
        path.write_bytes(content)
        assert results.hash_model(str(tmp_path)) != before
