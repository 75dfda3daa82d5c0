"""The commands of `synthesize` besides `run`: estimate, preview, status and view."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

from llava_jax.cli import Flag, printable
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import load_price
from llava_jax.endpoint.run import answer_all
from llava_jax.endpoint.server import UNANSWERED, Server, check_answered, code_of
from llava_jax.errors import UserError, user_path
from llava_jax.files import parse_json, require_fields
from llava_jax.json_lines import is_written
from llava_jax.pages import page
from llava_jax.synthesize.estimate import describe, estimate
from llava_jax.synthesize.output import MANIFEST, REJECTED, check_folder
from llava_jax.synthesize.running import open_log, open_synthesis, read_status
from llava_jax.synthesize.synthesis import COUNTS, SETTINGS, Outcome, Synthesis, SynthesisSettings, SynthesisTask
from llava_jax.synthesize.viewer import ViewedSample, render_page


@dataclasses.dataclass(frozen=True)
class EstimateCommand:
    """Estimates requests, tokens and cost of a run, without sending any request.

    Prompt tokens are counted on 1,000 tasks of each kind. If the log of OUT has answers (of `preview`, or of a stopped
    run), their tokens give the length of further answers, and only remaining requests count.
    """

    settings: Annotated[SynthesisSettings, tyro.conf.arg(name="")]
    prices: str = ""
    """JSON file: {"MODEL": {"prompt": USD per million tokens, "completion": ..., "cached": ..., "batch": factor}}."""
    tokenizer: str = ""
    """File or folder of the teacher's tokenizer, to count tokens. Otherwise 4.3 bytes count as a token."""

    def run(self) -> int:
        self.settings.check()
        price = load_price(self.prices, self.settings.model) if self.prices else None
        tokenizer = None
        if self.tokenizer:
            from llava_jax.text.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(self.tokenizer)
        synthesis = open_synthesis(self.settings)
        if self.settings.teacher == "rules":
            print(f"{len(synthesis):,} tasks; rules ask nobody and cost nothing")
            return 0
        with _read_log(self.settings.log) as log:
            print(describe(estimate(synthesis, log, tokenizer), price, synthesis.attempts))
        return 0


@dataclasses.dataclass(frozen=True)
class PreviewCommand:
    """Prints some prompts in full, with the teacher's answers.

    The answers are written to OUT, where `run` finds them, so nothing is paid for twice.
    """

    settings: Annotated[SynthesisSettings, tyro.conf.arg(name="")]
    server: Annotated[Server, tyro.conf.arg(name="")]
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 5
    """Number of tasks, drawn by seed, alternating between the kinds."""
    dry_run: Flag = False
    """Whether to print the prompts and send no request."""

    def run(self) -> int:
        self.settings.check()
        self.server.check()
        if self.count < 1:
            raise UserError(f"--count is {self.count}: it must be at least 1")
        check_folder(self.settings.out)
        if self.settings.teacher == "openai" and not self.dry_run:
            self.server.check_model(self.settings.model, self.settings.base_url)
        synthesis, cancel = open_synthesis(self.settings), CancelToken()
        tasks = list(itertools.islice(synthesis.drawn(self.settings.seed, self.settings.kinds), self.count))
        if self.dry_run:
            _print_tasks(tasks)
            return 0
        with open_log(self.settings) as log:
            failures = asyncio.run(self._ask(tasks, synthesis, log, cancel))
            _print_tasks(tasks, log, failures)
            check_answered(sum(task.key(0) in log for task in tasks) + len(failures), list(failures.values()))
        if cancel.requested:
            return code_of(cancel)
        return UNANSWERED if failures else 0

    async def _ask(
        self, tasks: list[SynthesisTask], synthesis: Synthesis, log: AnswerLog, cancel: CancelToken
    ) -> dict[tuple[str, str], str]:
        """Writes the first answer of every task to the log. Returns why other tasks have none."""
        failures = {}

        def record(task: SynthesisTask, attempt: int, answer: Any) -> bool:
            if isinstance(answer, Exception):
                failures[task.name] = str(answer)
            return True

        with cancel.handle_signals():
            if self.settings.teacher == "rules":
                await answer_all(tasks, synthesis.teacher, log, record, cancel=cancel)
            else:
                settings = self.settings
                async with self.server.open(settings.model, settings.base_url, cancel) as endpoint:
                    await answer_all(tasks, endpoint, log, record, cancel=cancel, concurrency=self.server.concurrency)
        return failures


@dataclasses.dataclass(frozen=True)
class StatusCommand:
    """Prints the progress of a run, or how it ended; also while it is running."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder of the run."""

    def run(self) -> int:
        settings = SynthesisSettings.load(self.folder)
        running, status = _read_status(settings)
        _print(f"{self.folder}: {settings.teacher}" + (f", {settings.model}" if settings.model else "")
              + f", language {settings.language}")
        if status is None:
            _print("nothing has been asked yet")
            return 0
        if running:
            seconds, asked = status["seconds"], status["requests"]
            left = sum(kind["asked"] - kind["accepted"] - kind["rejected"] for kind in status["kinds"].values())
            left = f", {left * seconds / asked / 60:,.0f} minutes left" if asked else ""
            _print(f"running for {seconds / 60:,.0f} minutes{left}, as of {status['written']}")
        else:
            ended = {"done": "done", "running": "killed; the same command goes on"}
            state = ended.get(status["state"], f"{status['state'].replace('_', ' ')}; the same command goes on")
            _print(f"{state}, as of {status['written']}")
        _print(f"{'':20}{'tasks':>10}{'accepted':>10}{'rejected':>10}{'to do':>10}")
        for kind, count in status["kinds"].items():
            left = count["asked"] - count["accepted"] - count["rejected"]
            _print(f"{kind:20}{count['asked']:>10,}{count['accepted']:>10,}{count['rejected']:>10,}{left:>10,}")
        for reason, count in status["rejected_answers"].items():
            _print(f"rejected answers: {count:,} {reason.replace('_', ' ')}")
        tokens = status["tokens"]
        cost = "" if status["cost_usd"] is None else f", {status['cost_usd']:,.2f} USD"
        if status["lost_usd"]:
            cost += f", and up to {status['lost_usd']:,.2f} USD for tries without an answer"
        _print(f"{status['requests']:,} requests of the last command; {tokens.get('prompt', 0):,} prompt and "
              f"{tokens.get('completion', 0):,} completion tokens in all{cost}")
        if not running and os.path.exists(os.path.join(self.folder, MANIFEST)):
            _print(f"{os.path.join(self.folder, MANIFEST)} has the rest")
        return 0


@dataclasses.dataclass(frozen=True)
class ViewCommand:
    """Writes an HTML page of samples: image, boxes, captions, answer and verdict; also while the run is running."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder of the run."""
    image_root: str = ""
    """Folder of the images, to which image paths are relative. Without it boxes are drawn in a blank square."""
    out: str = ""
    """Path of the page; default: OUT/view.html."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 24
    """Number of samples, drawn by seed, alternating between the kinds."""
    only: Literal["all", "accepted", "flagged", "rejected"] = "all"
    """Samples to show. Flagged ones are accepted and contradict captions or boxes."""
    kind: Literal["all", "conversation", "detail", "complex"] = "all"
    """Kind of record to show."""
    seed: int = 0
    """Random seed of the draw."""

    def run(self) -> int:
        if self.count < 1:
            raise UserError(f"--count is {self.count}: it must be at least 1")
        if self.image_root and not os.path.isdir(self.image_root):
            raise UserError(f"--image-root {self.image_root}: no such folder")
        out = self.out or os.path.join(self.folder, "view.html")
        page.check_page(out)
        settings = SynthesisSettings.load(self.folder)
        try:
            synthesis = open_synthesis(settings)
        except UserError as error:  # of a path in the settings, which may have moved
            raise UserError(f"{os.path.join(self.folder, SETTINGS)}: {error}") from None
        kinds = [kind for kind in settings.kinds if self.kind in ("all", COUNTS[kind])]
        with user_path(settings.log):
            opened = AnswerLog(settings.log, read_only=True)
        with opened as log:
            duplicates = _read_duplicates(self.folder)
            found = (ViewedSample(task, _final(task, log, duplicates)) for task in synthesis.drawn(self.seed, kinds))
            samples = list(itertools.islice((sample for sample in found if self._wants(sample.outcome)), self.count))
        about = {"teacher": synthesis.teacher.model, "language": settings.language, "tasks": f"{len(synthesis):,}",
                 "answers in the log": f"{len(log):,}",
                 "shown": f"{len(samples)}, {self.only}, drawn with seed {self.seed}"}
        title = f"Instruction data of {os.path.basename(os.path.abspath(self.folder))}"
        page.write(out, render_page(title, about, samples, self.image_root, settings.language))
        _print(f"{out}: {len(samples)} sample{'s' * (len(samples) != 1)}")
        return 0

    def _wants(self, outcome: Outcome) -> bool:
        verdict = outcome.verdict
        if verdict is None:
            return False
        flagged = verdict.accepted and verdict.evidence is not None and bool(verdict.evidence.findings)
        return {"all": True, "accepted": verdict.accepted, "flagged": flagged,
                "rejected": not verdict.accepted}[self.only]


def _print_tasks(
    tasks: Sequence[SynthesisTask], log: AnswerLog | None = None, failures: Mapping[tuple[str, str], str] | None = None
) -> None:
    shown: set[str] = set()
    for number, task in enumerate(tasks, 1):
        title = f" {number} of {len(tasks)}: {task.kind}, id {task.context.id} "
        _print(f"{title:=^100}")
        _print_prompt(task, with_examples=task.kind not in shown)
        shown.add(task.kind)
        if log is not None:
            _print_answers(task.outcome(log), failures.get(task.name))


def _print_prompt(task: SynthesisTask, with_examples: bool) -> None:
    messages = task.request(0).messages
    if not with_examples:
        _print("(system message and examples as above)\n")
        messages = messages[-1:]
    for message in messages:
        title = f" {message['role']} "
        _print(f"{title:-^100}\n{message['content']}\n")
    if task.question:
        _print(f"(the record's question: {task.question})\n")


def _print_answers(outcome: Outcome, failure: str | None) -> None:
    for _, reply in outcome.answers:
        _print(f"{' answer ':-^100}\n{reply.text}\n")
        _print(f"({reply.model}: {reply.prompt_tokens:,} prompt tokens, {reply.completion_tokens:,} completion tokens)")
    verdict = outcome.verdict
    if verdict is None:
        _print(f"no answer: {failure or 'stopped before'}\n")
    elif not verdict.accepted:
        _print(f"rejected: {verdict.reason}: {verdict.detail}\n")
    else:
        _print("accepted")
        for finding in verdict.evidence.findings if verdict.evidence else ():
            _print(f"  {finding.kind}: {finding.claim}, but {finding.against}")
        _print("")


def _print(text: str) -> None:
    """Prints untrusted text, safe for a terminal, and with ? for characters that it cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "replace").decode(encoding))


@contextlib.contextmanager
def _read_log(path: str) -> Iterator[AnswerLog | dict]:
    """Opens the log for reading, also while another process writes it; {} if the log is missing."""
    if not os.path.exists(path):
        yield {}
        return
    with AnswerLog(path, read_only=True) as log:
        yield log


def _read_duplicates(folder: str) -> dict[tuple[str, str], str]:
    """Returns the tasks that the last run rejected as duplicates: `SynthesisTask.name` -> detail."""
    path, found = os.path.join(folder, REJECTED), {}
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if '"duplicate"' in line:
                row = parse_json(line, f"{path}, line {number}")
                require_fields(row, dict.fromkeys(("kind", "id", "reason", "detail"), str), f"{path}, line {number}")
                if row["reason"] == "duplicate":
                    found[row["kind"], row["id"]] = row["detail"]
    return found


def _final(task: SynthesisTask, log: AnswerLog, duplicates: Mapping[tuple[str, str], str]) -> Outcome:
    outcome = task.outcome(log)
    if task.name not in duplicates or outcome.verdict is None:
        return outcome
    return outcome._replace(verdict=outcome.verdict._replace(reason="duplicate", detail=duplicates[task.name]))


def _read_status(settings: SynthesisSettings) -> tuple[bool, dict[str, Any] | None]:
    """Returns whether a process runs in the folder, and its last status, if any."""
    while True:
        running, status = is_written(settings.log), read_status(settings)
        if running == is_written(settings.log):  # it has neither started nor ended meanwhile
            return running, status
