"""Makes a bench like LLaVA-Bench (COCO) from images with captions and boxes (Visual Instruction Tuning, 5.1).

Each image gets three questions: the first of a conversation, a request to describe it, and one that needs reasoning.
The reference answers come from a language model that is given the image in words, or from rules.
"""

import datetime
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import tyro

from llava_jax.annotations.boxes import DECIMALS
from llava_jax.annotations.context import AnnotationSource, Context, Contexts, open_contexts
from llava_jax.cli import one_line
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Message, Response
from llava_jax.endpoint.wording import find_refusal, find_source
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatJob, ChatModel, Unfinished, require_answers
from llava_jax.evaluate.judge.rules import read_prompt
from llava_jax.files import make_folder, write_json, write_json_lines
from llava_jax.synthesize import evidence, parse
from llava_jax.synthesize.prompts import KINDS, Prompts, read_questions
from llava_jax.synthesize.rules import RulesTeacher

CATEGORIES = dict(zip(KINDS, ("conv", "detail", "complex"), strict=True))
WRITTEN_KINDS = ("conversation", "complex_reasoning")
"""Kinds whose question the model writes."""
QUESTIONS, REFERENCES, CONTEXT = "questions.jsonl", "answers_reference.jsonl", "context.jsonl"
MANIFEST, LOG = "manifest.json", "asked.jsonl"


class BenchQuestion(NamedTuple):
    """A question about an image, and its reference answer if it is known."""

    question: str
    answer: str = ""


Asked = dict[tuple[int, str], BenchQuestion]
"""(index of an image, kind) -> question."""


@dataclass(frozen=True)
class MakeBench:
    """Makes a bench like LLaVA-Bench (COCO) from images with captions and boxes.

    OUT gets questions.jsonl, answers_reference.jsonl and context.jsonl, which `evaluate llava-bench-coco`, `judge
    llava-bench-coco` and LLaVA's scripts accept, and manifest.json. Without --model the rules write everything, and
    need boxes. An image without all three questions and answers is replaced by the next one drawn. Every reply is kept
    in OUT/asked.jsonl, and the same command asks only for missing replies.

    Exit codes: 0; 1, some requests got no answer; 2, an error of the user in one line, or no request was answered;
    3, --max-requests are used up; 130 after Ctrl-C and 75 after SIGTERM. After 1, 3, 75 and 130 the same command
    continues."""

    source: Annotated[AnnotationSource, tyro.conf.arg(name="")]
    model: Annotated[ChatModel, tyro.conf.arg(name="")]
    out: str
    """Folder for the bench."""
    count: int = 30
    """Number of images. Each gives three questions."""
    questions: Literal["model", "rules"] = "model"
    """Author of the questions if there is a --model; the reference answers are the model's."""
    seed: int = 0
    """Random seed for the images and for the requests for descriptions."""
    attempts: int = 3
    """Maximum number of requests for a text, if replies are rejected."""

    def run(self) -> int:
        if self.count < 1 or self.attempts < 1:
            raise UserError("--count and --attempts must be at least 1")
        if self.model.model:
            self.model.check()
        if os.path.exists(os.path.join(self.out, QUESTIONS)) and not os.path.exists(os.path.join(self.out, MANIFEST)):
            raise UserError(f"--out {self.out}: it holds a {QUESTIONS} that make-bench has not made; take another one")
        contexts = open_contexts(self.source)
        if len(contexts) < self.count:
            raise UserError(f"--count {self.count}: there are only {len(contexts):,} images")
        make_folder(self.out)
        with AnswerLog(os.path.join(self.out, LOG)) as log:
            maker = BenchMaker(self, contexts, log)
            try:
                made = maker.make()
            except Unfinished as unfinished:
                print(one_line(unfinished), file=sys.stderr)
                return unfinished.code
        self._write(made, maker)
        images, passed_over = len(made) // len(KINDS), maker.num_tried - len(made) // len(KINDS)
        print(f"{self.out}: {len(made):,} questions about {images:,} images"
              + f"; {passed_over:,} images were passed over ({maker.reject_counts})" * (passed_over > 0))
        return 0

    def _write(self, made: Asked, maker: "BenchMaker") -> None:
        questions, references, author, contexts = [], [], maker.author, maker.contexts
        images = sorted({image for image, _ in made})
        described = [{
            "id": context.id, "image": context.image, "captions": list(context.captions),
            "instances": [{"category": box.category + " (crowd)" * box.crowd,
                           "bbox": [round(float(edge), DECIMALS) for edge in (box.x1, box.y1, box.x2, box.y2)]}
                          for box in context.boxes]} for context in map(contexts.__getitem__, images)]
        for image in images:
            name = contexts[image].image
            for kind in KINDS:
                question, answer = made[image, kind]
                row = {"question_id": len(questions), "category": CATEGORIES[kind]}
                questions.append({**row, "image": name, "text": question})
                id = hashlib.sha256(json.dumps([author, name, question, answer]).encode()).hexdigest()[:22]
                references.append({**row, "text": answer, "answer_id": id, "model_id": author})
        manifest = {
            "questions_by": "rules" if maker.by_rules else author, "references_by": author, "images": len(images),
            "prompts": maker.prompts_hash, "passed_over": maker.num_tried - len(images),
            "rejects": dict(maker.rejects), "count": self.count, "seed": self.seed, "attempts": self.attempts,
            "files": list(contexts.files), "notes": dict(contexts.notes),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for file, rows in ((CONTEXT, described), (REFERENCES, references), (QUESTIONS, questions)):
            write_json_lines(os.path.join(self.out, file), rows)
        write_json(os.path.join(self.out, MANIFEST), manifest)


class BenchMaker:
    """Asks for questions and answers. Its choices follow from options, images and replies alone.

    Attributes:
      author: Author of the reference answers.
      by_rules: Whether rules write the questions.
      rejects: Number of rejected replies by reason.
      num_tried: Number of images that were tried.
      prompts_hash: SHA-256 of the prompts, "" without a model.
    """

    def __init__(self, options: MakeBench, contexts: Contexts, log: AnswerLog):
        self.options, self.contexts, self.log, self.model = options, contexts, log, options.model
        self.author = self.model.model or "rules"
        self.by_rules = not self.model.model or options.questions == "rules"
        self.rejects: Counter[str] = Counter()
        self.num_tried = self._num_answered = 0
        self.prompts_hash = ""
        self._rules = RulesTeacher(seed=options.seed)
        self._pool = read_questions("detail_description")
        self._budget = Budget(max_requests=self.model.max_requests)
        if self.model.model:
            self._prompts, self._reference_prompt = Prompts.load(kinds=WRITTEN_KINDS), read_prompt("reference")
            prompts = [self._reference_prompt, "" if self.by_rules else self._prompts.hash]
            self.prompts_hash = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()

    @property
    def reject_counts(self) -> str:
        return ", ".join(f"{reason} {number:,}" for reason, number in self.rejects.most_common())

    def make(self) -> Asked:
        """Returns all questions and answers. Raises UserError if too few images give all three, or Unfinished."""
        order = random.Random(self.options.seed).sample(range(len(self.contexts)), len(self.contexts))
        made: Asked = {}
        while lacking := self.options.count - len(made) // len(KINDS):
            drawn = order[self.num_tried : self.num_tried + lacking]
            if not drawn:
                raise UserError(f"--count {self.options.count}: only {len(made) // len(KINDS):,} of {len(order):,} "
                                f"images give all three questions and answers ({self.reject_counts})")
            self.num_tried += len(drawn)
            asked = _complete(self._ask_by_rules(drawn) if self.by_rules else self._ask_for_questions(drawn))
            made |= _complete(self._ask_for_answers(asked)) if self.model.model else asked
        return made

    def _pooled(self, image: int) -> str:
        """Returns the request to describe an image."""
        return random.Random(f"{self.options.seed} question {self.contexts[image].id}").choice(self._pool)

    def _ask_by_rules(self, drawn: Sequence[int]) -> Asked:
        asked = {}
        for image, kind in ((image, kind) for image in drawn for kind in KINDS):
            try:
                answer = self._rules.answer(kind, self.contexts[image])
                turns = parse.parse(kind, answer, "stop", self._pooled(image))
                asked[image, kind] = BenchQuestion(turns[0]["value"], turns[1]["value"])
            except parse.Reject as reject:
                self.rejects[reject.reason] += 1
        return asked

    def _ask_for_questions(self, drawn: Sequence[int]) -> Asked:
        """Returns the first question of each text of the model, because later ones may depend on it."""
        def parse_question(job: ChatJob, response: Response) -> BenchQuestion:
            return BenchQuestion(parse.parse(job.key[1], response.text, response.finish_reason)[0]["value"])

        written = self._ask([ChatJob((image, kind), self._prompts.messages(kind, self.contexts[image]),
                                     self.model.parameters) for image in drawn for kind in WRITTEN_KINDS],
                            parse_question, "questions")
        return written | {(image, "detail_description"): BenchQuestion(self._pooled(image)) for image in drawn}

    def _ask_for_answers(self, asked: Asked) -> Asked:
        def parse_answer(job: ChatJob, response: Response) -> BenchQuestion:
            question = asked[job.key].question
            return BenchQuestion(question, self._parse_answer(job, question, response))

        return self._ask([ChatJob(key, self._answer_messages(self.contexts[key[0]], question), self.model.parameters)
                          for key, (question, _) in asked.items()], parse_answer, "answers")

    def _answer_messages(self, context: Context, question: str) -> tuple[Message, ...]:
        content = f"{context.text}\n\nQuestion:\n{question}"
        return {"role": "system", "content": self._reference_prompt}, {"role": "user", "content": content}

    def _parse_answer(self, job: ChatJob, question: str, response: Response) -> str:
        """Returns the text of a response as a reference answer. Raises parse.Reject if it is not acceptable."""
        image, text = job.key[0], parse.THINKING.sub("", response.text).strip()
        if response.finish_reason == "length":
            raise parse.Reject("truncated", "the reply hit the limit of tokens")
        if response.finish_reason == "content_filter" or find_refusal(text):
            raise parse.Reject("refusal", text[:60])
        if not text:
            raise parse.Reject("empty", "the reply is empty")
        if source := find_source(text):
            raise parse.Reject("mentions_source", source)
        turns = ({"from": "human", "value": question}, {"from": "gpt", "value": text})
        if found := evidence.check(turns, self.contexts[image], self.contexts.categories).findings:
            raise parse.Reject("contradiction", f"{found[0].claim!r}, but {found[0].against}")
        return text

    def _ask(self, jobs: Sequence[ChatJob], parse_response: Callable[[ChatJob, Response], BenchQuestion], unit: str
             ) -> Asked:
        """Returns the accepted responses.

        Raises Unfinished for failures that a later run may not have, because the bench must not depend on them.
        """
        accepted: Asked = {}

        def accept(job: ChatJob, response: Response) -> bool:
            self._num_answered += 1
            try:
                accepted[job.key] = parse_response(job, response)
            except parse.Reject as reject:
                self.rejects[reject.reason] += 1
                return False
            return True

        failed = jobs and self.model.ask(jobs, self.log, self._budget, unit, self.options.attempts, accept,
                                         self.rejects)
        failures = [str(failure) for failure in dict(failed).values() if failure.reason == "no_answer"]
        require_answers(failures, len(failures) + self._num_answered, "requests",
                        "the same command asks them again")
        return accepted


def _complete(asked: Asked) -> Asked:
    """Returns the questions of the images that have all kinds, in order."""
    images = dict.fromkeys(image for image, _ in asked)
    return {(image, kind): asked[image, kind] for image in images
            if all((image, kind) in asked for kind in KINDS) for kind in KINDS}
