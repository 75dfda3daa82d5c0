"""OpenAI's Batch API: many requests as files, answered within a day, at a lower price, and none submitted twice.

What was submitted stands in FOLDER/batches.json from before the first moment at which losing it would cost anything, so
that the process may be killed between any two steps:

  part file written -> recorded -> uploaded -> file id recorded -> batch created -> batch id recorded
  -> answers in the log -> recorded as collected -> part file deleted

Two of them can be done without being recorded. A second upload costs nothing. A batch is created only after looking
through the server's list for one of the same file.
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
REQUESTS_PER_PART, BYTES_PER_PART = 50_000, 100_000_000  # what all servers with this API take
FIRST_POLL, LONGEST_POLL = 10.0, 300.0  # seconds between looks at a batch
EMPTY_ROUNDS = 3  # after which a server that answers nothing is given up
ENDED = ("completed", "expired", "cancelled", "failed")
CREATE_TRIES = 5
PART = re.compile(r"batch-[0-9a-f]{16}\.jsonl")
LEFT = re.compile(
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
    """As `answer_all`, by the Batch API: what the log does not hold is submitted, waited for, logged, and settled.

    What a batch does not answer (it expires; the server failed) and what `record` wants asked once more goes into the
    next. Batches that an earlier run submitted are collected first. When `cancel` is asked, the waiting ends and the
    batches go on: the next call collects them. `jobs` is read once a round, by index. The log's lock is the folder's.

    Raises EndpointStopped if there is no Batch API, a batch fails as a whole or was cancelled (its
    answers are kept; the same call submits the rest), or EMPTY_ROUNDS bring no answer; OSError for a full disk.
    """
    budget, cancel = budget or Budget(batch=True), cancel or CancelToken()
    batches = _Batches(endpoint, log, folder, budget, cancel, progress)
    attempts = dict.fromkeys(range(len(jobs)), 0)  # of jobs that are not settled
    empty, known = 0, len(log)
    try:
        while True:
            await batches.finish()
            empty = 0 if len(log) > known or batches.learned else empty + 1
            if empty > EMPTY_ROUNDS:
                raise EndpointStopped(f"{EMPTY_ROUNDS} rounds of batches brought no answer; see {batches.path}")
            known, batches.learned = len(log), False
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
    """Settles what is answered, takes it out of `attempts`, and yields the requests that have to be asked."""
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
    """A file of requests on its way.

    `fields` are names in the requests' bodies, `since` the server's time of its upload; `alone` tells that nothing else
    was running when its batch was created.
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
        """Raises UserError or TypeError for fields that are missing, unknown or of another type."""
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
        self.learned = False  # whether batches brought other news than answers
        self._endpoint, self._client, self._log = endpoint, endpoint.client, log
        self._folder, self._stop, self._progress = folder, cancel, progress
        self._said, self._fatal = list[str](), list[EndpointStopped]()
        self._parts = self._load()
        for part in self.open:  # what was neither submitted nor kept is written anew
            part.collected = part.file is None and not os.path.exists(os.path.join(folder, part.name))
        budget.reserved += sum(part.worst for part in self.open)
        for name in os.listdir(folder):  # what a killed process had not recorded, or not yet deleted
            if LEFT.fullmatch(name) and name not in [part.name for part in self.open]:
                os.unlink(os.path.join(folder, name))

    @property
    def open(self) -> list[_Part]:
        return [part for part in self._parts if not part.collected]

    def write(
        self, wanted: Iterable[tuple[str, ChatRequest]], requests_per_part: int, bytes_per_part: int
    ) -> Ending | None:
        """Makes parts of what is wanted, as far as the budget goes; returns which limit ended it, if one did."""
        limit = None

        def lines() -> Iterator[tuple[bytes, float, list[str]]]:
            nonlocal limit
            for key, request in wanted:  # to its end, also without room: the rest is settled on the way
                worst = self.budget.worst(request)
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
        """Submits what is not, waits for all, and puts their answers into the log."""
        wait = FIRST_POLL
        while self.open:
            for part in self.open:
                if part.batch is None and (part.status != "waiting" or wait == FIRST_POLL):
                    await self._submit(part)
            await self._stop.sleep(wait)
            ended = [await self._look(part) for part in self._running()]
            wait = FIRST_POLL if any(ended) else min(LONGEST_POLL, wait * 1.5)
            if self._fatal:
                raise self._fatal[0]
            self._tell()

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
        """The server's batch of a part's file, unless it failed (then nothing of it was run), or None."""
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

    async def _look(self, part: _Part) -> bool:
        """Whether a batch has ended; its answers are in the log then."""

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
        """Puts the answers of an output or error file into the log, in whatever order they come."""
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
        """Puts an answer into the log, and counts it, or what came in its place."""
        try:
            reply = parse_response(body, batch=True, prompt=request)
        except UserError:
            if request is not None:
                self.budget.lose(request, len(json.dumps(body)))
            raise
        self._log.append(key, reply)
        self.budget.add(reply)

    def _starts(self, part: _Part) -> dict[str, int]:
        """Where the requests of a part stand in its file, by their keys; {} if it is not there any more."""
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

    def _tell(self) -> None:
        states = [f"{part.batch}: {part.status}, {part.done} of {part.requests}" for part in self._running()]
        if self._progress is not None and states and states != self._said:
            self._progress.print(f"{time.strftime('%H:%M')} " + "; ".join(states))
            self._said = states

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
    """What a server says of a file or a batch. Raises ValueError if it lacks what is needed of it."""
    for name, kind in {"id": str, "created_at": int, **kinds}.items():
        if not isinstance(value := getattr(described, name, None), kind):
            raise ValueError(f"the server says {value!r:.40} as {name} of a file or batch")
    return described


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines that end in a newline alone: JSON may hold the other characters that `splitlines` ends one at."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        check_length(rest)
        for line in lines:
            yield line
    yield rest
