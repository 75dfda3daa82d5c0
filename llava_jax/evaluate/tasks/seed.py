"""SEED-Bench: multiple choice about images and the middle frames of videos (Li et al. 2023)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, Question, ScoredAnswer, Scores, group_scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, read_json, require_file, unanswered_notes
from llava_jax.files import matches_schema

QUESTION = {"question_id": int | str, "question_type_id": int, "data_type": str, "answer": str}
BENCH = {"question_type": dict, "questions": [QUESTION]}


@dataclass(frozen=True)
class Seed(QuestionFileTask):
    """SEED-Bench: accuracy of the letter, by type of question, for images and for videos."""

    title = "SEED-Bench"
    required_files = ("llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/ "
                      "(middle frames)")
    question_file = "llava-seed-bench.jsonl"
    num_published = 19_242
    choices = ("A", "B", "C", "D")

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for a question that SEED-Bench.json lacks."""
        questions, (_, rows) = super().load(data), self._bench(data)
        for question in questions:
            if question.id not in rows:
                raise UserError(f"SEED-Bench.json has no question {question.id!r}; the files are of different "
                                "versions")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns the percentage of the questions of SEED-Bench.json whose answer is the letter and nothing else.

        Missing answers are wrong. The last of several answers to one question counts.
        """
        names, rows = self._bench(data)
        texts = {answer.id: answer.text for answer in answers}
        right = {id: id in texts and texts[id] == row["answer"] for id, row in rows.items()}
        by_type = group_scores((right[id], [row["question_type_id"]]) for id, row in rows.items())
        groups = {names.get(number, str(number)): by_type[number] for number in sorted(by_type)}
        groups["total"] = list(right.values())
        by_source = group_scores((right[id], [row["data_type"]]) for id, row in rows.items())
        groups |= {source: by_source[source] for source in ("image", "video") if source in by_source}
        figures = {name: sum(scores) / len(scores) * 100 for name, scores in groups.items()}
        items = [ScoredAnswer(answer.id, float(answer.text == row["answer"]), row["answer"], answer.text,
                              names.get(row["question_type_id"], ""))
                 for answer in answers if (row := rows.get(answer.id))]
        unparsed = [answer for answer in answers if answer.text not in self.choices]
        notes = [*self.size_notes(questions), *unanswered_notes(questions, answers),
                 *unparsed_notes(unparsed, len(answers), "are no letter alone, and are wrong")]
        if len(rows) != len(questions):
            notes.append(f"{len(questions):,} of the {len(rows):,} questions of SEED-Bench.json are asked; the others "
                         "are wrong")
        return Scores(figures, "total", items, notes)

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns {question_id, prediction} in the order of SEED-Bench.json, if all questions have an answer."""
        texts, (_, rows) = {answer.id: answer.text for answer in answers}, self._bench(data)
        if any(id not in texts for id in rows):
            return {}
        lines = [{"question_id": row["question_id"], "prediction": texts[id]} for id, row in rows.items()]
        return {"seed_upload.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}

    def _bench(self, data: str) -> tuple[dict[int, str], dict[int | str, dict[str, Any]]]:
        """Returns the names of the types by number, and the rows of SEED-Bench.json by id."""
        content = read_json(
            require_file(data, "SEED-Bench.json"),
            lambda x: matches_schema(x, BENCH) and x["questions"] and matches_schema([*x["question_type"].values()],
                                                                                     [int]),
            f"not SEED-Bench: {{question_type, questions: [{{{', '.join(QUESTION)}}}]}}")
        names = {number: name for name, number in content["question_type"].items()}
        return names, {_number(row["question_id"]): row for row in content["questions"]}


def _number(id: int | str) -> int | str:
    """Returns a number for an id of digits, because ids are numbers in LLaVA's file and digits in SEED-Bench.json."""
    try:
        return int(id)
    except ValueError:
        return id
