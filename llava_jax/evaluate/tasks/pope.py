"""POPE: yes-or-no questions on whether an object is in the image, half of either answer (Li et al. 2023).

The absent objects are drawn from all objects (random), are the most frequent ones (popular), or occur most often
together with the present ones (adversarial). `pope_data.py` makes such questions from any instances.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, Question, ScoredAnswer, Scores, index_questions, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, data_folder, find_file
from llava_jax.files import read_json_lines

CATEGORIES = ("random", "popular", "adversarial")
NO = {"No", "not", "no"}
LABELS = "coco_pope_{}.json"
EXPECTED_LABELS = ("; with LLaVA's questions belong the labels of AoiDragon/POPE at commit e3e39262 (output/coco: "
                   "2,910 random questions, 3,000 popular, 3,000 adversarial)")


@dataclass(frozen=True)
class Pope(QuestionFileTask):
    """POPE: F1 of "yes", its mean over the random, popular and adversarial questions."""

    title = "POPE"
    required_files = "llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/"
    question_file = "llava_pope_test.jsonl"
    image_folder = "val2014"
    num_published = 8910
    choices = ("Yes", "No")
    row_fields = {"category": str}
    uses_answer_order = True

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for labels of other questions."""
        questions, path = super().load(data), self.question_path(data)
        for category, in_category in _by_category(questions).items():
            labels, name = self._labels(data, category), LABELS.format(category)
            if len(labels) != len(in_category):
                raise UserError(f"{name} has {len(labels):,} labels and {path} {len(in_category):,} {category} "
                                f"questions; they are of different versions{EXPECTED_LABELS}")
            for number, (label, question) in enumerate(zip(labels, in_category, strict=True), 1):
                if label.get("image", question.row["image"]) != question.row["image"]:
                    raise UserError(f"{name}, line {number} is about {label['image']} and question {question.id} "
                                    f"about {question.row['image']}; they are of different versions{EXPECTED_LABELS}")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns counts, accuracy, precision, recall, F1 and the share of "yes" for each category ("yes" is positive).

        As in the original, the answers of a category are compared with its labels by their order in the file.
        """
        by_id, notes = index_questions(questions, answers, "POPE: "), self.size_notes(questions)
        figures, items, f1 = {}, {}, []
        for category, in_category in _by_category(questions).items():
            indices = [n for n, answer in enumerate(answers) if by_id[answer.id].row["category"] == category]
            if not indices:
                notes.append(f"{category}: no answers")
                continue
            if [answers[n].id for n in indices] != [question.id for question in in_category[: len(indices)]]:
                notes.append(f"{category}: the answers are in another order than the questions, or some are missing "
                             "among them; they meet the labels by their order, as in the original")
            parsed = [parse_yes_no(answers[n].text) for n in indices]
            labels = [row["label"] for row in self._labels(data, category)]
            counts = Counter(zip(parsed, labels, strict=False))
            for n, word, label in zip(indices, parsed, labels, strict=False):
                items[n] = ScoredAnswer(answers[n].id, float(word == label), label, word, category)
            rates = _rates(counts, parsed.count("yes") / len(parsed))
            if not (counts["yes", "yes"] + counts["yes", "no"] and counts["yes", "yes"] + counts["no", "yes"]):
                notes.append(f"{category}: nothing to divide by in precision or recall, which count as 0 here; "
                             "the original ends with an error")
            figures |= {f"{category} {name}": value for name, value in rates.items()}
            f1.append(rates["F1"])
        unparsed = [answer for answer in answers if not _words(answer.text) & {"Yes", "yes", *NO}]
        notes += unparsed_notes(unparsed, len(answers), "have neither yes nor no as a word of their first sentence, "
                                "and count as yes, as in the original")
        if not f1:
            raise UserError("POPE: there are no answers to score")
        return Scores({"F1": sum(f1) / len(f1), **figures}, "F1", [items[n] for n in sorted(items)], notes)

    def _labels(self, data: str, category: str) -> list[dict]:
        name = LABELS.format(category)
        path = find_file(data, f"coco/{name}", name)
        if path is None:
            raise UserError(f"{os.path.join(data_folder(data), 'coco', name)}: no such file, for the labels of the "
                            f"{category} questions")
        labels = []
        for number, row in read_json_lines(path):
            if row.get("label") not in ("yes", "no"):
                raise UserError(f"{path}, line {number}: the label is neither yes nor no")
            labels.append(row)
        return labels


def parse_yes_no(text: str) -> str:
    """Returns "no" if the first sentence has the word No, not or no, else "yes".

    Words are separated by single blanks. Commas are removed, but other marks are part of a word: "Not really", "no!"
    and "NO" mean yes.
    """
    return "no" if _words(text) & NO else "yes"


def _words(text: str) -> set[str]:
    return set(text.split(".")[0].replace(",", "").split(" "))


def _by_category(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Groups questions, the published categories first."""
    names = {question.row["category"] for question in questions}
    order = [name for name in CATEGORIES if name in names] + sorted(names - set(CATEGORIES))
    return {name: [question for question in questions if question.row["category"] == name] for name in order}


def _rates(counts: Counter, yes: float) -> dict[str, float]:
    """Returns counts, and rates in percent, from the counts of (answer, label)."""
    tp, fp, tn, fn = (counts[pair] for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    rates = {"accuracy": (tp + tn) / (tp + tn + fp + fn), "precision": precision, "recall": recall, "F1": f1,
             "yes ratio": yes}
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn} | {name: 100 * rate for name, rate in rates.items()}
