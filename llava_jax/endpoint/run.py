"""Many requests at once, in bounded memory, within a budget, and none of them twice."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol, TypeVar

from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.errors import BudgetExceededError, EndpointStopped, NotSentError, RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.progress import Progress

FAILURES_IN_A_ROW = 20  # requests that fail one after another end the run: the rest would too

Ending = Literal["done", "interrupted", "max_cost", "max_requests"]


class AnswerJob(Protocol):
    def request(self, attempt: int) -> ChatRequest: ...


class Teacher(Protocol):
    model: str

    async def ask(self, request: ChatRequest, lost: "Lost") -> Response: ...


J = TypeVar("J", bound=AnswerJob)
Lost = Callable[[int], bool]
"""Told of a try that was sent and brought no answer, but so many bytes; says whether there may be another."""
RecordAnswer = Callable[[J, int, Response | RequestFailed], bool]


async def answer_all(
    jobs: Iterable[J],
    teacher: Teacher,
    log: AnswerLog,
    record: RecordAnswer,
    *,
    concurrency: int = 50,
    budget: Budget | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Ending:
    """Asks the teacher for every job what the log does not hold yet, `concurrency` requests at a time.

    A reply is in the log before anything else is done with it. Then `record(job, attempt, reply or failure)` says
    whether the job is done; if not, its request of attempt + 1 comes next. Two jobs of equal requests ask once. `jobs`
    is read as it is needed. Returns

      "done"          when `record` has said so for every job,
      "interrupted"   when `cancel` was asked to: what was in flight is finished and settled,
      "max_cost", "max_requests"  when the budget had no room for the next request, likewise.

    Jobs that were not reached are not settled; the log has all answers. Raises EndpointStopped when no
    request would be answered any more, after what is in flight, also when FAILURES_IN_A_ROW have failed; OSError when
    the log cannot be written.
    """
    run = _Run(iter(jobs), teacher, log, record, budget or Budget(), cancel or CancelToken(), progress)
    workers = [asyncio.create_task(run.work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    if run.fatal is not None:
        raise run.fatal
    return run.ending


@dataclasses.dataclass
class _Run:
    jobs: Iterator[AnswerJob]
    teacher: Teacher
    log: AnswerLog
    record: RecordAnswer
    budget: Budget
    cancel: CancelToken
    progress: Progress | None
    ending: Ending = "done"
    fatal: Exception | None = None

    def __post_init__(self) -> None:
        self.flying: dict[str, asyncio.Event] = {}  # keys of requests in flight; set when they have landed
        self.landed = asyncio.Event()  # set whenever one has
        self.sent = self.failures = 0  # requests out there; and those in a row that failed

    @property
    def over(self) -> bool:
        if self.cancel.requested and self.ending == "done":
            self.ending = "interrupted"
        return self.ending != "done" or self.fatal is not None

    async def work(self) -> None:
        while not self.over and (job := next(self.jobs, None)) is not None:
            await asyncio.sleep(0)  # a log full of answers must not keep signals from being heard
            await self.work_on(job)

    async def work_on(self, job: AnswerJob) -> None:
        attempt, fresh = 0, False
        while True:
            request = job.request(attempt)
            key = request.key(self.teacher.model)
            while key in self.flying:
                await self.flying[key].wait()
            if key in self.log:
                answer = self.log[key]
            else:
                answer, fresh = await self.obtain(key, request), True
            if answer is None:
                return
            if isinstance(answer, Response):
                self.budget.learn(request, answer)
            if self.record(job, attempt, answer):
                break
            attempt += 1
        if self.progress is not None:
            self.progress.update(fresh)

    async def obtain(self, key: str, request: ChatRequest) -> Response | RequestFailed | None:
        """A reply that is in the log now, or the failure, or None if the run is over."""
        landed = self.flying[key] = asyncio.Event()
        try:
            worst = self.budget.worst(request)
            while not self.over and (limit := self.limit(worst)) is not None:
                await self.wait_for_room(limit)
                worst = self.budget.worst(request)
            return None if self.over else await self.send(key, request, worst)
        finally:
            del self.flying[key]
            landed.set()
            self.landed.set()

    def limit(self, worst: float) -> Literal["max_cost", "max_requests"] | None:
        """Takes room in the budget, or says what leaves none. The first answer, which tells what others may cost, comes
        before a second request is sent."""
        if self.budget.max_cost is not None and not self.budget.seen and self.sent:
            return "max_cost"
        return self.budget.reserve(worst)

    async def wait_for_room(self, limit: Literal["max_cost", "max_requests"]) -> None:
        """Until a request in flight has ended, which may cost less than its worst; without one, the run is over."""
        if limit == "max_cost" and self.sent:
            self.landed.clear()
            await self.landed.wait()
        elif self.ending == "done":
            self.ending = limit

    async def send(self, key: str, request: ChatRequest, worst: float) -> Response | RequestFailed | None:
        self.sent += 1
        try:
            reply = await self.teacher.ask(request, lambda came: self.budget.lose(request, came))
            self.log.append(key, reply)
            self.budget.add(reply)
            self.budget.learn(request, reply)  # before another is sent
            self.failures = 0
            return reply
        except RequestFailed as failure:
            self.failures += 1
            if self.failures < FAILURES_IN_A_ROW:
                return failure
            self.give_up(EndpointStopped(f"{FAILURES_IN_A_ROW} requests in a row failed, the last by {failure}"))
        except EndpointStopped as error:
            self.give_up(error)
        except NotSentError:
            self.budget.release(0.0, sent=False)
        except BudgetExceededError:
            self.ending = "max_cost" if self.ending == "done" else self.ending
        finally:
            self.sent -= 1
            self.budget.release(worst)
        return None

    def give_up(self, error: EndpointStopped) -> None:
        self.fatal = self.fatal or error
        self.cancel.request()  # those that wait for another try need not
