import json
import random

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.mme import COGNITION, INSTRUCTION, PERCEPTION, Mme, find_question, parse_yes_no

SUFFIX = "\nAnswer the question using a single word or phrase."
IN_IMAGES = ("posters", "celebrity", "scene", "landmark", "artwork")  # categories with folders of their own inside


@pytest.fixture
def folder(tmp_path):
    """All 14 categories, three pictures each; some of MME's files have two blanks before the instruction."""
    questions = []
    for category in (*COGNITION, *PERCEPTION):
        pairs = tmp_path / "MME_Benchmark_release_version" / category
        if category in IN_IMAGES:
            (pairs / "images").mkdir(parents=True)
            pairs = pairs / "questions_answers_YN"
        pairs.mkdir(parents=True)
        for name in ("0001", "0002", "a.b"):
            asked = [f"Is this {name} of {category}?", f"Is there a {category}, {name}?"]
            blanks = "  " if name == "0002" else " "
            file = pairs / f"{name.split('.')[0]}.txt"
            labelled = zip(asked, ("Yes", "No"), strict=True)
            file.write_text("".join(f"{question}{blanks}{INSTRUCTION}\t{label}\n" for question, label in labelled))
            image = f"{category}/images/{name}.jpg" if category in IN_IMAGES else f"{category}/{name}.jpg"
            questions += [{"question_id": image, "image": image, "text": question + SUFFIX, "category": category}
                          for question in asked]
    (tmp_path / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return tmp_path


def answers_to(questions, texts):
    return [Answer(question.id, text, question.text) for question, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("text, expected", [
    ("Yes", "yes"), ("NO.", "no"), ("", "other"), (" yes", "yes"), ("  yes", "other"), ("ayes", "yes"), ("know", "no"),
    ("nothing", "no"), ("noye", "no"), ("I don", "other"), ("i no", "no"), ("\tno", "no"), ("yes, no", "yes"),
    ("İyes", "other"),  # in lower case the first letter is two
    ("Hyes", "yes"), ("HHyes", "other"), ("n o", "other"), ("None", "no"), ("\nyes", "yes"),
])
def test_says(text, expected):
    assert parse_yes_no(text) == expected


def official(rows):
    """The tool's arithmetic on (category, label, text), step by step."""
    figures = {}
    for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
        figures[name] = 0
        for category in categories:
            lines = [(label, text) for c, label, text in rows if c == category]
            right = pairs = others = 0
            while lines:
                pair, lines = lines[:2], lines[2:]
                correct = 0
                for label, text in pair:
                    head = "".join(list(text.lower())[:4])
                    word = "yes" if head.find("yes") >= 0 else "no" if head.find("no") >= 0 else "other"
                    correct += word == label
                    others += word == "other"
                right += correct
                pairs += correct == 2
            figures[f"{category} other"] = others
            figures[category] = right / 6 * 100 + pairs / 3 * 100
            figures[name] += figures[category]
    return figures


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_the_official_tools(folder, seed):
    questions = Mme().load(str(folder))
    texts = odd_texts(len(questions), seed, ("Yes", "No", "yes", "no.", "Yes, it is"))
    scores = Mme().score(str(folder), questions, answers_to(questions, texts))
    expected = official([(question.row["category"], ("yes", "no")[n % 2], text)
                         for n, (question, text) in enumerate(zip(questions, texts, strict=True))])
    for name, value in expected.items():
        assert scores.figures[name] == pytest.approx(value), name
    assert list(scores.figures)[:4] == ["perception", "cognition", "existence", "count"]
    assert scores.figures["OCR"] == pytest.approx(scores.figures["OCR accuracy"] + scores.figures["OCR accuracy+"])
    assert [item.parsed for item in scores.items] == [parse_yes_no(text) for text in texts]


def test_best_and_worst(folder):
    questions = Mme().load(str(folder))
    best = Mme().score(str(folder), questions, answers_to(questions, ["Yes", "No"] * 42))
    assert best.figures["perception"] == 2000 and best.figures["cognition"] == 800 and best.main == "perception"
    yes = Mme().score(str(folder), questions, answers_to(questions, ["Yes"] * 84))
    assert yes.figures["perception"] == 500 and yes.figures["color accuracy+"] == 0


def test_pairs_are_neighbours_in_the_file(folder):
    questions = Mme().load(str(folder))
    answers = answers_to(questions, ["Yes", "No"] * 42)
    random.Random(0).shuffle(answers)
    scores = Mme().score(str(folder), questions, answers)
    assert scores.figures["perception"] == 2000 and any("order" in note for note in scores.notes)
    # Wrong on one question of each of two pictures: one pair or two are lost, by which lines are neighbours.
    answers = answers_to(questions, ["Yes", "No"] * 42)
    of_count = [n for n, question in enumerate(questions) if question.row["category"] == "count"]
    answers[of_count[0]], answers[of_count[2]] = (
        Answer(questions[of_count[k]].id, "No", questions[of_count[k]].text) for k in (0, 2))
    assert Mme().score(str(folder), questions, answers).figures["count accuracy+"] == pytest.approx(100 / 3)
    answers[of_count[1]], answers[of_count[2]] = answers[of_count[2]], answers[of_count[1]]
    assert Mme().score(str(folder), questions, answers).figures["count accuracy+"] == pytest.approx(200 / 3)


def test_part_of_the_answers(folder):
    questions = Mme().load(str(folder))
    scores = Mme().score(str(folder), questions, answers_to(questions, ["Yes", "No"] * 42)[:-1])
    assert any("odd number" in note for note in scores.notes)
    assert scores.figures["OCR accuracy+"] == pytest.approx(200 / 3)
    only = Mme().score(str(folder), questions, answers_to(questions, ["Yes", "No"] * 42)[:12])
    assert "perception" not in only.figures and only.main == "cognition" and only.figures["cognition"] == 400
    assert any("cognition without text_translation" in note for note in only.notes)


def test_writes_what_the_official_tool_reads(folder, tmp_path):
    questions = Mme().load(str(folder))
    texts = ["Yes", "No"] * 41 + ["a\tb\nc", "\ud800"]
    paths = Mme().write_submission(str(folder), questions, answers_to(questions, texts), str(tmp_path / "out"))
    assert len(paths) == 14
    lines = (tmp_path / "out/mme/posters.txt").read_text().splitlines()
    assert lines[0] == f"0001.txt\tIs this 0001 of posters? {INSTRUCTION}\tYes\tYes"
    assert lines[2] == f"0002.txt\tIs this 0002 of posters?  {INSTRUCTION}\tYes\tYes" and len(lines) == 6
    last = (tmp_path / "out/mme/OCR.txt").read_text().splitlines()
    assert last[-2:] == [
        f"a.txt\tIs this a.b of OCR? {INSTRUCTION}\tYes\ta b c", f"a.txt\tIs there a OCR, a.b? {INSTRUCTION}\tNo\t?"]


def test_lookup_of_prompts_as_the_original_changes_them():
    truth = {("c", "x.txt", f"Q? {INSTRUCTION}"): "Yes", ("c", "x.txt", f"R?  {INSTRUCTION}"): "No"}
    for prompt in ("Q?" + SUFFIX, "Q?", f"Q? {INSTRUCTION}", f"Q? {INSTRUCTION}{SUFFIX}", "  Q? " + SUFFIX):
        assert find_question(truth, "c/images/x.y.png", prompt) == ("c", "x.txt", f"Q? {INSTRUCTION}", "Yes")
    assert find_question(truth, "c/x.png", "R?" + SUFFIX)[3] == "No"
    for id, prompt in (("c/x.png", "S?"), ("d/x.png", "Q?"), ("c/x.png", "Q? "), ("c/x.png", f"R? {INSTRUCTION}")):
        with pytest.raises(UserError, match="has no question"):
            find_question(truth, id, prompt)


@pytest.mark.parametrize("file, content, message", [
    ("count/0001.txt", "Is it? Yes\n", "line 1: not a question, a tab and Yes or No"),
    ("count/0001.txt", "Is it?\tmaybe\n", "not a question"),
    ("count/0001.txt", f"Another question? {INSTRUCTION}\tYes\n", "count/0001.txt has no question"),
])
def test_folder_of_another_version(folder, file, content, message):
    (folder / "MME_Benchmark_release_version" / file).write_text(content)
    with pytest.raises(UserError, match=message):
        Mme().load(str(folder))


def test_missing_category(folder):
    (folder / "MME_Benchmark_release_version/OCR").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="OCR: no such folder"):
        Mme().load(str(folder))
