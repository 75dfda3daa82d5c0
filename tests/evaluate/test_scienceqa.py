import json
import random
import re
from pathlib import Path

import pytest

from llava_jax.errors import UserError
from llava_jax.evaluate.scienceqa.problems import compose_listed, write_conversations
from llava_jax.evaluate.scienceqa.task import ScienceQA, choice, parse_answer, parse_statement
from llava_jax.evaluate.tasks import base
from llava_jax.evaluate.tasks.base import Answer

PROBLEMS = json.loads((Path(__file__).parents[1] / "golden" / "scienceqa.json").read_text(encoding="utf-8"))["problems"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["3", "1", "2"]}))
    return tmp_path


def answers(texts: dict[str, str], prompts=None) -> list[Answer]:
    return [Answer(pid, text, (prompts or {}).get(pid, "")) for pid, text in texts.items()]


@pytest.mark.parametrize("text, letter", [
    ("A", "A"), ("E", "E"), ("F", "FAILED"), ("a", "FAILED"), ("A ", "FAILED"), ("A.", "FAILED"), ("", "FAILED"),
    ("B. text", "B"), ("B. ", "B"), ("B.text", "FAILED"), ("F. text", "FAILED"), ("AB", "FAILED"),
    ("So it is. The answer is C.", "C"), ("The answer is C!", "C"), ("The answer is C", "FAILED"),
    ("The answer is C\n", "FAILED"), ("The answer is  C.", "FAILED"), ("the answer is C.", "FAILED"),
    ("The answer is Z.", "Z"), ("The answer is A. The answer is A.", "FAILED"), ("The answer is Apple.", "A"),
    ("D. But The answer is C.", "D"), ("The answer is A. The answer is B", "A"), ("LECTURE\n The answer is A.", "A"),
])
def test_answers_are_read_as_the_original_reads_them(text, letter):
    assert parse_answer(text) == letter
    if text[:2] not in ("A", "E", "B.", "D."):
        assert parse_statement(text) == letter


def test_a_letter_that_no_choice_has_is_none():
    assert [choice(letter, {"choices": ["x", "y", "z"]}) for letter in ("A", "C", "D", "Z", "FAILED")] == [
        0, 2, -1, -1, -1]


def test_questions_for_the_letter_are_llava_1_5s(folder):
    first, second, third = base.get_task("scienceqa")().load(str(folder))
    assert (second.id, second.images, second.choices) == ("1", (), ("A", "B", "C"))
    assert second.text == second.prompt == (
        "Which is a mammal?\nA. newt\nB. cat fish\nC. a cow\n"
        "Answer with the option's letter from the given choices directly.")
    hint = PROBLEMS["3"]["hint"].strip()
    assert hint and first.text.startswith(f"Context: {hint}\n{PROBLEMS['3']['question']}\nA. ".replace("  ", " "))
    assert ScienceQA(input="CQM").load(str(folder))[1].text == (
        "Context: N/A\nQuestion: Which is a mammal?\nOptions: (A) newt (B) cat fish (C) a cow\n"
        "Answer with the option's letter from the given choices directly.")
    assert third.prompt == "<image>\n" + third.text and "<image>" not in third.text
    assert third.images == (str(folder / "images" / "train" / "2" / "image.png"),)
    assert first.stop == () and first.assistant_prefix == "" and ScienceQA.max_new_tokens == 1024


def test_double_blanks_are_made_single_and_an_empty_hint_is_none():
    problem = {"question": "What  is it? ", "hint": " \n", "choices": ["a   b", "c"]}
    assert compose_listed(problem) == "What is it? \nA. a  b\nB. c"
    assert compose_listed(problem | {"hint": " Two\nlines. "}).startswith("Context: Two\nlines.\nWhat is it?")


def test_the_questions_of_eval_zip_are_asked_where_they_are(folder):
    own = ScienceQA().load(str(folder))
    rows = [{"id": pid, "conversations": [{"from": "human", "value": f"<image>\nAsked {pid}? "},
                                          {"from": "gpt", "value": "A"}]}
            | ({"image": f"{pid}/image.png"} if PROBLEMS[pid]["image"] else {}) for pid in ("2", "1", "3")]
    path = folder / "llava_test_CQM-A.json"
    path.write_text(json.dumps(rows))
    read = ScienceQA().load(str(folder))
    assert [question.text.split("\n")[0] for question in read] == ["Asked 3?", "Asked 1?", "Asked 2?"]
    assert [question.images for question in read] == [question.images for question in own]
    assert ScienceQA(input="CQM").load(str(folder))[1].text.startswith("Context: N/A")
    assert ScienceQA(style="reason").load(str(folder))[1].text.startswith("Which is a mammal?")
    # The converter writes a file of the same name in another layout.
    write_conversations({pid: PROBLEMS[pid] for pid in ("3", "1", "2")}, str(path), "CQM-A")
    assert ScienceQA().load(str(folder)) == own
    for content, message in (
            ({}, "not LLaVA's questions"), ([{"id": "3", "conversations": []}], "not LLaVA's questions"),
            (rows[:2], "1 problems of the split test are not in it, the first is '3'"),
            ([row | {"image": "x"} for row in rows], "problem '1' has an image there, unlike in problems.json")):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"llava_test_CQM-A\.json: {message}"):
            ScienceQA().load(str(folder))


@pytest.mark.parametrize(("options", "figure"), [
    ({}, r"71\.6 \(13B\), 66\.8"), ({"input": "CQM"}, "not asked as a published run was"),
    ({"style": "reason"}, "Avg with 91.09"), ({"style": "prompter"}, "Avg with 90.92"),
    ({"style": "reason", "input": "QCML"}, "no published figure")])
def test_each_style_says_what_it_can_be_compared_with(folder, options, figure):
    task = ScienceQA(**options)
    notes = task.score(str(folder), task.load(str(folder)), []).notes
    assert any(re.search(figure, note) for note in notes)


def test_questions_for_reasoning_are_what_it_was_tuned_on(folder):
    for style in ("reason", "prompter"):
        question = ScienceQA(style=style).load(str(folder))[1]
        assert question.text == "Which is a mammal?\nContext: N/A\nOptions: (A) newt (B) cat fish (C) a cow"
        assert question.choices == ()
    assert ScienceQA(style="reason", input="QCMLE").load(str(folder))[1].text.endswith(
        "BECAUSE: Mammals give milk.\nBirds don't. A cow gives milk.")
    with pytest.raises(UserError, match="--input QCX: there is no such form; there are QCM, CQM"):
        ScienceQA(input="QCX").load(str(folder))


def test_two_passes_ask_for_the_answer_behind_the_reasoning(folder):
    benchmark = ScienceQA(style="prompter")
    question = benchmark.load(str(folder))[0]
    assert question.stop == ("###",)
    second = benchmark.follow_up(question, ["LECTURE: An <image> of a cow. \n"])
    assert second.assistant_prefix == "LECTURE: An  of a cow. ###\nANSWER:"
    assert (second.id, second.text, second.images, second.max_new_tokens) == (
        question.id, question.text, question.images, 64)
    text = benchmark.follow_up(question, ["LECTURE: Cows. \n", " B. "])
    assert text == "LECTURE: Cows.\n The answer is B." and parse_answer(text) == "B"
    assert ScienceQA(style="reason").follow_up(question, ["as it is "]) == "as it is "


def test_scores_and_files_are_the_originals(folder):
    benchmark = ScienceQA()
    questions = benchmark.load(str(folder))
    given = answers({"3": "D", "1": "B. cat fish", "2": "The answer is E.", "9": "A"},
                    {"3": "<image>\nWhich", "1": "Which", "2": "<image>\nname"})
    scores = benchmark.score(str(folder), questions, given)
    assert scores.main == "IMG-accuracy" and scores.figures == pytest.approx({
        "NAT": 0, "SOC": 0, "LAN": 100, "TXT": 50, "IMG": 50, "NO": 0, "G1-6": 0, "G7-12": 50, "Avg": 100 / 3,
        "IMG-accuracy": 50})
    assert scores.notes == ["Total: 3, Correct: 1, Accuracy: 33.33%, IMG-Accuracy: 50.00%",
                            "asked as LLaVA-1.5's published runs were: IMG-accuracy 71.6 (13B), 66.8 (7B)",
                            "1 of 3 answers name none of their question's choices, and count as wrong (question '2': "
                            "'The answer is E.')",
                            "3 questions; the published split has 4,241"]
    assert [(item.id, item.score, item.reference, item.parsed) for item in scores.items] == [
        ("3", 1, "D. Answer: y", "D"), ("1", 0, "C. a cow", "B"), ("2", 0, "B. Maine", "E")]
    output, result = benchmark.write_submission(str(folder), questions, given, str(folder))
    assert Path(output).read_bytes() == b"""{
  "correct": [
    {
      "question_id": "3",
      "parsed_ans": "D",
      "ground_truth": "D",
      "question": "<image>\\nWhich",
      "pred": "D",
      "is_multimodal": true
    }
  ],
  "incorrect": [
    {
      "question_id": "1",
      "parsed_ans": "B",
      "ground_truth": "C",
      "question": "Which",
      "pred": "B. cat fish",
      "is_multimodal": false
    },
    {
      "question_id": "2",
      "parsed_ans": "E",
      "ground_truth": "B",
      "question": "<image>\\nname",
      "pred": "The answer is E.",
      "is_multimodal": true
    }
  ]
}"""
    assert Path(result).read_bytes() == b"""{
  "acc": 33.33333333333333,
  "correct": 1,
  "count": 3,
  "results": {
    "3": 3,
    "1": 1,
    "2": -1
  },
  "outputs": {
    "3": "D",
    "1": "B. cat fish",
    "2": "The answer is E."
  }
}"""


def test_what_is_missing_is_wrong_and_the_last_of_two_counts(folder):
    benchmark = ScienceQA(style="reason")
    questions = benchmark.load(str(folder))
    scores = benchmark.score(str(folder), questions, answers({"1": "A"}) + answers({"1": "The answer is C."}))
    assert scores.figures["Avg"] == pytest.approx(100 / 3) and scores.main == "Avg"
    assert "IMG-accuracy" not in scores.figures and scores.figures["IMG"] == 0
    assert [item.parsed for item in scores.items] == ["FAILED", "C", "FAILED"]


def test_groups_without_questions_have_no_figure(folder):
    benchmark = ScienceQA()
    questions = benchmark.load(str(folder))[1:2]
    scores = benchmark.score(str(folder), questions, answers({"1": "C"}))
    assert scores.figures == {"NAT": 100, "NO": 100, "G1-6": 100, "Avg": 100} and scores.main == "Avg"
    assert "no questions of SOC, LAN, TXT, IMG, G7-12" in scores.notes


def test_the_table_is_that_of_a_count_by_hand(tmp_path):
    rng = random.Random(0)
    subjects = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
    problems = {str(i): {
        "question": "q", "choices": ["x"] * rng.randint(2, 5), "hint": rng.choice(["", "h", " "]), "lecture": "",
        "image": rng.choice([None, "image.png"]), "solution": "", "answer": rng.randint(0, 1), "split": "test",
        "subject": rng.choice(list(subjects.values())), "grade": f"grade{rng.randint(1, 12)}"} for i in range(300)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    bits = ["A", "B", "C", "E", "F", ". ", "The answer is ", "The answer is B.", "\n", " ", "x"]
    texts = {pid: "".join(rng.choices(bits, k=rng.randint(1, 4))) for pid in problems}
    benchmark = ScienceQA()
    figures = benchmark.score(str(tmp_path), benchmark.load(str(tmp_path)), answers(texts)).figures

    def right(pid):
        text, problem = texts[pid], problems[pid]
        said = re.findall("The answer is ([A-Z])(?=[^\n])", text)
        opening = re.match(r"([A-E])(\Z|\. )", text)
        letter = opening[1] if opening else said[0] if len(said) == 1 else "?"
        return letter == "ABCDE"[problem["answer"]]

    groups = {name: [p["subject"] == subject for p in problems.values()] for name, subject in subjects.items()}
    groups["TXT"] = [p["hint"] != "" for p in problems.values()]
    groups["IMG"] = [p["image"] is not None for p in problems.values()]
    groups["NO"] = [not (t or i) for t, i in zip(groups["TXT"], groups["IMG"], strict=True)]
    groups["G1-6"] = [int(p["grade"][5:]) <= 6 for p in problems.values()]
    groups["G7-12"] = [not young for young in groups["G1-6"]]
    groups["Avg"] = [True] * len(problems)
    hits = [right(pid) for pid in problems]
    assert 20 < sum(hits) < 280
    assert list(figures) == list(groups)
    for name, members in groups.items():
        own = [hit for hit, member in zip(hits, members, strict=True) if member]
        assert figures[name] == pytest.approx(100 * sum(own) / len(own)), name
