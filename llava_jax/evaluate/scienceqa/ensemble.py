"""Combines a LLaVA with a language model that sees no image, on ScienceQA (Visual Instruction Tuning, section 5.2).

Complement: the language model's answer, or LLaVA's if that names no letter. Judge: if the two differ, the language
model is asked once more with both answers. The arithmetic is that of LLaVA's scripts, which draw a random choice if an
answer names none.
"""

import dataclasses
import datetime
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from llava_jax.cli import Flag, one_line, printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.log import AnswerLog
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatModel, Unfinished
from llava_jax.evaluate.runner import answer_file
from llava_jax.evaluate.runner.tables import markdown, number
from llava_jax.evaluate.scienceqa.problems import Problem, read_problems
from llava_jax.evaluate.scienceqa.task import FAILED, GROUPS, choice, parse_statement, score_groups
from llava_jax.evaluate.scienceqa.teacher import PROMPTS_HASH, ScienceQATeacher
from llava_jax.evaluate.tasks.base import Answer, unparsed_notes
from llava_jax.files import make_folder, matches_schema, read_json, write_file

Texts = Mapping[str, str]
"""Texts of one model by the problems' ids."""


@dataclass(frozen=True)
class Ensemble:
    """Choices of each method, and counts.

    Attributes:
      choices: Method -> id of a problem -> index of the choice, -1 for none. The methods are ours, teacher (the
        language model), complement and, if it was asked again, judge.
      counts: Number of right answers by method, `upper` (either is right), `no_answer` (the teacher names no letter),
        `drawn` (random choices) and `total`.
    """

    choices: Mapping[str, Mapping[str, int]]
    counts: Mapping[str, int]


def combine(problems: Mapping[str, Problem], ours: Texts, teacher: Texts, judge: Texts | None = None,
            seed: int | None = 0) -> Ensemble:
    """Combines the texts of two models for the problems that both answered.

    A text must say exactly once `The answer is X.` Otherwise, or if no choice has that letter, a choice is drawn:
    `random.Random(seed)` gives those of the original after `random.seed(seed)`. Without a seed such an answer is wrong.

    Args:
      judge: The judge's texts for the problems on which it was asked. None leaves the judge out.
    """
    rng = random.Random(seed)
    methods = ("ours", "teacher", "complement") if judge is None else ("ours", "teacher", "complement", "judge")
    choices: dict[str, dict[str, int]] = {method: {} for method in methods}
    counts = {method: 0 for method in (*methods, "upper", "no_answer", "drawn", "total")}
    for pid, problem in problems.items():
        if pid not in ours or pid not in teacher:
            continue
        texts = {"ours": ours[pid], "teacher": teacher[pid]}
        if judge is not None:
            texts["judge"] = judge.get(pid, "")
        letters = {method: parse_statement(text) for method, text in texts.items()}
        chosen = {}
        for method, letter in letters.items():  # the order of the original's draws
            chosen[method] = choice(letter, problem)
            if chosen[method] == -1 and seed is not None:
                chosen[method] = rng.choice(range(len(problem["choices"])))
                # The draw for a judge who names no letter is not used.
                counts["drawn"] += method != "judge" or letter != FAILED
        chosen["complement"] = chosen["ours" if letters["teacher"] == FAILED else "teacher"]
        if letters.get("judge") == FAILED:
            chosen["judge"] = chosen["ours"]
        right = {method: chosen[method] == problem["answer"] for method in methods}
        for method in methods:
            choices[method][pid] = chosen[method]
            counts[method] += right[method]
        # The script with a judge counts the teacher's lucky draws, the one without does not.
        counts["upper"] += right["ours"] or right["complement" if judge is None else "teacher"]
        counts["no_answer"] += letters["teacher"] == FAILED
        counts["total"] += 1
    return Ensemble(choices, counts)


def disagreements(problems: Mapping[str, Problem], ours: Texts, teacher: Texts) -> list[str]:
    """Returns the ids of the problems on which the two name different letters, or only one names any."""
    both = (pid for pid in problems if pid in ours and pid in teacher)
    return [pid for pid in both if parse_statement(ours[pid]) != parse_statement(teacher[pid])]


def read_texts(path: str, problems: Mapping[str, Problem], partial: bool, complete: bool = True) -> dict[str, str]:
    """Returns texts by question id, from JSON lines with question_id and text, or from a result file (JSON, outputs).

    Raises UserError if the file is missing. Unless `partial`, it also raises UserError for an id that is unknown,
    occurs twice, or is missing although the file should be `complete`.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file of answers")
    pairs = _read_pairs(path)
    texts = dict(pairs)
    if not partial:
        for pid in texts:
            if pid not in problems:
                raise UserError(f"{path}: has an answer to {pid!r}, which is no question of this split of ScienceQA")
        if len(texts) < len(pairs):
            raise UserError(f"{path}: answers {len(pairs) - len(texts):,} questions more than once")
        if missing := [pid for pid in problems if complete and pid not in texts]:
            raise UserError(f"{path}: {len(missing):,} of {len(problems):,} questions have no answer, the first is "
                            f"{missing[0]!r}; --partial counts those that all files answer")
    return texts


def _read_pairs(path: str) -> list[tuple[str | int, str]]:
    try:
        outputs = read_json(path)["outputs"]
    except (UserError, KeyError):
        return [(line["question_id"], line["text"]) for line in answer_file.read(path)[0]]
    if not matches_schema(outputs, dict):
        return [(line["question_id"], line["text"]) for line in answer_file.read(path)[0]]
    for pid, text in outputs.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the output of {pid!r} is no text")
    return list(outputs.items())


@dataclass(frozen=True)
class ScienceQAEnsemble:
    """Combines a LLaVA's answers to ScienceQA with the answers of a language model that sees no image.

    If the two differ, the language model can also judge. Its answers and judgements come from files, or from any server
    with OpenAI's chat API (--model). Every reply is kept in OUT/asked.jsonl, and the same command asks only for missing
    replies.

    Exit codes: 0; 1, some requests got no answer; 2, an error of the user in one line, or no request was answered;
    3, --max-requests are used up; 130 after Ctrl-C and 75 after SIGTERM. After 1, 3, 75 and 130 the same command
    continues."""

    answers: tyro.conf.Positional[str]
    """LLaVA's answers, JSON lines, of a model tuned to reason. Its answers contain `The answer is X.`"""
    data: str
    """ScienceQA's folder, as for evaluate scienceqa."""
    out: str
    """Folder for the results."""
    split: str = "test"
    """Split: test, val, minitest, ..."""
    teacher: str = ""
    """The language model's answers: a result file (JSON with outputs) or JSON lines. By default --model is asked."""
    judge: str = ""
    """File of the language model's judgements, JSON lines. By default --model is asked, and without a model there is no
    judge."""
    unread: Literal["draw", "wrong"] = "draw"
    """Treatment of an answer without a letter: draw a choice, as LLaVA's scripts do, or count it as wrong."""
    seed: int = 0
    """Random seed for these draws and for the examples in the language model's prompt."""
    partial: Flag = False
    """Whether to count only the questions that both have answered, instead of refusing incomplete files."""
    model: Annotated[ChatModel, tyro.conf.arg(name="")] = field(default_factory=ChatModel)
    shots: int = 2
    """Number of solved questions of the train split in the language model's prompt."""

    def run(self) -> int:
        if not self.teacher and not self.model.model:
            raise UserError("give the language model's answers (--teacher FILE) or its name (--model NAME)")
        if self.model.model:
            self.model.check()
        problems = read_problems(self.data, self.split)
        ours = read_texts(self.answers, problems, self.partial)
        teacher = read_texts(self.teacher, problems, self.partial) if self.teacher else None
        judge = read_texts(self.judge, problems, self.partial, complete=False) if self.judge else None
        make_folder(self.out)
        if self.model.model and (teacher is None or judge is None):
            shots = self._shots() if teacher is None else []
            try:
                teacher, judge = self._ask(problems, ours, teacher, judge, shots)
            except Unfinished as unfinished:
                print(one_line(unfinished), file=sys.stderr)
                return unfinished.code
        self._write(problems, combine(problems, ours, teacher, judge, self.seed if self.unread == "draw" else None))
        both = [pid for pid in problems if pid in ours and pid in teacher]
        for name, texts in (("LLaVA", ours), ("the language model", teacher)):
            unread = [Answer(pid, texts[pid]) for pid in both
                      if choice(parse_statement(texts[pid]), problems[pid]) == -1]
            for note in unparsed_notes(unread, len(both), f"of {name} name no choice in the words `The answer is X.`"):
                print(printable(note))
        return 0

    def _ask(self, problems: Mapping[str, Problem], ours: dict[str, str], teacher: dict[str, str] | None,
             judge: dict[str, str] | None, shots: Sequence[Problem]) -> tuple[dict[str, str], dict[str, str]]:
        with AnswerLog(os.path.join(self.out, "asked.jsonl")) as log:
            asker = ScienceQATeacher(self.model, log, Budget(max_requests=self.model.max_requests), self.partial)
            if teacher is None:
                asked = {pid: problem for pid, problem in problems.items() if pid in ours}
                teacher = asker.solve(asked, shots, os.path.join(self.out, "teacher.jsonl"))
            if judge is None:
                asked = {pid: problems[pid] for pid in disagreements(problems, ours, teacher)}
                judge = asker.judge(asked, ours, teacher, os.path.join(self.out, "judge.jsonl"))
        return teacher, judge

    def _shots(self) -> list[Problem]:
        if not self.shots:
            return []
        train = [problem for problem in read_problems(self.data, "train").values() if problem["image"] is None]
        if len(train) < self.shots:
            raise UserError(f"{self.data}: --shots {self.shots}, but {len(train)} problems of train have no image")
        return random.Random(self.seed).sample(train, self.shots)

    def _write(self, problems: Mapping[str, Problem], ensemble: Ensemble) -> None:
        counts, total = ensemble.counts, ensemble.counts["total"]
        if not total:
            raise UserError(f"{self.answers} and {self.teacher or self.model.model} have no question in common")
        tables = {method: score_groups(problems, chosen) for method, chosen in ensemble.choices.items()}
        for method in ("complement", "judge"):
            if method in ensemble.choices:
                result = {"acc": counts[method] / total * 100, "correct": counts[method], "count": total,
                          "results": ensemble.choices[method], "outputs": {}}
                write_file(os.path.join(self.out, f"{method}.json"), json.dumps(result, indent=2))
        results = {
            "counts": dict(counts), "table": tables, "settings": dataclasses.asdict(self), "prompts": PROMPTS_HASH,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_file(os.path.join(self.out, "results.json"), json.dumps(results, indent=2))
        columns = [*GROUPS, "Avg"]
        print(markdown([["%", *columns], *([method, *(number(figures.get(column)) for column in columns)]
                                           for method, figures in tables.items())]))
        share = {name: f"{counts[name]:,} ({counts[name] / total * 100:.2f} %)" for name in ("upper", "no_answer")}
        print(f"\n{total:,} questions; either is right: {share['upper']}; the language model names no letter: "
              f"{share['no_answer']}")
        if counts["drawn"]:
            print(f"{counts['drawn']:,} answers name no choice in the words `The answer is X.`, and one was drawn "
                  f"(seed {self.seed}); --unread wrong counts them as wrong")
