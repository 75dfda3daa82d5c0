"""ScienceQA: multiple choice, mostly with a lecture, half of the questions with an image.

`parse_answer` and the scores follow LLaVA's script. `score_groups` makes the paper's table as ScienceQA's own
evaluation does.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava_jax.errors import UserError
from llava_jax.evaluate.scienceqa.problems import (
    INPUTS,
    LETTERS,
    SIZES,
    Problem,
    compose,
    compose_listed,
    find_image,
    read_listed,
    read_problems,
)
from llava_jax.evaluate.tasks.base import (
    LETTER_INSTRUCTION,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    Task,
    group_scores,
    unparsed_notes,
)

FAILED = "FAILED"
"""Result of parsing an answer that names no letter."""
THE_ANSWER = re.compile("The answer is ([A-Z]).")  # the full stop matches any character, as in the original
PROMPTER = " ###\nANSWER:"

GROUPS = {
    "NAT": lambda problem: problem.get("subject") == "natural science",
    "SOC": lambda problem: problem.get("subject") == "social science",
    "LAN": lambda problem: problem.get("subject") == "language science",
    "TXT": lambda problem: bool(problem["hint"]),
    "IMG": lambda problem: bool(problem["image"]),
    "NO": lambda problem: not problem["hint"] and not problem["image"],
    "G1-6": lambda problem: problem.get("grade") in [f"grade{grade}" for grade in range(1, 7)],
    "G7-12": lambda problem: problem.get("grade") in [f"grade{grade}" for grade in range(7, 13)],
}
"""Columns of the table in ScienceQA's paper: subject, context (a hint, an image, neither), grade."""


def parse_answer(text: str) -> str:
    """Returns the letter that an answer names, or FAILED.

    That is a text that is one of A to E, starts with one of them and `. `, or says exactly once `The answer is X.`
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    return parse_statement(text)


def parse_statement(text: str) -> str:
    """Returns X if a text says exactly once `The answer is X.`, else FAILED. X may be a letter that no choice has."""
    found = THE_ANSWER.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice(letter: str, problem: Problem) -> int:
    """Returns the index of the choice with this letter, or -1."""
    return LETTERS.find(letter) if letter in LETTERS[: len(problem["choices"])] else -1


def score_groups(problems: Mapping[str, Problem], results: Mapping[str, int]) -> dict[str, float]:
    """Returns the percentage of right answers for all of GROUPS that have questions, and for all questions as `Avg`.

    `results` has the index of the chosen answer by the problems' ids, of at least one problem.
    """
    right = {pid: chosen == problems[pid]["answer"] for pid, chosen in results.items()}
    groups = group_scores((right[pid], [name for name, belongs in GROUPS.items() if belongs(problems[pid])])
                          for pid in results)
    figures = {name: sum(groups[name]) / len(groups[name]) * 100 for name in GROUPS if name in groups}
    return figures | {"Avg": sum(right.values()) / len(right) * 100}


@dataclass(frozen=True)
class ScienceQA(Task):
    """Multiple choice on school science, scored by subject, context and grade.

    Answer with the letter, as LLaVA-1.5 does; or, tuned on ScienceQA, with the reasoning and then the answer."""

    title = "ScienceQA: multiple choice on school science, with images, hints or neither"
    required_files = ("problems.json, pid_splits.json, images/SPLIT/ID/image.png; or Hugging Face's parquet "
                      "(scienceqa-data)")
    max_new_tokens = 1024
    uses_prompts = True

    style: Literal["letter", "reason", "prompter"] = "letter"
    """Form of the answer. letter: the letter alone (compare IMG-accuracy with LLaVA-1.5's 71.6 and 66.8). reason: for
    models tuned on QCM-LEA and the like (compare Avg with 91.09, Vicuna 13B v1.3). prompter: for models tuned on
    QCM-LEPA, which reason and are then asked for the answer (compare Avg with the paper's 90.92)."""
    input: str = ""
    """Form of the question: QCM, CQM, or QCML and others that contain the reasoning; default: QCM, and for letter the
    layout of LLaVA-1.5's published run, from llava_test_CQM-A.json of LLaVA's eval.zip if --data has it."""
    split: str = "test"
    """Split: test, val, minitest, ..."""

    def load(self, data: str) -> list[Question]:
        if self.input and self.input not in INPUTS:
            raise UserError(f"--input {self.input}: there is no such form; there are {', '.join(INPUTS)}")
        problems = read_problems(data, self.split)
        listed = self.style == "letter" and not self.input
        texts = read_listed(data, self.split, problems) if listed else None
        questions = []
        for pid, problem in problems.items():
            text = compose_listed(problem) if listed else compose(problem, f"{self.input or 'QCM'}-A")[0]
            text = (texts[pid] if texts else text).replace("<image>", "").strip()
            text += LETTER_INSTRUCTION * (self.style == "letter")
            image = find_image(data, self.split, pid, problem)
            questions.append(Question(
                pid, text, () if image is None else (image,), problem,
                choices=tuple(LETTERS[: len(problem["choices"])]) if self.style == "letter" else (),
                prompt=text if image is None else f"<image>\n{text}",
                stop=("###",) if self.style == "prompter" else ()))
        return questions

    def question_path(self, data: str) -> str:
        path = os.path.join(data, "problems.json")
        return path if os.path.exists(path) else data

    def follow_up(self, question: Question, texts: Sequence[str]) -> Question | str:
        if self.style != "prompter":
            return texts[-1]
        reasoning = texts[0].strip()
        if len(texts) == 1:
            return replace(question, assistant_prefix=reasoning.replace("<image>", "") + PROMPTER, max_new_tokens=64)
        return f"{reasoning}\n The answer is {texts[1].strip()}"

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        detailed, result = _score(questions, answers)
        problems = {question.id: question.row for question in questions}
        figures = score_groups(problems, result["results"])
        notes = [f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {result['acc']:.2f}%"]
        with_image = {kind: sum(row["is_multimodal"] for row in rows) for kind, rows in detailed.items()}
        if any(with_image.values()):
            figures["IMG-accuracy"] = with_image["correct"] / sum(with_image.values()) * 100
            notes[0] += f", IMG-Accuracy: {figures['IMG-accuracy']:.2f}%"
        notes.append(self._comparable())
        unparsed = [Answer(pid, result["outputs"][pid]) for pid, chosen in result["results"].items() if chosen == -1]
        notes += unparsed_notes(unparsed, len(problems), "name none of their question's choices, and count as wrong")
        if empty := [name for name in GROUPS if name not in figures]:
            notes.append(f"no questions of {', '.join(empty)}")
        if len(questions) != SIZES.get(self.split, len(questions)):
            notes.append(f"{len(questions):,} questions; the published split has {SIZES[self.split]:,}")
        main = "IMG-accuracy" if self.style == "letter" and "IMG-accuracy" in figures else "Avg"
        parsed = {row["question_id"]: row["parsed_ans"] for rows in detailed.values() for row in rows}
        items = [ScoredAnswer(pid, float(result["results"][pid] == problem["answer"]),
                              f"{LETTERS[problem['answer']]}. {problem['choices'][problem['answer']]}", parsed[pid],
                              str(problem.get("subject") or "")) for pid, problem in problems.items()]
        return Scores(figures, main, items, notes)

    def _comparable(self) -> str:
        """Returns a note on the published figure that this style and form can be compared with."""
        if self.style == "letter":
            return "not asked as a published run was" if self.input else (
                "asked as LLaVA-1.5's published runs were: IMG-accuracy 71.6 (13B), 66.8 (7B)")
        if self.input not in ("", "QCM"):
            return f"the form {self.input} of the question is of no published figure"
        return ("compare Avg with 91.09, LLaVA of Vicuna 13B v1.3, tuned on QCM-LEA" if self.style == "reason" else
                "compare Avg with 90.92, the paper's LLaVA, tuned on QCM-LEPA")

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns what LLaVA's scorer writes. ScienceQA's own evaluation reads the second file."""
        contents = zip(("scienceqa_output.json", "scienceqa_result.json"), _score(questions, answers), strict=True)
        return {name: json.dumps(content, indent=2).encode() for name, content in contents}


def _score(questions: Sequence[Question], answers: Sequence[Answer]) -> tuple[dict, dict]:
    """Returns the two files of LLaVA's scorer: parsed answers, right and wrong ones, and the result.

    A question without an answer is wrong. It counts as one without an image, because no prompt has its mark.
    """
    given = {answer.id: answer for answer in answers}
    missing = Answer("", FAILED, "Unknown")
    detailed, results, outputs = {"correct": [], "incorrect": []}, {}, {}
    for question in questions:
        problem, answer = question.row, given.get(question.id, missing)
        letter = parse_answer(answer.text)
        results[question.id], outputs[question.id] = choice(letter, problem), answer.text
        detailed["correct" if results[question.id] == problem["answer"] else "incorrect"].append({
            "question_id": question.id,
            "parsed_ans": letter,
            "ground_truth": LETTERS[problem["answer"]],
            "question": answer.prompt,
            "pred": answer.text,
            "is_multimodal": "<image>" in answer.prompt,
        })
    correct, count = len(detailed["correct"]), len(questions)
    return detailed, {"acc": correct / count * 100, "correct": correct, "count": count, "results": results,
                      "outputs": outputs}
