"""Output files of a run: LLaVA's JSON by kind and merged, rejected and flagged answers, and a manifest."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import Response
from llava_jax.errors import UserError
from llava_jax.files import atomic_write, sha256_of, write_json
from llava_jax.synthesize.parse import Reject, Seen
from llava_jax.synthesize.prompts import KINDS
from llava_jax.synthesize.synthesis import LOG, SETTINGS, Outcome, Synthesis, SynthesisTask, Verdict

FILES = {kind: f"{kind}.json" for kind in KINDS}
MERGED, REJECTED, FLAGGED, MANIFEST = "instruct.json", "rejected.jsonl", "flagged.jsonl", "manifest.json"


def check_folder(folder: str) -> None:
    """Raises UserError, one line, if output files would replace files in `folder` that no run has made."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"--out {folder}: is a file; name a folder")
    if os.path.exists(os.path.join(folder, SETTINGS)) or os.path.exists(os.path.join(folder, LOG)):
        return
    for name in (*FILES.values(), MERGED, REJECTED, FLAGGED, MANIFEST):
        if os.path.lexists(os.path.join(folder, name)):
            raise UserError(f"--out {folder}: it has a file {name} that synthesize has not made; take another")


def write_outputs(
    synthesis: Synthesis,
    log: AnswerLog,
    failures: Mapping[tuple[str, str], str],
    price: Price | None = None,
    progress: Callable[[Iterator[SynthesisTask]], Iterator[SynthesisTask]] = iter,
) -> dict[str, Any]:
    """Writes all files from the log, in the order of the tasks, and returns the manifest.

    A finished task is written once to the file of its kind and to the merged file, or once to rejected.jsonl.
    `failures` maps `SynthesisTask.name` to the reason why a task got no answer. A task with the turns of an earlier
    task is rejected as a duplicate. Every file appears when it is complete. Memory keeps some 200 bytes per record.
    """
    folder, tally = synthesis.settings.out, _Tally(price)
    _sweep(folder)
    with contextlib.ExitStack() as files:
        def output(name: str) -> BinaryIO:
            return files.enter_context(atomic_write(os.path.join(folder, name)))

        lists = {kind: JsonList(output(FILES[kind])) for kind in synthesis.settings.kinds}
        rejected, flagged = output(REJECTED), output(FLAGGED)
        seen = Seen()
        for task in progress(iter(synthesis)):
            outcome = task.outcome(log)
            tally.add_answers(outcome)
            verdict = _final(task, outcome, failures.get(task.name), seen)
            if verdict is None:
                tally.unanswered[task.kind] += 1
            elif verdict.accepted:
                lists[task.kind].write(task.to_record(verdict.turns))
                if verdict.evidence is not None and verdict.evidence.findings:
                    flagged.write(_to_line(_flag(task, verdict)))
                    tally.flag(verdict)
            else:
                rejected.write(_to_line(_rejection(task, outcome, verdict)))
                tally.rejects[task.kind][verdict.reason] += 1
        for written in lists.values():
            written.close()
        _merge(list(lists.values()), JsonList(output(MERGED)), synthesis.settings.seed)
        records = {kind: len(written) for kind, written in lists.items()}
    for kind in set(KINDS) - set(lists):  # of an earlier run that had this kind too; the log still has it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, FILES[kind]))
    manifest = _manifest(synthesis, records, tally)
    write_json(os.path.join(folder, MANIFEST), manifest)
    return manifest


def date(seconds: float) -> str:
    """Formats a time, in seconds since 1970, as a date in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _to_line(row: dict[str, Any]) -> bytes:
    """Returns a line of JSON. Half of a surrogate pair, from a server or a file name, is escaped."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _sweep(folder: str) -> None:
    """Removes temporary files of killed processes."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.jsonl?(\.[0-9a-f]{6})?\.[0-9a-f]+\.tmp", name):
            os.unlink(os.path.join(folder, name))


def _final(task: SynthesisTask, outcome: Outcome, failure: str | None, seen: Seen) -> Verdict | None:
    """Returns the final verdict of a task, or None if it must still be asked."""
    if not outcome.done:
        return None if failure is None else Verdict((), "request_failed", failure, None)
    if outcome.verdict.accepted:
        try:
            seen.add(task.kind, outcome.verdict.turns)
        except Reject as reject:
            return outcome.verdict._replace(reason=reject.reason, detail=reject.detail)
    return outcome.verdict


def _rejection(task: SynthesisTask, outcome: Outcome, verdict: Verdict) -> dict[str, Any]:
    answer = outcome.answers[-1][1].text if outcome.answers else None
    return {"id": task.context.id, "image": task.context.image, "kind": task.kind, "reason": verdict.reason,
            "detail": verdict.detail, "attempts": len(outcome.answers), "answer": answer}


def _flag(task: SynthesisTask, verdict: Verdict) -> dict[str, Any]:
    findings = [finding._asdict() for finding in verdict.evidence.findings]
    return {"id": task.context.id, "image": task.context.image, "kind": task.kind, "score": verdict.evidence.score,
            "findings": findings}


class _Tally:
    """Counts for the manifest. An answer that several tasks share counts once, because it is paid for once."""

    def __init__(self, price: Price | None):
        self.rejects = {kind: Counter() for kind in KINDS}
        self.unanswered: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.flagged = self.estimated = 0
        self.tokens: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()
        self.dates: list[int] = []
        self.answers, self.cost, self._price = 0, None if price is None else 0.0, price
        self._counted: set[int] = set()

    def add_answers(self, outcome: Outcome) -> None:
        for key, response in outcome.answers:
            short = int(key[:15], 16)
            if short not in self._counted:
                self._counted.add(short)
                self._add(response)

    def _add(self, response: Response) -> None:
        self.answers += 1
        self.estimated += response.estimated
        counted = 0 if response.estimated else 1  # only the server's own counts
        self.tokens.update(prompt=counted * response.prompt_tokens, cached=counted * response.cached_tokens,
                           completion=counted * response.completion_tokens)
        self.models[response.model] += 1
        self.fingerprints.update([response.fingerprint] if response.fingerprint else [])
        self.dates = [min([*self.dates[:1], response.created]), max([*self.dates[1:], response.created])]
        if self._price is not None:
            self.cost += self._price.cost(response)

    def flag(self, verdict: Verdict) -> None:
        self.flagged += 1
        self.flags.update({finding.kind for finding in verdict.evidence.findings})


class JsonList:
    """Writes a JSON list row by row, and keeps the offsets of its rows."""

    def __init__(self, file: BinaryIO):
        self.file, self.offsets = file, array("q")
        self._at = self._put(b"[\n")

    def __len__(self) -> int:
        return len(self.offsets) // 2

    def write(self, row: dict[str, Any] | bytes) -> None:
        content = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
        start = self._at + self._put(b",\n" if self.offsets else b"")
        self._at = start + self._put(content)
        self.offsets.extend((start, self._at))

    def close(self) -> None:
        self._put(b"\n]\n")
        self.file.flush()

    def _put(self, content: bytes) -> int:
        self.file.write(content)
        return len(content)


def _merge(lists: list[JsonList], merged: JsonList, seed: int) -> None:
    """Writes the rows of all lists in shuffled order, reading them from the files again."""
    order = [(which, row) for which, written in enumerate(lists) for row in range(len(written))]
    random.Random(f"{seed} merged").shuffle(order)
    with contextlib.ExitStack() as files:
        sources = [files.enter_context(open(written.file.name, "rb")) for written in lists]
        for which, row in order:
            start, stop = lists[which].offsets[2 * row : 2 * row + 2]
            sources[which].seek(start)
            merged.write(sources[which].read(stop - start))
    merged.close()


def _manifest(synthesis: Synthesis, records: Mapping[str, int], tally: _Tally) -> dict[str, Any]:
    settings, folder = synthesis.settings, synthesis.settings.out
    counts = {
        kind: {"asked": synthesis.count(kind), "accepted": accepted, "rejected": tally.rejects[kind].total(),
               "unanswered": tally.unanswered[kind], "rejects": dict(tally.rejects[kind].most_common())}
        for kind, accepted in records.items()
    }
    names = [*(FILES[kind] for kind in records), MERGED, REJECTED, FLAGGED]
    return {
        "complete": not tally.unanswered.total(),
        "written": date(time.time()),
        "llava_jax": importlib.metadata.version("llava_jax"),
        "teacher": {
            "kind": settings.teacher,
            "model": synthesis.teacher.model,
            "answered_by": dict(tally.models.most_common()),
            "fingerprints": dict(tally.fingerprints.most_common()),
            "first_answer": date(tally.dates[0]) if tally.dates else None,
            "last_answer": date(tally.dates[1]) if tally.dates else None,
        },
        "prompts_sha256": synthesis.teacher.prompts_hash,
        "settings": settings.as_json(),
        "inputs": [_describe(path) for path in synthesis.contexts.files],
        "notes": dict(synthesis.contexts.notes),
        "counts": counts,
        "flagged": {"records": tally.flagged, "by_kind": dict(tally.flags.most_common())},
        "answers": tally.answers,
        "tokens": dict(tally.tokens),
        "estimated_answers": tally.estimated,
        "cost_usd": tally.cost,
        "outputs": {name: _describe(os.path.join(folder, name)) for name in names},
    }


def _describe(path: str) -> dict[str, Any]:
    if "://" in path:
        return {"path": path}
    return {"path": os.path.abspath(path), "bytes": os.path.getsize(path), "sha256": sha256_of(path)}
