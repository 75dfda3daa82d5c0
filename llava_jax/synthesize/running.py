"""The command `synthesize run`: asks for every answer that is not in the log, and writes the records."""

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from llava_jax.cli import Flag, printable
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.errors import EndpointStopped, NotSentError, RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import load_price
from llava_jax.endpoint.request import Response
from llava_jax.endpoint.run import Ending, answer_all
from llava_jax.endpoint.server import OVER_BUDGET, UNANSWERED, Server, check_answered, code_of, note
from llava_jax.errors import UserError, user_path
from llava_jax.files import read_json, require_fields, write_json
from llava_jax.progress import Progress
from llava_jax.synthesize.output import check_folder, date, write_outputs
from llava_jax.synthesize.synthesis import SETTINGS, Synthesis, SynthesisSettings, SynthesisTask

STATUS, BATCHES = "progress.json", "batches"
STATUS_SECONDS = 5.0
"""Seconds between two writes of the status."""


@contextlib.contextmanager
def open_log(settings: SynthesisSettings) -> Iterator[AnswerLog]:
    """Opens the log of answers for one process, creates its folder, and prints a note on repairs."""
    with user_path(settings.out):
        os.makedirs(settings.out, exist_ok=True)
        opened = AnswerLog(settings.log)
    with opened as log:
        if log.dropped:
            note(f"{settings.log}: the last line was broken; its {log.dropped:,} bytes were cut off, and that request "
                 "is asked again")
        if log.damaged:
            note(f"{settings.log}, line {log.damaged[0]}: cannot be read, and is passed over"
                 + f" with {len(log.damaged) - 1} others" * (len(log.damaged) > 1))
        yield log


def open_synthesis(settings: SynthesisSettings) -> Synthesis:
    """Reads prompts and images, and prints notes on what was skipped."""
    synthesis = Synthesis(settings)
    for what, count in synthesis.contexts.notes.items():
        note(f"{count:,} {what}")
    if not synthesis.contexts.has_boxes and settings.kinds != ("conversation",):
        note("there are no boxes: descriptions and reasoning are made of captions alone")
    return synthesis


class RunStatus:
    """Records answers, and writes the progress of the run to a file, for the command `status`."""

    def __init__(self, synthesis: Synthesis, budget: Budget):
        self.failures: dict[tuple[str, str], str] = {}
        self.answered = 0
        self.rejects: Counter[str] = Counter()  # answers, not tasks
        self._synthesis, self._budget = synthesis, budget
        self._accepted, self._rejected, self._tokens = Counter[str](), Counter[str](), Counter[str]()
        self._path, self._start, self._written = os.path.join(synthesis.settings.out, STATUS), time.time(), 0.0

    def record(self, task: SynthesisTask, attempt: int, answer: Response | RequestFailed) -> bool:
        """Records an answer, and returns whether the task is done."""
        done = True
        if isinstance(answer, RequestFailed):
            self.failures[task.name] = str(answer)
            self.rejects["request_failed"] += 1
            self._rejected[task.kind] += 1
        else:
            self.answered += 1
            if not answer.estimated:
                self._tokens.update(prompt=answer.prompt_tokens, completion=answer.completion_tokens)
            verdict = task.verdict(answer)
            done = verdict.accepted or attempt + 1 >= self._synthesis.attempts
            self.rejects.update({verdict.reason: 1} if verdict.reason else {})
            (self._accepted if verdict.accepted else self._rejected)[task.kind] += done
        if time.monotonic() - self._written > STATUS_SECONDS:
            self.write("running")
        return done

    def write(self, state: str, manifest: dict[str, Any] | None = None) -> None:
        """Writes the status. `manifest` has better counts, because duplicates are found when records are written."""
        kinds = {kind: {"asked": self._synthesis.count(kind), "accepted": self._accepted[kind],
                        "rejected": self._rejected[kind]} for kind in self._synthesis.settings.kinds}
        tokens = self._tokens
        if manifest:
            kinds, tokens = manifest["counts"], manifest["tokens"]
        now = time.time()
        about = {"state": state, "model": self._synthesis.teacher.model, "begun": date(self._start),
                 "written": date(now), "seconds": now - self._start, "kinds": kinds,
                 "rejected_answers": dict(self.rejects.most_common()), "requests": self._budget.requests,
                 "tokens": dict(tokens), "cost_usd": self._budget.cost if self._budget.price else None,
                 "lost_usd": self._budget.lost}
        write_json(self._path, about)
        self._written = time.monotonic()


NUMBER = (int, float)
STATUS_FIELDS = {"state": str, "written": str, "seconds": NUMBER, "kinds": dict, "rejected_answers": dict,
                   "requests": int, "tokens": dict, "cost_usd": (*NUMBER, type(None))}  # fmt: skip


def read_status(settings: SynthesisSettings) -> dict[str, Any] | None:
    """Reads the last status of a run, or None. Raises UserError that names the file if it is damaged."""
    path = os.path.join(settings.out, STATUS)
    if not os.path.exists(path):
        return None
    try:
        status = read_json(path)
        status.setdefault("lost_usd", 0.0)  # of an older version
        require_fields(status, STATUS_FIELDS | {"lost_usd": NUMBER}, path)
        for kind, counts in status["kinds"].items():
            require_fields(counts, dict.fromkeys(("asked", "accepted", "rejected"), int), f"{path}: {kind}")
        for group in ("rejected_answers", "tokens"):
            require_fields(status[group], dict.fromkeys(status[group], int), f"{path}: {group}")
    except UserError as error:
        what = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: not what a synthesis writes ({what}); run its command again") from None
    return status


@dataclasses.dataclass(frozen=True)
class RunCommand:
    """Asks the teacher, and writes LLaVA's JSON.

    OUT gets conversation.json, detail_description.json, complex_reasoning.json, and instruct.json: all, shuffled.

    Every answer is first written to OUT/answers.jsonl, under a hash of its request. After Ctrl-C, kill -9 or with other
    options the same command asks only for missing answers. rejected.jsonl lists rejected answers with reasons,
    flagged.jsonl accepted ones that contradict captions or boxes, and manifest.json all inputs, counts and costs.

    Exit codes: 0, every task is accepted or rejected; 1, some requests got no answer; 2, an error of the user in one
    line, or no request was answered; 3, --max-cost or --max-requests left no room; 130 after Ctrl-C and 75 after
    SIGTERM, when requests in flight are finished (a second signal does not wait). After 1, 3, 75 and 130 the files
    have the records so far, and the same command continues.
    """

    settings: Annotated[SynthesisSettings, tyro.conf.arg(name="")]
    server: Annotated[Server, tyro.conf.arg(name="")]
    max_cost: float | None = None
    """Maximum cost in USD, by --prices, of all answers in OUT, including tries without an answer. No request is sent
    that could exceed it. Only a server that ignores max_completion_tokens can exceed it, by the requests in flight."""
    max_requests: int | None = None
    """Maximum number of requests of this command."""
    prices: str = ""
    """JSON file: {"MODEL": {"prompt": USD per million tokens, "completion": ..., "cached": ..., "batch": factor}}."""
    batch: Flag = False
    """Whether to use the Batch API, which is cheaper and may need a day. The command may be stopped and run again."""

    def run(self) -> int:
        settings = self.settings
        self._check()
        check_folder(settings.out)
        price = load_price(self.prices, settings.model) if self.prices else None
        if settings.teacher == "openai":
            self.server.check_model(settings.model, settings.base_url)
        synthesis = open_synthesis(settings)
        with open_log(settings) as log:
            write_json(os.path.join(settings.out, SETTINGS), settings.as_json())
            spent = sum(price.cost(reply) for _, reply in log.items()) if price else 0.0
            lost = (read_status(settings) or {}).get("lost_usd", 0.0)
            budget = Budget(self.max_cost, self.max_requests, price, self.batch, spent, lost)
            cancel, status, fatal = CancelToken(), RunStatus(synthesis, budget), None
            status.write("running")
            try:
                ending = asyncio.run(self._ask(synthesis, log, status, budget, cancel))
            except EndpointStopped as error:
                ending, fatal = "stopped", error
            manifest = write_outputs(synthesis, log, status.failures, price, _bar(len(synthesis)))
            status.write(ending, manifest)
        print(printable(describe(manifest, settings.out)))
        if budget.lost:
            note(f"tries that brought no answer may have cost up to {budget.lost:,.2f} USD more")
        if status.failures:
            count, first = len(status.failures), next(iter(status.failures.values()))
            note(f"{count:,} tasks got no answer ({first}); the same command asks for them again")
        if fatal is not None:
            raise fatal
        check_answered(len(status.failures) + status.answered, list(status.failures.values()))
        return self._explain(ending, cancel, bool(status.failures))

    def _check(self) -> None:
        self.settings.check()
        self.server.check()
        for name in ("max_cost", "max_requests"):
            value = getattr(self, name)
            if value is not None and not value >= 0:  # nan
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 0")
        if self.max_cost is not None and not self.prices:
            raise UserError("--max-cost needs --prices FILE, by which cost is reckoned")
        if self.settings.teacher == "rules":
            for name in ("max_cost", "prices", "batch"):
                if getattr(self, name):
                    raise UserError(f"--{name.replace('_', '-')} says nothing to --teacher rules; leave it out")

    async def _ask(
        self, synthesis: Synthesis, log: AnswerLog, status: RunStatus, budget: Budget, cancel: CancelToken
    ) -> Ending:
        progress = Progress(len(synthesis), unit="tasks", note=lambda: budget.summary(status.rejects))
        options = {"budget": budget, "cancel": cancel, "progress": progress}
        with contextlib.closing(progress), cancel.handle_signals():
            announcing = asyncio.create_task(_announce_signal(cancel))
            try:
                if self.settings.teacher == "rules":
                    return await answer_all(
                        synthesis, synthesis.teacher, log, status.record, concurrency=1, **options)
                return await self._ask_server(synthesis, log, status, options)
            finally:
                announcing.cancel()

    async def _ask_server(
        self, synthesis: Synthesis, log: AnswerLog, status: RunStatus, options: dict[str, Any]
    ) -> Ending:
        async with self.server.open(self.settings.model, self.settings.base_url, options["cancel"]) as endpoint:
            try:
                if not self.batch:
                    return await answer_all(
                        synthesis, endpoint, log, status.record, concurrency=self.server.concurrency, **options)
                from llava_jax.endpoint.batch import answer_all_in_batches

                folder = os.path.join(self.settings.out, BATCHES)
                os.makedirs(folder, exist_ok=True)
                return await answer_all_in_batches(synthesis, endpoint, log, status.record, folder, **options)
            finally:
                for line in endpoint.notes:
                    note(line)

    def _explain(self, ending: Ending, cancel: CancelToken, failed: bool) -> int:
        """Returns the exit code, and prints why it is not 0."""
        if ending == "done":
            return UNANSWERED if failed else 0
        why = {"max_cost": f"--max-cost {self.max_cost} leaves no room for another request",
               "max_requests": f"--max-requests {self.max_requests} are used up", "interrupted": "stopped"}[ending]
        print(f"{why}; the same command goes on", file=sys.stderr)
        if ending != "interrupted":
            return OVER_BUDGET
        return code_of(cancel)


def describe(manifest: dict[str, Any], folder: str) -> str:
    """Returns the results of a run as text."""
    lines = [f"{'':20}{'tasks':>10}{'accepted':>10}{'rejected':>10}{'unanswered':>12}  rejected for"]
    for kind, count in manifest["counts"].items():
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in count["rejects"].items())
        lines.append(f"{kind:20}{count['asked']:>10,}{count['accepted']:>10,}{count['rejected']:>10,}"
                     f"{count['unanswered']:>12,}  {reasons}".rstrip())
    flagged, tokens = manifest["flagged"], manifest["tokens"]
    if flagged["records"]:
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in flagged["by_kind"].items())
        lines.append(f"{flagged['records']:,} accepted records contradict captions or boxes ({kinds})")
    if tokens.get("prompt"):
        cost = "" if manifest["cost_usd"] is None else f"; {manifest['cost_usd']:,.2f} USD"
        lines.append(f"{manifest['answers']:,} answers: {tokens['prompt']:,} prompt tokens, of them "
                     f"{tokens['cached']:,} cached; {tokens['completion']:,} completion tokens{cost}")
    if manifest["estimated_answers"] and manifest["cost_usd"] is not None:
        lines.append(f"the server did not count the tokens of {manifest['estimated_answers']:,} answers; their cost is "
                     "reckoned with a token for every byte")
    return "\n".join([*lines, f"{folder}: {', '.join(manifest['outputs'])}"])


async def _announce_signal(cancel: CancelToken) -> None:
    """Prints a line after the first signal, because requests in flight may take minutes."""
    try:
        await cancel.sleep(365 * 86400)
    except NotSentError:
        if cancel.signal is not None:
            print("finishing what is in flight; once more to leave at once", file=sys.stderr)


def _bar(total: int) -> Callable[[Iterator[SynthesisTask]], Iterator[SynthesisTask]]:
    return lambda tasks: tqdm(tasks, total=total, desc="writing", unit=" tasks", disable=not sys.stderr.isatty())
