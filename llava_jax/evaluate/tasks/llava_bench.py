"""LLaVA-Bench: open questions in three categories, whose answers a judge compares with reference answers.

A language model that was given the image in words wrote the references. The judge sees the image in the same way
(Visual Instruction Tuning, section 5.1). The judge itself is `evaluate/judge/`.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llava_jax.cli import Flag
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.reviews import (
    ORDER,
    failure_notes,
    read_reviews,
    scored,
    short,
    summarize,
    summarize_as_published,
)
from llava_jax.evaluate.tasks.base import EMPTY, Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find_file, require_file
from llava_jax.files import matches_schema, read_json_lines


@dataclass(frozen=True)
class JudgeCase:
    """The judge's view of one question, without the candidate's answer."""

    question: Question
    category: str  # as rules and reviews name it
    context: str  # the image in words
    reference: Mapping[str, Any]  # a line of an answer file


@dataclass(frozen=True)
class LlavaBench(QuestionFileTask):
    """Base class of both sets. The score needs reviews, which `evaluate judge` makes."""

    reviews: tuple[str, ...] = ()
    """Files of a judge's reviews of these answers. Their mean is the score; without a file there is no score."""
    compat: Flag = False
    """Whether to use the arithmetic of LLaVA's summary, where failed judgements lower both means."""

    name: ClassVar[str]  # key in TASKS
    prefix: ClassVar[str] = ""  # prefix of categories in rules and reviews
    files: ClassVar[Mapping[str, tuple[str, ...]]]  # candidates for the files of questions, references and context
    context_keys: ClassVar[str]  # fields that `describe` reads
    max_new_tokens = 1024

    def __post_init__(self):
        if isinstance(self.reviews, str):
            object.__setattr__(self, "reviews", (self.reviews,) if self.reviews else ())

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for another category, or for an id that occurs twice."""
        path = self.question_path(data)
        questions, ids = super().load(path), set()
        for question in questions:
            if question.row.get("category") not in ORDER:
                raise UserError(f"{path}: question {question.id!r} has as category {question.row.get('category')!r}; "
                                f"those of {self.title} are {', '.join(ORDER)}")
            if question.id in ids:
                raise UserError(f"{path}: question {question.id!r} is there twice")
            ids.add(question.id)
        return questions

    def question_path(self, data: str) -> str:
        return data if os.path.isfile(data) else require_file(data, *self.files["questions"])

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        for path in self.reviews:
            read_reviews(path)

    def paths(self, data: str, reference: str = "", context: str = "") -> dict[str, str]:
        """Returns the files of questions, references and context. Raises UserError if one is missing."""
        for path in filter(None, (reference, context)):
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file")
        return {"questions": self.question_path(data),
                "references": reference or require_file(data, *self.files["references"]),
                "context": context or require_file(data, *self.files["context"])}

    def cases(self, paths: Mapping[str, str]) -> list[JudgeCase]:
        """Returns one case per question.

        Raises UserError if a question has no reference, an image no context, or the files do not belong together.
        """
        references, contexts = self._references(paths["references"]), self._contexts(paths["context"])
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
            cases.append(JudgeCase(question, self.prefix + category, contexts[image], reference))
        return cases

    def describe(self, row: Mapping[str, Any]) -> str:
        """Returns the image in words, from a row of the context file. Raises KeyError or TypeError if it has none."""
        raise NotImplementedError

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns conv, detail, complex and all, in percent of the reference's scores, if there are reviews.

        The figures of several files of reviews are the means of the files' figures, as published.
        """
        path = find_file(data, *self.files["references"])
        references = self._references(path) if path else {}
        categories = {question.id: question.row["category"] for question in questions}
        items = {answer.id: ScoredAnswer(answer.id, None, references.get(answer.id, {}).get("text", ""),
                                         category=categories.get(answer.id, "")) for answer in answers}
        empty = [answer for answer in answers if not answer.text.strip()]
        notes = [*self.size_notes(questions), *unparsed_notes(empty, len(answers), EMPTY)]
        if not self.reviews:
            notes.append(f"scored by a judge: python -m llava_jax.evaluate judge {self.name} --answers FILE --data "
                         f"{data} --out DIR --model NAME; then --reviews DIR/reviews/reviews_1.jsonl here")
        scores, ratios = defaultdict(list), defaultdict(list)
        for path in self.reviews:
            reviews, name = self._reviews(path, categories, answers), f"{path}: " * (len(self.reviews) > 1)
            for review in scored(reviews):
                scores[review["question_id"]].append(review["tuple"])
            notes += [name + note for note in failure_notes(reviews, self.compat)]
            if len(reviews) < len(answers):
                notes.append(f"{name}{len(answers) - len(reviews):,} of {len(answers):,} answers have no review and "
                             "are left out")
            for category, figure in (summarize_as_published if self.compat else summarize)(reviews).items():
                ratios[short(category)].append(figure.ratio)
        for id, pairs in scores.items():
            reference, candidate = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            items[id] = replace(items[id], score=candidate / 10, parsed=f"{candidate:g}, the reference {reference:g}")
        order = [name for name in (*ORDER, "all") if name in ratios]
        if len(self.reviews) > 1 and order:
            runs = " ".join(f"{ratio:.1f}" for ratio in ratios[order[-1]])
            notes.append(f"the mean of {len(self.reviews)} files of reviews, whose {order[-1]} is {runs}")
        return Scores({name: statistics.fmean(ratios[name]) for name in order}, "all" if order else "",
                      [items[answer.id] for answer in answers], notes)

    def _reviews(self, path: str, categories: Mapping[str | int, str], answers: Sequence[Answer]
                 ) -> list[Mapping[str, Any]]:
        """Returns the reviews of a file. Raises UserError if they are of other answers or another benchmark."""
        answer_ids = {answer.id: answer.line.get("answer_id") for answer in answers}
        reviews, reviewed = read_reviews(path), set()
        for review in reviews:
            id = review["question_id"]
            if id in reviewed:
                raise UserError(f"{path}: question {id!r} is reviewed twice")
            if id not in answer_ids:
                raise UserError(f"{path}: question {id!r} has no answer here; of another file?")
            if answer_ids[id] is not None and review.get("answer2_id", answer_ids[id]) != answer_ids[id]:
                raise UserError(f"{path}: the review of question {id!r} is of answer {review['answer2_id']!r}, and the "
                                f"answer here is {answer_ids[id]!r}")
            category = self.prefix + categories.get(id, "")
            if review.get("category") != category:
                raise UserError(f"{path}: the review of question {id!r} is in category {review.get('category')!r}, and "
                                f"of {self.title} it would be in {category!r}; it is of another benchmark")
            reviewed.add(id)
        return reviews

    def _references(self, path: str) -> dict[str | int, Mapping[str, Any]]:
        references = {}
        for number, row in read_json_lines(path):
            if not matches_schema(row, {"question_id": int | str, "text": str}):
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
            except (KeyError, TypeError):
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
        # The second is its path in LLaVA's repository, relative to the folder of the questions.
        "context": ("caps_boxes_coco2014_val_80.jsonl", "../../../llava/eval/table/caps_boxes_coco2014_val_80.jsonl",
                    "context.jsonl"),
    }
    context_keys = "image, captions, and instances of category and bbox"
    image_folder = "val2014"
    num_published = 90

    def load(self, data: str) -> list[Question]:
        """Returns the questions. An image may have COCO's name as well."""
        return list(map(_with_coco_name, super().load(data)))

    def describe(self, row: Mapping[str, Any]) -> str:
        """Returns captions, a blank line, and boxes."""
        if not isinstance(row["captions"], list):
            raise TypeError
        boxes = [f"{box['category']}: {box['bbox']}" for box in row["instances"]]
        return "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)


@dataclass(frozen=True)
class LlavaBenchWild(LlavaBench):
    """LLaVA-Bench (In-the-Wild): paintings, memes, sketches and other images, described by people who know them."""

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
        """Returns the caption, or its lines."""
        caption = row["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption)


def _with_coco_name(question: Question) -> Question:
    folder, name = os.path.split(question.images[0])
    path = os.path.join(folder, f"COCO_val2014_{name}")
    if os.path.exists(path) and not os.path.exists(question.images[0]):
        return replace(question, images=(path,))
    return question
