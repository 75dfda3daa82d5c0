"""Makes a bench as LLaVA-Bench (COCO) is, of any images with captions and boxes (Visual Instruction Tuning, 5.1).

Of each image there are three questions: one of a conversation, a request to describe it, and one that needs reasoning.
The reference answers are of a language model that is given the image in words, or of rules.
"""

import datetime
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from llava_jax.annotations.boxes import DECIMALS
from llava_jax.annotations.context import AnnotationSource, Context, Contexts, open_contexts
from llava_jax.cli import one_line, printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.endpoint.server import UNANSWERED, check_answered
from llava_jax.endpoint.wording import find_refusal, find_source
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatModel, Unfinished
from llava_jax.evaluate.judge.command import PROMPTS
from llava_jax.files import atomic_write, make_folder
from llava_jax.progress import Progress
from llava_jax.synthesize import evidence, parse
from llava_jax.synthesize.prompts import KINDS, Prompts, read_questions
from llava_jax.synthesize.rules import RulesTeacher

CATEGORIES = dict(zip(KINDS, ("conv", "detail", "complex"), strict=True))
WRITTEN = ("conversation", "complex_reasoning")  # kinds whose question the teacher writes
QUESTIONS, REFERENCES, CONTEXT = "questions.jsonl", "answers_reference.jsonl", "context.jsonl"
MANIFEST, LOG = "manifest.json", "asked.jsonl"


class Asked(NamedTuple):
    """A question about an image, by rules with its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class MakeBench:
    """Make a bench like LLaVA-Bench (COCO) from images with captions and boxes.

    OUT gets questions.jsonl, answers_reference.jsonl and context.jsonl, which `evaluate llava-bench-coco` and `judge
    llava-bench-coco` take (and LLaVA's scripts), and manifest.json. Without --model the rules write everything, and
    need boxes. An image of which not all three questions and answers can be had gives its place to the next one drawn.
    Every reply is kept in OUT/asked.jsonl: the same command asks only what is missing.

    Exit codes: 0; 1, some requests got no answer; 2, a mistake, in one line, or no request at all was answered; 3,
    --max-requests; 130 after Ctrl-C and 75 after SIGTERM. After 1, 3, 75 and 130 the same command goes on."""

    source: Annotated[AnnotationSource, tyro.conf.arg(name="")]
    model: Annotated[ChatModel, tyro.conf.arg(name="")]
    out: str
    """folder for the bench"""
    count: int = 30
    """images, drawn by seed; each gives three questions"""
    questions: Literal["model", "rules"] = "model"
    """who writes the questions, where there is a --model; the reference answers are the model's"""
    seed: int = 0
    """of the draw, and of the questions that ask for descriptions"""
    attempts: int = 3
    """how often something is asked for, at most, when the reply cannot be taken"""

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
            maker = Maker(self, contexts, log)
            try:
                made = maker.make()
            except Unfinished as unfinished:
                print(one_line(unfinished), file=sys.stderr)
                return unfinished.code
        self._write(made, maker, contexts)
        rejects = ", ".join(f"{reason} {number:,}" for reason, number in maker.rejects.most_common())
        print(f"{self.out}: {3 * len(made):,} questions about {len(made):,} images"
              + f"; {maker.tried - len(made):,} images were passed over ({rejects})" * (maker.tried > len(made)))
        return 0

    def _write(self, made: Mapping[int, Mapping[str, Asked]], maker: "Maker", contexts: Contexts) -> None:
        questions, references, described = [], [], []
        author = maker.author
        for image in sorted(made):
            context = contexts[image]
            boxes = [{"category": box.category + " (crowd)" * box.crowd,
                      "bbox": [round(float(value), DECIMALS) for value in (box.x1, box.y1, box.x2, box.y2)]}
                     for box in context.boxes]
            described.append({"id": context.id, "image": context.image, "captions": list(context.captions),
                              "instances": boxes})
            for kind, (question, answer) in made[image].items():
                row = {"question_id": len(questions), "category": CATEGORIES[kind]}
                questions.append({**row, "image": context.image, "text": question})
                name = hashlib.sha256(json.dumps([author, context.image, question, answer]).encode()).hexdigest()[:22]
                references.append({**row, "text": answer, "answer_id": name, "model_id": author})
        manifest = {
            "questions_by": "rules" if maker.by_rules else author, "references_by": author, "images": len(made),
            "prompts": maker.prompts_hash, "passed_over": maker.tried - len(made), "rejects": dict(maker.rejects),
            "count": self.count, "seed": self.seed, "attempts": self.attempts, "files": list(contexts.files),
            "notes": dict(contexts.notes), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for name, rows in ((CONTEXT, described), (REFERENCES, references), (QUESTIONS, questions)):
            with atomic_write(os.path.join(self.out, name)) as file:
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with atomic_write(os.path.join(self.out, MANIFEST)) as file:
            file.write(json.dumps(manifest, ensure_ascii=False, indent=1).encode() + b"\n")


class Maker:
    """Asks for questions and answers; what it takes follows from options, images and replies alone.

    Attributes:
      author: of the reference answers. by_rules: whether the questions are of rules.
      rejects: replies that could not be taken, by reason. tried: images.
    """

    def __init__(self, options: MakeBench, contexts: Contexts, log: AnswerLog):
        self.options, self.contexts, self.log = options, contexts, log
        self.author = options.model.model or "rules"
        self.by_rules = not options.model.model or options.questions == "rules"
        self.rejects: Counter[str] = Counter()
        self.tried = self._answered = 0
        self.prompts_hash = ""
        self._rules = RulesTeacher(seed=options.seed)
        self._pool = read_questions("detail_description")
        self._budget = Budget(max_requests=options.model.max_requests)
        if options.model.model:
            self._prompts = Prompts.load(kinds=WRITTEN)
            with open(os.path.join(PROMPTS, "reference.txt"), encoding="utf-8") as file:
                self._reference = file.read().strip()
            told = [self._reference, "" if self.by_rules else self._prompts.hash]
            self.prompts_hash = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def make(self) -> dict[int, dict[str, Asked]]:
        """Number of an image -> kind -> question and reference answer. UserError if there are too few images that
        give all; Unfinished."""
        order = random.Random(self.options.seed).sample(range(len(self.contexts)), len(self.contexts))
        made: dict[int, dict[str, Asked]] = {}
        while len(made) < self.options.count:
            drawn = order[self.tried : self.tried + self.options.count - len(made)]
            if not drawn:
                why = ", ".join(f"{reason} {number:,}" for reason, number in self.rejects.most_common())
                raise UserError(f"--count {self.options.count}: only {len(made):,} of {len(order):,} images give all "
                                 f"three questions and answers ({why})")
            self.tried += len(drawn)
            asked = self._questions(drawn)
            if self.options.model.model:
                asked = self._references(asked)
            made.update((image, kinds) for image, kinds in asked.items() if len(kinds) == len(KINDS))
        return made

    def _questions(self, drawn: Sequence[int]) -> dict[int, dict[str, Asked]]:
        """By rules with their answers, by the model without."""
        replies = {} if self.by_rules else self._written(drawn)
        asked: dict[int, dict[str, Asked]] = {}
        for image in drawn:
            context = self.contexts[image]
            pooled = random.Random(f"{self.options.seed} question {context.id}").choice(self._pool)
            for kind in KINDS:
                if kind == "detail_description" and not self.by_rules:
                    found = Asked(pooled, "")
                elif self.by_rules:
                    found = self._say_by_rules(kind, context, pooled)
                else:
                    found = replies.get((image, kind))
                if found:
                    asked.setdefault(image, {})[kind] = found
        return {image: kinds for image, kinds in asked.items() if len(kinds) == len(KINDS)}

    def _say_by_rules(self, kind: str, context: Context, pooled: str) -> Asked | None:
        try:
            turns = parse.parse(kind, self._rules.answer(kind, context), "stop", pooled)
        except parse.Reject as reject:
            self.rejects[reject.reason] += 1
            return None
        return Asked(turns[0]["value"], turns[1]["value"])

    def _written(self, drawn: Sequence[int]) -> dict[tuple[int, str], Asked]:
        """The first question of what the model writes: those after it may lean on it."""
        def accept(job: "Job", reply: Response) -> Asked:
            question = parse.parse(job.kind, reply.text, reply.finish_reason)[0]["value"]
            return Asked(question, "")

        jobs = [Job(image, kind, self._prompts.messages(kind, self.contexts[image]), self.options.model.parameters)
                for image in drawn for kind in WRITTEN]
        return self._ask(jobs, accept, "questions")

    def _references(self, asked: Mapping[int, Mapping[str, Asked]]) -> dict[int, dict[str, Asked]]:
        def accept(job: "Job", reply: Response) -> Asked:
            question = asked[job.image][job.kind].question
            return Asked(question, self._check_answer(job, question, reply))

        jobs = [Job(image, kind, self._answer_messages(self.contexts[image], kinds[kind].question),
                    self.options.model.parameters) for image, kinds in asked.items() for kind in KINDS]
        found: dict[int, dict[str, Asked]] = {}
        for (image, kind), answered in self._ask(jobs, accept, "answers").items():
            found.setdefault(image, {})[kind] = answered
        return {image: {kind: kinds[kind] for kind in KINDS if kind in kinds} for image, kinds in found.items()}

    def _answer_messages(self, context: Context, question: str) -> tuple[dict[str, str], ...]:
        content = f"{context.text}\n\nQuestion:\n{question}"
        return {"role": "system", "content": self._reference}, {"role": "user", "content": content}

    def _check_answer(self, job: "Job", question: str, reply: Response) -> str:
        """The text of a reply, if it may stand as a reference. Raises parse.Reject."""
        text = parse.THINKING.sub("", reply.text).strip()
        if reply.finish_reason == "length":
            raise parse.Reject("truncated", "the reply hit the limit of tokens")
        if reply.finish_reason == "content_filter" or find_refusal(text):
            raise parse.Reject("refusal", text[:60])
        if not text:
            raise parse.Reject("empty", "the reply is empty")
        if found := find_source(text):
            raise parse.Reject("mentions_source", found)
        turns = ({"from": "human", "value": question}, {"from": "gpt", "value": text})
        if found := evidence.check(turns, self.contexts[job.image], self.contexts.categories).findings:
            raise parse.Reject("contradiction", f"{found[0].claim!r}, but {found[0].against}")
        return text

    def _ask(self, jobs: Sequence["Job"], accept: Any, unit: str) -> dict[tuple[int, str], Asked]:
        """What was accepted. Raises Unfinished where requests failed that may have more luck later: what is made must
        not depend on them."""
        found: dict[tuple[int, str], Asked] = {}
        failures: list[str] = []

        def record(job: Job, attempt: int, answer: Response | RequestFailed) -> bool:
            if isinstance(answer, RequestFailed):
                self.rejects["request_failed"] += 1
                failures.extend([str(answer)] if answer.reason == "no_answer" else [])
                return True
            self._answered += 1
            try:
                found[job.image, job.kind] = accept(job, answer)
            except parse.Reject as reject:
                self.rejects[reject.reason] += 1
                return attempt + 1 >= self.options.attempts
            return True

        if jobs:
            progress = Progress(len(jobs), unit=unit, note=lambda: self._budget.summary(self.rejects))
            self.options.model.ask(jobs, self.log, record, self._budget, progress)
        if failures:
            check_answered(len(failures) + self._answered, failures)
            raise Unfinished(f"{len(failures):,} requests got no answer, the first by {printable(failures[0])}; the "
                             "same command asks them again", UNANSWERED)
        return found


@dataclass(frozen=True)
class Job:
    """A question to the model about an image."""

    image: int
    kind: str
    messages: tuple[dict[str, str], ...]
    parameters: Mapping[str, Any]

    def request(self, attempt: int) -> ChatRequest:
        return ChatRequest(self.messages, self.parameters, attempt)
