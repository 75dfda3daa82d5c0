"""OpenAI's Batch API: requests as files, answered within a day at a lower price, and never submitted twice.

FOLDER/batches.json records every step before its loss would cost anything, so the process may be killed between any
two steps:

  part file written -> recorded -> uploaded -> file id recorded -> batch created -> batch id recorded
  -> answers in the log -> recorded as collected -> part file deleted

An upload and a batch can exist without a record. A second upload costs nothing. A batch is created only if the
server's list has none of the same file.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import LIMITS, Endpoint, check_length
from llava_jax.endpoint.errors import EndpointStopped, NotSentError, RequestFailed
from llava_jax.endpoint.limits import backoff
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Response, parse_response
from llava_jax.endpoint.run import Ending, J, RecordAnswer
from llava_jax.errors import UserError
from llava_jax.files import atomic_write, read_json, require_fields
from llava_jax.progress import Progress

STATE = "batches.json"
REQUESTS_PER_PART, BYTES_PER_PART = 50_000, 100_000_000
"""Limits of a file that all servers with this API accept."""
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 10.0, 300.0
"""Seconds between requests for a batch's status."""
MAX_EMPTY_ROUNDS = 3
"""Number of rounds without an answer before the run ends."""
ENDED = ("completed", "expired", "cancelled", "failed")
CREATE_TRIES = 5
PART = re.compile(r"batch-[0-9a-f]{16}\.jsonl")
LEFTOVER = re.compile(
    r"batch-[0-9a-f]{16}\.jsonl|\.(batch-[0-9a-f]{16}\.jsonl|batches\.json)(\.[0-9a-f]{6})?\.[0-9a-f]+\.tmp")

T = TypeVar("T")


async def answer_all_in_batches(
    jobs: Sequence[J],
    endpoint: Endpoint,
    log: AnswerLog,
    record: RecordAnswer,
    folder: str,
    *,
    budget: Budget | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
    requests_per_part: int = REQUESTS_PER_PART,
    bytes_per_part: int = BYTES_PER_PART,
) -> Ending:
    """Asks for every answer that is not in the log by the Batch API; otherwise as `answer_all`.

    Requests without an answer (the batch expired, the server failed), and requests of another attempt, go into the next
    batch. Batches of an earlier run are collected first. If `cancel` is requested, the waiting ends but the batches go
    on, and the next call collects them. `jobs` is read once a round, by index. The log's lock protects the folder.

    Raises EndpointStopped if there is no Batch API, if a batch fails or was cancelled (its answers are kept, and the
    same call submits the rest), or if MAX_EMPTY_ROUNDS bring no answer.
    """
    budget, cancel = budget or Budget(batch=True), cancel or CancelToken()
    batches = _Batches(endpoint, log, folder, budget, cancel, progress)
    attempts = dict.fromkeys(range(len(jobs)), 0)  # of jobs that are not settled
    empty_rounds, num_answers = 0, len(log)
    try:
        while True:
            await batches.finish()
            empty_rounds = 0 if len(log) > num_answers or batches.learned else empty_rounds + 1
            if empty_rounds > MAX_EMPTY_ROUNDS:
                raise EndpointStopped(f"{MAX_EMPTY_ROUNDS} rounds of batches brought no answer; see {batches.path}")
            num_answers, batches.learned = len(log), False
            wanted = _unanswered(jobs, attempts, endpoint, log, record, batches, progress)
            limit = batches.write(wanted, requests_per_part, bytes_per_part)
            if not batches.open:
                return limit or "done"
    except NotSentError:
        return "interrupted"


def _unanswered(
    jobs: Sequence[J],
    attempts: dict[int, int],
    endpoint: Endpoint,
    log: AnswerLog,
    record: RecordAnswer,
    batches: "_Batches",
    progress: Progress | None,
) -> Iterator[tuple[str, ChatRequest]]:
    """Records answers, removes finished jobs from `attempts`, and yields the requests that must be asked."""
    keys = set()
    for index in list(attempts):
        job = jobs[index]
        while True:
            request = job.request(attempts[index])
            key = request.key(endpoint.model)
            answer = log[key] if key in log else batches.failures.get(key)
            if answer is None:
                if key not in keys:
                    keys.add(key)
                    yield key, request
                break
            if isinstance(answer, Response):
                batches.budget.learn(request, answer)
            if record(job, attempts[index], answer):
                del attempts[index]
                if progress is not None:
                    progress.update(fresh=False)
                break
            attempts[index] += 1


@dataclasses.dataclass
class _Part:
    """A file of requests and its batch.

    Attributes:
      fields: Names of the fields in the requests' bodies.
      since: Server's time of the upload.
      alone: Whether no other batch was running when this one was created.
    """

    name: str
    requests: int
    worst: float
    fields: list[str]
    file: str | None = None
    since: int = 0
    batch: str | None = None
    status: str = "written"
    done: int = 0
    alone: bool = False
    collected: bool = False

    @classmethod
    def from_json(cls, fields: Any) -> "_Part":
        """Reads a recorded part. Raises UserError or TypeError if fields are missing, unknown or of another type."""
        text, number, maybe = str, (int, float), (str, type(None))
        require_fields(fields, {
            "name": text, "requests": int, "worst": number, "fields": list, "file": maybe, "batch": maybe,
            **{name: kind for name, kind in (("since", number), ("status", text), ("done", int), ("alone", bool),
                                             ("collected", bool)) if name in fields}}, "a part")
        if not PART.fullmatch(fields["name"]) or not all(isinstance(name, str) for name in fields["fields"]):
            raise UserError(f"the part {fields['name']!r:.60} is none of a synthesis")
        return cls(**fields)


class _Batches:
    def __init__(
        self, endpoint: Endpoint, log: AnswerLog, folder: str, budget: Budget, cancel: CancelToken,
        progress: Progress | None,
    ):
        self.path, self.failures, self.budget = os.path.join(folder, STATE), dict[str, RequestFailed](), budget
        self.learned = False  # whether a batch showed refusals
        self._endpoint, self._client, self._log = endpoint, endpoint.client, log
        self._folder, self._stop, self._progress = folder, cancel, progress
        self._shown_states, self._fatal = list[str](), list[EndpointStopped]()
        self._parts = self._load()
        for part in self.open:  # a part that was neither submitted nor kept is written again
            part.collected = part.file is None and not os.path.exists(os.path.join(folder, part.name))
        budget.reserved += sum(part.worst for part in self.open)
        for name in os.listdir(folder):  # files that a killed process had not recorded or not deleted
            if LEFTOVER.fullmatch(name) and name not in [part.name for part in self.open]:
                os.unlink(os.path.join(folder, name))

    @property
    def open(self) -> list[_Part]:
        return [part for part in self._parts if not part.collected]

    def write(
        self, wanted: Iterable[tuple[str, ChatRequest]], requests_per_part: int, bytes_per_part: int
    ) -> Ending | None:
        """Writes parts of the wanted requests, within the budget. Returns the limit that was reached, or None."""
        limit = None

        def lines() -> Iterator[tuple[bytes, float, list[str]]]:
            nonlocal limit
            for key, request in wanted:  # to the end even without room, because this records the answered jobs
                worst = self.budget.worst_cost(request)
                limit = limit or self.budget.reserve(worst)
                if limit is None:
                    body = self._endpoint.body(request)
                    line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
                    text = json.dumps(line, ensure_ascii=False)
                    yield text.encode(errors="backslashreplace") + b"\n", worst, list(body)

        rest = lines()
        line = next(rest, None)
        while line is not None:
            part = _Part(f"batch-{secrets.token_hex(8)}.jsonl", 0, 0.0, line[2])
            with atomic_write(os.path.join(self._folder, part.name)) as file:
                size = 0
                while line is not None and (
                    not part.requests or part.requests < requests_per_part and size + len(line[0]) <= bytes_per_part
                ):
                    file.write(line[0])
                    size, part.requests, part.worst = size + len(line[0]), part.requests + 1, part.worst + line[1]
                    line = next(rest, None)
            self._parts.append(part)
            self._save()
        return limit

    async def finish(self) -> None:
        """Submits parts, waits for their batches, and writes the answers to the log."""
        wait = MIN_POLL_SECONDS
        while self.open:
            for part in self.open:
                if part.batch is None and (part.status != "waiting" or wait == MIN_POLL_SECONDS):
                    await self._submit(part)
            await self._stop.sleep(wait)
            ended = [await self._poll(part) for part in self._running()]
            wait = MIN_POLL_SECONDS if any(ended) else min(MAX_POLL_SECONDS, wait * 1.5)
            if self._fatal:
                raise self._fatal[0]
            self._print_states()

    def _running(self) -> list[_Part]:
        return [part for part in self.open if part.batch is not None]

    async def _submit(self, part: _Part) -> None:
        path, part.alone = os.path.join(self._folder, part.name), not self._running()
        if part.file is None:

            async def upload() -> Any:
                with open(path, "rb") as file:
                    return _checked(await self._client.files.create(file=(part.name, file), purpose="batch"))

            uploaded = await self._call(upload, f"uploading {path}")
            part.file, part.since = uploaded.id, uploaded.created_at
            self._save()
        for tries in range(1, CREATE_TRIES + 1):
            batch = await self._call(lambda: self._find(part), "listing batches")
            if batch is not None:
                break
            try:  # once: an error leaves open whether there is a batch now
                batch = await self._call(lambda: self._create(part), "creating a batch", retries=0)
                break
            except RequestFailed as error:
                if tries == CREATE_TRIES:
                    raise EndpointStopped(f"creating a batch of {path}: {error.detail}; run again later") from None
                await self._stop.sleep(backoff(tries, random.random()))
        part.batch, part.status = batch.id, batch.status
        self._save()

    async def _find(self, part: _Part) -> Any:
        """Returns the server's batch of a part's file, unless it failed, or None."""
        async for batch in self._client.batches.list(limit=100):  # the newest first
            _checked(batch, status=str)
            if batch.created_at < part.since:
                return None
            if batch.input_file_id == part.file and batch.status != "failed":
                return batch
        return None

    async def _create(self, part: _Part) -> Any:
        batch = await self._client.batches.create(
            input_file_id=part.file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return _checked(batch, status=str)

    async def _poll(self, part: _Part) -> bool:
        """Returns whether a batch has ended. Its answers are in the log then."""

        async def retrieve() -> Any:
            return _checked(await self._client.batches.retrieve(part.batch), status=str)

        batch = await self._call(retrieve, f"batch {part.batch}")
        done = getattr(batch.request_counts, "completed", 0)
        part.status, part.done = batch.status, done if isinstance(done, int) else 0
        if batch.status not in ENDED:
            return False
        errors = getattr(batch.errors, "data", None)
        errors = [error for error in errors if hasattr(error, "message")] if isinstance(errors, list) else []
        if batch.status == "failed" and any(error.code == "token_limit_exceeded" for error in errors):
            if not part.alone:  # there is room when another has ended
                part.batch, part.status = None, "waiting"
                self._save()
                return not self._running()
        for file in (batch.output_file_id, batch.error_file_id):
            if isinstance(file, str) and file:
                await self._call(lambda file=file: self._collect(part, file), f"reading the answers of {part.batch}")
        if batch.status == "failed":
            words = "; ".join(f"{error.message} ({error.code})" for error in errors[:3]) or "no reason given"
            self._fatal.append(EndpointStopped(f"batch {batch.id} failed: {words}"))
        elif batch.status == "cancelled":
            self._fatal.append(EndpointStopped(f"batch {batch.id} was cancelled; the same command asks for its rest"))
        part.collected = True
        self.budget.reserved -= part.worst
        self._save()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._folder, part.name))
        return True

    async def _collect(self, part: _Part, file: str) -> None:
        """Writes the answers of an output or error file to the log, in any order."""
        starts = self._starts(part)
        async with self._client.files.with_streaming_response.content(file) as response:
            async for line in _lines(response.iter_bytes(1 << 16)):
                try:
                    row = json.loads(self._endpoint.secret.hide_body(line))
                    key, response_of = row["custom_id"], row.get("response") or {}
                    if key in self._log or starts and key not in starts:
                        continue
                    if response_of.get("status_code") == 200:
                        self._keep(key, self._request(part, starts.get(key)), response_of["body"])
                    elif response_of:
                        self._refused(part, key, response_of["status_code"], response_of.get("body"))
                except EndpointStopped as stopped:  # not before this batch is recorded as collected
                    self._fatal.append(stopped)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # its request is asked again

    def _keep(self, key: str, request: ChatRequest | None, body: Any) -> None:
        """Writes an answer to the log and counts its cost. An invalid answer is counted as lost."""
        try:
            response = parse_response(body, batch=True, prompt=request)
        except UserError:
            if request is not None:
                self.budget.add_lost(request, len(json.dumps(body)))
            raise
        self._log.append(key, response)
        self.budget.add(response)

    def _starts(self, part: _Part) -> dict[str, int]:
        """Returns the offsets of a part's requests in its file, by key; {} if the file is missing."""
        starts, at = {}, 0
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self._folder, part.name), "rb") as file:
            for line in file:
                starts[json.loads(line)["custom_id"]] = at
                at += len(line)
        return starts

    def _request(self, part: _Part, start: int | None) -> ChatRequest | None:
        if start is None:
            return None
        with open(os.path.join(self._folder, part.name), "rb") as file:
            file.seek(start)
            body = json.loads(file.readline())["body"]
        return ChatRequest(tuple(body["messages"]), {name: body[name] for name in LIMITS if name in body})

    def _refused(self, part: _Part, key: str, status: int, body: Any) -> None:
        error = body.get("error", body) if isinstance(body, dict) else body
        if status >= 500 or status in (408, 409, 429):
            return
        self.learned = True
        if not self._endpoint.adapt(part.fields, status, error):
            self.failures[key] = self._endpoint.failure(status, error)

    async def _call(self, send: Callable[[], Awaitable[T]], what: str, retries: int | None = None) -> T:
        import openai

        try:
            return await self._endpoint.call(send, retries=retries)
        except openai.APIStatusError as error:
            no_api = error.status_code in (404, 405, 501) and not what.startswith(("batch ", "reading"))
            hint = "has it a Batch API?" if no_api else f"if it is gone for good, delete {self.path}"
            raise EndpointStopped(f"{what}: {error.status_code}: {error.message:.300} ({hint})") from None
        except RequestFailed as error:
            if retries == 0:
                raise
            raise EndpointStopped(f"{what}: {error.detail}; the same command goes on") from None

    def _print_states(self) -> None:
        states = [f"{part.batch}: {part.status}, {part.done} of {part.requests}" for part in self._running()]
        if self._progress is not None and states and states != self._shown_states:
            self._progress.print(f"{time.strftime('%H:%M')} " + "; ".join(states))
            self._shown_states = states

    def _load(self) -> list[_Part]:
        if not os.path.exists(self.path):
            return []
        try:
            state = read_json(self.path)
            require_fields(state, {"parts": list}, self.path)
            return [_Part.from_json(part) for part in state["parts"]]
        except (UserError, TypeError) as error:
            what = "it tells which batches are on their way"
            raise UserError(f"{self.path}: cannot be read ({error}); {what}") from None

    def _save(self) -> None:
        with atomic_write(self.path) as file:
            file.write(json.dumps({"parts": [dataclasses.asdict(part) for part in self._parts]}, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())


def _checked(described: T, **kinds: type) -> T:
    """Returns a server's description of a file or batch. Raises ValueError if a necessary field is missing."""
    for name, kind in {"id": str, "created_at": int, **kinds}.items():
        if not isinstance(value := getattr(described, name, None), kind):
            raise ValueError(f"the server says {value!r:.40} as {name} of a file or batch")
    return described


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields lines that end in a newline. `splitlines` would also split at other characters, which JSON may contain."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        check_length(rest)
        for line in lines:
            yield line
    yield rest
