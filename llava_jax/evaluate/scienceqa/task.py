"""ScienceQA: questions with choices, most with a lecture behind them, half with an image.

Answers are read and scored as LLaVA's script does it (`read_answer`), and the table of the paper is made as ScienceQA's
own evaluation makes it (`table`).
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
    unparsed_notes,
)
from llava_jax.files import atomic_write

FAILED = "FAILED"  # what an answer is read as that names no letter
THE_ANSWER = re.compile("The answer is ([A-Z]).")  # any character may follow, and one must: the original's full stop
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


def read_answer(text: str) -> str:
    """The letter that an answer names, or FAILED.

    A text that is one of A to E; or begins with one of them and `. `; or says exactly once `The answer is X.`
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    return read_statement(text)


def read_statement(text: str) -> str:
    """X where a text says exactly once `The answer is X.`, or FAILED. X may be a letter that no choice has."""
    found = THE_ANSWER.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice(letter: str, problem: Problem) -> int:
    """The index of the choice that has this letter, or -1."""
    return LETTERS.find(letter) if letter in LETTERS[: len(problem["choices"])] else -1


def table(problems: Mapping[str, Problem], results: Mapping[str, int]) -> dict[str, float]:
    """Percent of right answers in each of GROUPS that has questions, and of all as `Avg`.

    results: the index that was chosen, by the problems' ids; of at least one.
    """
    right = {pid: chosen == problems[pid]["answer"] for pid, chosen in results.items()}
    figures = {}
    for name, belongs in GROUPS.items():
        group = [right[pid] for pid in results if belongs(problems[pid])]
        if group:
            figures[name] = sum(group) / len(group) * 100
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
    """letter asks for it (compare IMG-accuracy with LLaVA-1.5's 71.6 and 66.8); reason, for models tuned on QCM-LEA and
    the like (compare Avg with 91.09, Vicuna 13B v1.3); prompter, for models tuned on QCM-LEPA, which reason and are
    then asked for the answer (compare Avg with the paper's 90.92)"""
    input: str = ""
    """form of the question: QCM, CQM, or QCML and others that give the reasoning away; by default QCM, and for letter
    the layout of LLaVA-1.5's published run, read from llava_test_CQM-A.json of LLaVA's eval.zip where data has it"""
    split: str = "test"
    """test, val, minitest, ..."""

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
                id=pid,
                text=text,
                images=() if image is None else (image,),
                row=problem,
                choices=tuple(LETTERS[: len(problem["choices"])]) if self.style == "letter" else (),
                prompt=text if image is None else f"<image>\n{text}",
                stop=("###",) if self.style == "prompter" else (),
            ))
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
        figures = table(problems, result["results"])
        notes = [f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {result['acc']:.2f}%"]
        shown = {kind: [row for row in rows if row["is_multimodal"]] for kind, rows in detailed.items()}
        if count := sum(map(len, shown.values())):
            figures["IMG-accuracy"] = len(shown["correct"]) / count * 100
            notes[0] += f", IMG-Accuracy: {figures['IMG-accuracy']:.2f}%"
        notes.append(self._comparable())
        unread = [Answer(pid, result["outputs"][pid]) for pid, chosen in result["results"].items() if chosen == -1]
        notes += unparsed_notes(unread, len(problems), "name none of their question's choices, and count as wrong")
        if empty := [name for name in GROUPS if name not in figures]:
            notes.append(f"no questions of {', '.join(empty)}")
        if len(questions) != SIZES.get(self.split, len(questions)):
            notes.append(f"{len(questions):,} questions; the published split has {SIZES[self.split]:,}")
        main = "IMG-accuracy" if self.style == "letter" and "IMG-accuracy" in figures else "Avg"
        read = {row["question_id"]: row["parsed_ans"] for rows in detailed.values() for row in rows}
        items = [
            ScoredAnswer(pid, float(result["results"][pid] == problem["answer"]), _named(problem), read[pid],
                 str(problem.get("subject") or ""))
            for pid, problem in problems.items()
        ]
        return Scores(figures, main, items, notes)

    def _comparable(self) -> str:
        """Which published figure this style and form can be compared with."""
        if self.style == "letter":
            return "not asked as a published run was" if self.input else (
                "asked as LLaVA-1.5's published runs were: IMG-accuracy 71.6 (13B), 66.8 (7B)")
        if self.input not in ("", "QCM"):
            return f"the form {self.input} of the question is of no published figure"
        return ("compare Avg with 91.09, LLaVA of Vicuna 13B v1.3, tuned on QCM-LEA" if self.style == "reason" else
                "compare Avg with 90.92, the paper's LLaVA, tuned on QCM-LEPA")

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """Writes what LLaVA's scorer writes; the second file is what ScienceQA's own evaluation reads."""
        paths = [os.path.join(folder, f"scienceqa_{name}.json") for name in ("output", "result")]
        for path, content in zip(paths, _score(questions, answers), strict=True):
            with atomic_write(path) as file:
                file.write(json.dumps(content, indent=2).encode())
        return paths


def _score(questions: Sequence[Question], answers: Sequence[Answer]) -> tuple[dict, dict]:
    """The two files of LLaVA's scorer: the answers, right and wrong ones, as they were read; and the result.

    A question without an answer is wrong, and as no prompt tells of its image, not one of those with an image.
    """
    given = {answer.id: answer for answer in answers}
    missing = Answer("", FAILED, "Unknown")
    detailed, results, outputs = {"correct": [], "incorrect": []}, {}, {}
    for question in questions:
        problem, answer = question.row, given.get(question.id, missing)
        letter = read_answer(answer.text)
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


def _named(problem: Problem) -> str:
    return f"{LETTERS[problem['answer']]}. {problem['choices'][problem['answer']]}"
