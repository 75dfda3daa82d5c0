"""Every benchmark counts the answers that its rules cannot read, and quotes some; the rules stay as they are."""

import re

import pytest
from bench_files import FILES, IDS, write, write_all

from llava_jax.evaluate.scienceqa.ensemble import ScienceQAEnsemble
from llava_jax.evaluate.tasks.base import TASKS, Answer, get_task

ODD = ("", "**No**", "No!", "(Yes)", "Yes\nIt is", "아니요",
       "I cannot see it in this picture, so I would rather not say")


@pytest.fixture
def folder(tmp_path):
    write_all(tmp_path)
    return tmp_path


def score(folder, name, texts):
    options = {"annotations": str(folder / name / "annotations.json")} if name in ("vqav2", "vizwiz") else {}
    task = get_task(name)(**options)
    questions = task.load(str(folder / name))
    answers = [Answer(question.id, text, question.prompt or question.text, {"question_id": question.id})
               for question, text in zip(questions, texts * len(questions), strict=False)]
    return task.score(str(folder / name), questions, answers), len(questions)


@pytest.mark.parametrize("name", TASKS)
def test_what_cannot_be_read_is_counted_and_quoted(folder, name):
    scores, count = score(folder, name, [""])
    assert count >= 3 and any(note.startswith(f"{count} of {count} answers ") and "question" in note and ": ''" in note
                              for note in scores.notes), scores.notes


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith(("llava", "mm-"))])
def test_what_can_be_read_is_not_counted(folder, name):
    text = {"pope": "Yes, it is.", "mme": "yes", "seed": "C", "scienceqa": "B", "mmbench": "B", "mmbench-cn": "A. cat",
            "spatial": "On the left", "scenes": "Yes.", "multilingual": "left 왼쪽"}.get(name, "red")
    notes = score(folder, name, [text])[0].notes
    assert not [note for note in notes if re.match(r"\d+ of \d+ answers (?!to Korean)", note)], notes


@pytest.mark.parametrize("name", ["pope", "gqa", "scenes"])
@pytest.mark.parametrize("text", ODD)
def test_answers_in_another_form_are_unread(folder, name, text):
    plain = score(folder, name, ["Yes" if name == "pope" else "red"])[0]
    odd = score(folder, name, [text])[0]
    counted = [note for note in odd.notes if note.startswith("3 of 3 answers")]
    if "not" in text and name == "pope":  # that is a no to the original
        assert not counted and odd.figures["random TN"] + odd.figures["random FN"] == 3
        return
    assert len(counted) == 1 and repr(text if len(text) < 60 else text[:57] + "...") in counted[0]
    if name == "pope":  # the rules are the original's: no word that says no is a yes
        assert odd.figures == plain.figures


@pytest.mark.parametrize(("name", "text"), [("textvqa", "**red**"), ("vqav2", "the"), ("vizwiz", "red\nand more")])
def test_phrases_that_no_human_answer_equals(folder, name, text):
    scores = score(folder, name, [text, "red", "(red)!"])[0]
    assert sum(item.score == 1 for item in scores.items) == 2
    [note] = [note for note in scores.notes if " answers are no word or short phrase" in note]
    assert note.startswith("1 of 3 answers") and repr(text) in note


def test_an_ensemble_counts_what_names_no_letter_by_model(tmp_path, capsys):
    write(tmp_path / "problems.json", FILES["scienceqa"]["problems.json"])
    write(tmp_path / "pid_splits.json", {"test": list(IDS)})
    said = {"ours": ["The answer is A.", "B", "No \x1b[2J letter"], "teacher": ["The answer is B."] * 3}
    for name, texts in said.items():
        rows = [{"question_id": id, "text": text} for id, text in zip(IDS, texts, strict=True)]
        write(tmp_path / f"{name}.jsonl", rows)
    ScienceQAEnsemble(str(tmp_path / "ours.jsonl"), str(tmp_path), str(tmp_path / "out"), unread="wrong",
                      teacher=str(tmp_path / "teacher.jsonl")).run()
    printed = capsys.readouterr().out
    assert "2 of 3 answers of LLaVA name no choice" in printed and "question '1': 'B'" in printed
    assert "of the language model name no choice" not in printed and "\x1b" not in printed


