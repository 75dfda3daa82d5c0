"""SEED-Bench: multiple choice about images and about the middle frames of videos (Li et al. 2023)."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, fits, need, read_json, unanswered_notes
from llava_jax.files import replacing

QUESTION = {"question_id": int | str, "question_type_id": int, "data_type": str, "answer": str}


@dataclass(frozen=True)
class Seed(QuestionFileTask):
    """SEED-Bench: accuracy of the letter, by type of question, of images and of videos."""

    title = "SEED-Bench"
    required_files = ("llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/ "
                      "(middle frames)")
    question_file = "llava-seed-bench.jsonl"
    image_folder = ""  # the questions name the folders
    num_published = 19_242
    choices = ("A", "B", "C", "D")

    def load(self, data: str) -> list[Question]:
        """UserError as well for a question that SEED-Bench.json does not have."""
        questions, known = super().load(data), {_number(row["question_id"]) for row in self._bench(data)["questions"]}
        for question in questions:
            if question.id not in known:
                raise UserError(f"SEED-Bench.json has no question {question.id!r}; the files are of different "
                                 "versions")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent of the questions of SEED-Bench.json whose answer's text is the letter and nothing else; a missing
        one is wrong."""
        bench = self._bench(data)
        texts = {answer.id: answer.text for answer in answers}  # of doubled ones the last
        names = {number: name for name, number in bench["question_type"].items()}
        by_type, by_source, rows = defaultdict(list), defaultdict(list), {}
        for row in bench["questions"]:
            id = _number(row["question_id"])
            rows[id] = row
            right = id in texts and texts[id] == row["answer"]
            by_type[row["question_type_id"]].append(right)
            by_source[row["data_type"]].append(right)
        groups = {names.get(number, str(number)): by_type[number] for number in sorted(by_type)}
        groups["total"] = [right for rights in groups.values() for right in rights]
        groups |= {source: by_source[source] for source in ("image", "video") if source in by_source}
        figures = {name: sum(rights) / len(rights) * 100 for name, rights in groups.items()}
        items = [ScoredAnswer(answer.id, float(answer.text == row["answer"]), row["answer"], answer.text,
                      names.get(row["question_type_id"], "")) for answer in answers if (row := rows.get(answer.id))]
        notes = [*self.size_notes(questions), *unanswered_notes(questions, answers)]
        unread = [answer for answer in answers if answer.text not in self.choices]
        notes += unparsed_notes(unread, len(answers), "are no letter alone, and are wrong")
        if len(rows) != len(questions):
            notes.append(f"{len(questions):,} of the {len(rows):,} questions of SEED-Bench.json are asked; the others "
                         "are wrong")
        return Scores(figures, "total", items, notes)

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """Lines of {question_id, prediction} in the order of SEED-Bench.json; nothing unless all have an answer."""
        texts = {answer.id: answer.text for answer in answers}
        ids = [row["question_id"] for row in self._bench(data)["questions"]]
        if any(id not in texts and _number(id) not in texts for id in ids):
            return []
        rows = [{"question_id": id, "prediction": texts[id if id in texts else _number(id)]} for id in ids]
        path = os.path.join(folder, "seed_upload.jsonl")
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        return [path]

    def _bench(self, data: str) -> dict[str, Any]:
        path = need(data, "SEED-Bench.json")
        bench = read_json(path)
        if not (fits(bench, {"question_type": dict, "questions": [QUESTION]}) and bench["questions"]
                and fits([*bench["question_type"].values()], [int])):
            raise UserError(f"{path}: not SEED-Bench: {{question_type, questions: [{{{', '.join(QUESTION)}}}]}}")
        return bench


def _number(id: int | str) -> int | str:
    """Ids are numbers in LLaVA's file and digits in SEED-Bench.json."""
    try:
        return int(id)
    except ValueError:
        return id
