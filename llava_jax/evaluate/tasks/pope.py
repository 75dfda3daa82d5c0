"""POPE: is there such a thing in the picture? Yes or no, as often the one as the other (Li et al. 2023).

The things that are not there are drawn from all (random), are the commonest (popular) or those that most often stand
beside what is there (adversarial). `pope_data.py` makes such questions of any instances.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, data_folder, find_question_file, read_json_lines

CATEGORIES = ("random", "popular", "adversarial")
NO = {"No", "not", "no"}
MEANT = ("; with LLaVA's questions belong the labels of AoiDragon/POPE at commit e3e39262 (output/coco: 2,910 random "
         "questions, 3,000 popular, 3,000 adversarial)")
LABELS = "coco_pope_{}.json"


@dataclass(frozen=True)
class Pope(QuestionFileTask):
    """POPE: F1 of "yes", its mean over the random, popular and adversarial questions."""

    title = "POPE"
    required_files = "llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/"
    question_file = "llava_pope_test.jsonl"
    image_folder = "val2014"
    num_published = 8910
    choices = ("Yes", "No")
    uses_answer_order = True

    def load(self, data: str) -> list[Question]:
        """UserError as well for labels that are not of these questions."""
        questions, path = super().load(data), find_question_file(data, self.question_file)
        for question in questions:
            if not isinstance(question.row.get("category"), str):
                raise UserError(f"{path}: question {question.id} has no category")
        for category in _categories(questions):
            mine = [question for question in questions if question.row["category"] == category]
            labels = self._labels(data, category)
            name = LABELS.format(category)
            if len(labels) != len(mine):
                raise UserError(f"{name} has {len(labels):,} labels and {path} {len(mine):,} {category} questions; "
                                 f"they are of different versions{MEANT}")
            for number, (label, question) in enumerate(zip(labels, mine, strict=True), 1):
                if label.get("image", question.row["image"]) != question.row["image"]:
                    raise UserError(f"{name}, line {number} is about {label['image']} and question {question.id} "
                                     f"about {question.row['image']}; they are of different versions{MEANT}")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """For each category counts (yes is positive), accuracy, precision, recall, F1 and the share of "yes".

        As in the original, the answers of a category meet its labels by their order in the file.
        """
        category_of = {question.id: question.row["category"] for question in questions}
        for answer in answers:
            if answer.id not in category_of:
                raise UserError(f"POPE: there is no question {answer.id!r}; these are answers to other questions")
        figures, items, notes, f1 = {}, {}, self.size_notes(questions), []
        for category in _categories(questions):
            mine = [n for n, answer in enumerate(answers) if category_of[answer.id] == category]
            wanted = [question.id for question in questions if question.row["category"] == category]
            if not mine:
                notes.append(f"{category}: no answers")
                continue
            if [answers[n].id for n in mine] != wanted[: len(mine)]:
                notes.append(f"{category}: the answers are in another order than the questions, or some are missing "
                             "among them; they meet the labels by their order, as in the original")
            said = [parse_yes_no(answers[n].text) for n in mine]
            labels = [row["label"] for row in self._labels(data, category)]
            counts = Counter(zip(said, labels, strict=False))
            for n, word, label in zip(mine, said, labels, strict=False):
                items[n] = ScoredAnswer(answers[n].id, float(word == label), label, word, category)
            rates = _rates(counts, said.count("yes") / len(said))
            if not (counts["yes", "yes"] + counts["yes", "no"] and counts["yes", "yes"] + counts["no", "yes"]):
                notes.append(f"{category}: nothing to divide by in precision or recall, which count as 0 here; "
                             "the original ends with an error")
            figures |= {f"{category} {name}": value for name, value in rates.items()}
            f1.append(rates["F1"])
        unread = [answer for answer in answers if not words(answer.text) & {"Yes", "yes", *NO}]
        notes += unparsed_notes(unread, len(answers), "have neither yes nor no as a word of their first sentence, and "
                              "count as yes, as in the original")
        if not f1:
            raise UserError("POPE: there are no answers to score")
        return Scores({"F1": sum(f1) / len(f1), **figures}, "F1", [items[n] for n in sorted(items)], notes)

    def _labels(self, data: str, category: str) -> list[dict]:
        name = LABELS.format(category)
        for path in (os.path.join(data_folder(data), "coco", name), os.path.join(data_folder(data), name)):
            if os.path.isfile(path):
                labels = []
                for number, row in read_json_lines(path):
                    if row.get("label") not in ("yes", "no"):
                        raise UserError(f"{path}, line {number}: the label is neither yes nor no")
                    labels.append(row)
                return labels
        raise UserError(f"{os.path.join(data_folder(data), 'coco', name)}: no such file, for the labels of the "
                                f"{category} questions")


def parse_yes_no(text: str) -> str:
    """ "no" if the first sentence has the word No, not or no; else "yes", whatever it says.

    Words are what stands between single blanks; commas do not count, other marks are part of a word: "Not really",
    "no!" and "NO" say yes.
    """
    return "no" if words(text) & NO else "yes"


def words(text: str) -> set[str]:
    """The words of the first sentence as the original takes them."""
    return set(text.split(".")[0].replace(",", "").split(" "))


def _categories(questions: Sequence[Question]) -> list[str]:
    there = {question.row["category"] for question in questions}
    return [name for name in CATEGORIES if name in there] + sorted(there - set(CATEGORIES))


def _rates(counts: Counter, yes: float) -> dict[str, float]:
    """Counts of (said, label); rates in percent."""
    tp, fp, tn, fn = (counts[pair] for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    rates = {"accuracy": (tp + tn) / (tp + tn + fp + fn), "precision": precision, "recall": recall, "F1": f1,
             "yes ratio": yes}
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn} | {name: 100 * rate for name, rate in rates.items()}
