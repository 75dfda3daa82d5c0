"""LLaVA-Bench: open questions in three categories, whose answers a judge compares with those of a reference.

The reference was written by a language model that was given the image in words, and the judge sees the image in the
same way (Visual Instruction Tuning, section 5.1). Here the questions are read, with what the judge needs of each;
`judge.py` asks it.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.errors import UserError
from llava_jax.evaluate.judge.reviews import (
    ORDER,
    failure_notes,
    read_reviews,
    scored,
    short,
    summarise,
    summarise_as_published,
)
from llava_jax.evaluate.tasks.base import EMPTY, Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find, need, read_json_lines


@dataclass(frozen=True)
class Case:
    """What a judge is given of one question, but for the candidate's answer."""

    question: Question
    category: str  # as rules and reviews name it
    context: str  # the image in words
    reference: Mapping[str, Any]  # a line of an answer file


@dataclass(frozen=True)
class LlavaBench(QuestionFileTask):
    """What both sets share. The score needs reviews, which `evaluate judge` makes."""

    reviews: tuple[str, ...] = ()
    """files of a judge's reviews of these answers, of which the mean is taken; without one there is no score"""
    compat: bool = False
    """the arithmetic of LLaVA's summary, where judgements that failed lower both means"""

    name: ClassVar[str]  # as TASKS has it
    prefix: ClassVar[str] = ""  # of categories in rules and reviews
    files: ClassVar[Mapping[str, tuple[str, ...]]]  # questions, references, context: names, of which one is there
    context_keys: ClassVar[str]  # what `describe` reads
    max_new_tokens = 1024

    def __post_init__(self):
        if isinstance(self.reviews, str):
            object.__setattr__(self, "reviews", (self.reviews,) if self.reviews else ())

    def load(self, data: str) -> list[Question]:
        """The questions; UserError for one of another category, or an id that is there twice."""
        path = data if os.path.isfile(data) else need(data, *self.files["questions"])
        questions = super().load(path)
        seen = set()
        for question in questions:
            if question.row.get("category") not in ORDER:
                raise UserError(f"{path}: question {question.id!r} has as category {question.row.get('category')!r}; "
                                 f"those of {self.title} are {', '.join(ORDER)}")
            if question.id in seen:
                raise UserError(f"{path}: question {question.id!r} is there twice")
            seen.add(question.id)
        return questions

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        for path in self.reviews:
            read_reviews(path)

    def paths(self, data: str, reference: str = "", context: str = "") -> dict[str, str]:
        """Questions, references and context: the files. UserError if one is not there."""
        given = {"questions": data if os.path.isfile(data) else "", "references": reference, "context": context}
        for path in filter(None, given.values()):
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file")
        return {kind: path or need(data, *self.files[kind]) for kind, path in given.items()}

    def cases(self, paths: Mapping[str, str]) -> list[Case]:
        """One for each question. UserError, one line, where a question has no reference, an image
        no context, or the files do not belong together."""
        references = self._references(paths["references"])
        contexts = self._contexts(paths["context"])
        cases = []
        for question in self.load(paths["questions"]):
            category, image, reference = question.row["category"], question.row["image"], references.get(question.id)
            if reference is None:
                raise UserError(f"{paths['references']}: no answer to question {question.id!r} of "
                                 f"{paths['questions']}; are the files of one version?")
            if reference.get("category", category) != category:
                raise UserError(f"{paths['references']}: question {question.id!r} is {reference['category']!r}, and "
                                 f"{category!r} in {paths['questions']}; the files are of different versions")
            if image not in contexts:
                raise UserError(f"{paths['context']}: nothing about {image}, the image of question {question.id!r}")
            cases.append(Case(question, self.prefix + category, contexts[image], reference))
        return cases

    def describe(self, row: Mapping[str, Any]) -> str:
        """The image in words, of a row of the context file; KeyError, TypeError or UserError if it has none."""
        raise NotImplementedError

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """conv, detail, complex and all, in percent of the reference's scores; no figures without reviews.

        Of several files of reviews the figures are the means of theirs, as published.
        """
        notes = self.size_notes(questions)
        path = find(data, *self.files["references"])
        references = self._references(path) if path else {}
        categories = {question.id: question.row["category"] for question in questions}
        items = {answer.id: ScoredAnswer(answer.id, None, references.get(answer.id, {}).get("text", ""), "",
                                 categories.get(answer.id, "")) for answer in answers}
        empty = [answer for answer in answers if not answer.text.strip()]
        notes += unparsed_notes(empty, len(answers), EMPTY)
        if not self.reviews:
            notes.append(f"scored by a judge: python -m llava_jax.evaluate judge {self.name} --answers FILE --data "
                         f"{data} --out DIR --model NAME; then --reviews DIR/reviews/reviews_1.jsonl here")
            return Scores({}, "", [items[answer.id] for answer in answers], notes)
        given: dict[str | int, list[Sequence[float]]] = defaultdict(list)
        ratios: dict[str, list[float]] = defaultdict(list)
        for path in self.reviews:
            reviews, name = self._reviews(path, categories, answers), f"{path}: " * (len(self.reviews) > 1)
            for review in scored(reviews):
                given[review["question_id"]].append(review["tuple"])
            notes += [name + note for note in failure_notes(reviews, self.compat)]
            if len(reviews) < len(answers):
                lost = len(answers) - len(reviews)
                notes.append(f"{name}{lost:,} of {len(answers):,} answers have no review and are left out")
            for category, figure in (summarise_as_published if self.compat else summarise)(reviews).items():
                ratios[short(category)].append(figure.ratio)
        for id, pairs in given.items():
            reference, candidate = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            items[id] = ScoredAnswer(id, candidate / 10, items[id].reference,
                                     f"{candidate:g}, the reference {reference:g}", items[id].category)
        order = [name for name in (*ORDER, "all") if name in ratios]
        if len(self.reviews) > 1 and order:
            runs = " ".join(f"{ratio:.1f}" for ratio in ratios[order[-1]])
            notes.append(f"the mean of {len(self.reviews)} files of reviews, whose {order[-1]} is {runs}")
        return Scores({name: statistics.fmean(ratios[name]) for name in order}, "all" if order else "",
                      [items[answer.id] for answer in answers], notes)

    def _reviews(self, path: str, categories: Mapping[str | int, str], answers: Sequence[Answer]
                 ) -> list[Mapping[str, Any]]:
        """UserError, one line, unless they are of these answers to questions of these categories."""
        given = {answer.id: answer.line.get("answer_id") for answer in answers}
        reviews, seen = read_reviews(path), set()
        for review in reviews:
            asked = review["question_id"]
            if asked not in given or asked in seen:
                raise UserError(f"{path}: question {asked!r} "
                                 + ("is reviewed twice" if asked in seen else "has no answer here; of another file?"))
            if given[asked] is not None and review.get("answer2_id", given[asked]) != given[asked]:
                raise UserError(f"{path}: the review of question {asked!r} is of answer "
                                 f"{review['answer2_id']!r}, and the answer here is {given[asked]!r}")
            if review.get("category") != self.prefix + categories.get(asked, ""):
                raise UserError(f"{path}: the review of question {asked!r} is in category "
                                 f"{review.get('category')!r}, and of {self.title} it would be in "
                                 f"{self.prefix + categories.get(asked, '')!r}; it is of another benchmark")
            seen.add(asked)
        return reviews

    def _references(self, path: str) -> dict[str | int, Mapping[str, Any]]:
        references = {}
        for number, row in read_json_lines(path):
            if not isinstance(row.get("question_id"), int | str) or not isinstance(row.get("text"), str):
                raise UserError(f"{path}, line {number}: not an answer with question_id and text")
            if row["question_id"] in references:
                raise UserError(f"{path}, line {number}: question {row['question_id']!r} is there twice")
            references[row["question_id"]] = row
        return references

    def _contexts(self, path: str) -> dict[str, str]:
        contexts = {}
        for number, row in read_json_lines(path):
            try:
                contexts[row["image"]] = self.describe(row)
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {number}: not the context of an image of {self.title}, which needs "
                                 f"{self.context_keys}") from None
        return contexts


@dataclass(frozen=True)
class LlavaBenchCoco(LlavaBench):
    """LLaVA-Bench (COCO), or a bench that make-bench has made."""

    title = "LLaVA-Bench (COCO)"
    required_files = ("qa90_questions.jsonl, qa90_gpt4_answer.jsonl and caps_boxes_coco2014_val_80.jsonl (LLaVA's "
                      "repository), images of COCO's val2014; or what make-bench writes")
    name = "llava-bench-coco"
    question_file = "qa90_questions.jsonl"
    files = {
        "questions": (question_file, "questions.jsonl"),
        "references": ("qa90_gpt4_answer.jsonl", "answers_reference.jsonl"),
        # Where LLaVA's repository has it, seen from its folder of the questions.
        "context": ("caps_boxes_coco2014_val_80.jsonl", "../../../llava/eval/table/caps_boxes_coco2014_val_80.jsonl",
                    "context.jsonl"),
    }
    context_keys = "image, captions, and instances of category and bbox"
    image_folder = "val2014"
    num_published = 90

    def load(self, data: str) -> list[Question]:
        """The questions. An image is found under the name that COCO gave it, too."""
        questions = []
        for question in super().load(data):
            folder, name = os.path.split(question.images[0])
            whole = os.path.join(folder, f"COCO_val2014_{name}")
            if os.path.exists(whole) and not os.path.exists(question.images[0]):
                question = Question(question.id, question.text, (whole,), question.row)
            questions.append(question)
        return questions

    def describe(self, row: Mapping[str, Any]) -> str:
        """Captions, a blank line, and boxes."""
        if not isinstance(row["captions"], list):
            raise TypeError
        boxes = [f"{box['category']}: {box['bbox']}" for box in row["instances"]]
        return "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)


@dataclass(frozen=True)
class LlavaBenchWild(LlavaBench):
    """LLaVA-Bench (In-the-Wild): paintings, memes, sketches and the like, described by people who know them."""

    title = "LLaVA-Bench (In-the-Wild)"
    required_files = ("questions.jsonl, answers_gpt4.jsonl, context.jsonl and images/, the Hugging Face data set "
             "liuhaotian/llava-bench-in-the-wild")
    name = "llava-bench-wild"
    prefix = "llava_bench_"
    question_file = "questions.jsonl"
    files = {"questions": (question_file,), "references": ("answers_gpt4.jsonl",), "context": ("context.jsonl",)}
    context_keys = "image and caption"
    image_folder = "images"
    num_published = 60

    def describe(self, row: Mapping[str, Any]) -> str:
        """The caption, or its lines."""
        caption = row["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption)
