"""Asks many requests concurrently, in bounded memory, within a budget, and never the same request twice."""

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

MAX_FAILURES_IN_A_ROW = 20
"""Number of requests that fail one after another before the run ends, because later ones would fail too."""

Ending = Literal["done", "interrupted", "max_cost", "max_requests"]


class AnswerJob(Protocol):
    def request(self, attempt: int) -> ChatRequest: ...


class Teacher(Protocol):
    model: str

    async def ask(self, request: ChatRequest, lost: "Lost") -> Response: ...


J = TypeVar("J", bound=AnswerJob)
Lost = Callable[[int], bool]
"""A function that is called with the received bytes of a try without an answer, and returns whether to try again."""
RecordAnswer = Callable[[J, int, Response | RequestFailed], bool]
"""A function of a job, an attempt and its answer or failure, which returns whether the job is done."""


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
    """Asks the teacher for every answer that is not in the log, `concurrency` requests at a time.

    An answer is written to the log first. Then `record(job, attempt, answer or failure)` is called. If it returns
    False, the job's request of attempt + 1 follows. Jobs with equal requests ask once. `jobs` is read lazily, and jobs
    that were not reached are not recorded.

    Returns "done" if all jobs are done, "interrupted" if `cancel` was requested, and "max_cost" or "max_requests" if
    the budget had no room for the next request. Requests in flight are always finished and recorded before.

    Raises EndpointStopped if no request would be answered any more, or after MAX_FAILURES_IN_A_ROW; UserError if the
    log cannot be written.
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
        self.in_flight: dict[str, asyncio.Event] = {}  # by key; the event is set when the request has ended
        self.ended = asyncio.Event()  # set whenever a request has ended
        self.sent = self.failures = 0  # numbers of requests in flight, and of failures in a row

    @property
    def over(self) -> bool:
        if self.cancel.requested and self.ending == "done":
            self.ending = "interrupted"
        return self.ending != "done" or self.fatal is not None

    async def work(self) -> None:
        while not self.over and (job := next(self.jobs, None)) is not None:
            await asyncio.sleep(0)  # signals must be handled while the log has all answers
            await self.work_on(job)

    async def work_on(self, job: AnswerJob) -> None:
        attempt, fresh = 0, False
        while True:
            request = job.request(attempt)
            key = request.key(self.teacher.model)
            while key in self.in_flight:
                await self.in_flight[key].wait()
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
        """Returns an answer that is in the log now, or the failure, or None if the run is over."""
        ended = self.in_flight[key] = asyncio.Event()
        try:
            worst = self.budget.worst_cost(request)
            while not self.over and (limit := self.reserve(worst)) is not None:
                await self.wait_for_room(limit)
                worst = self.budget.worst_cost(request)
            return None if self.over else await self.send(key, request, worst)
        finally:
            del self.in_flight[key]
            ended.set()
            self.ended.set()

    def reserve(self, worst: float) -> Literal["max_cost", "max_requests"] | None:
        """Reserves a request's worst cost, or returns the limit that forbids it.

        With a limit of cost, the second request waits for the first answer, which shows what others may cost.
        """
        if self.budget.max_cost is not None and not self.budget.seen and self.sent:
            return "max_cost"
        return self.budget.reserve(worst)

    async def wait_for_room(self, limit: Literal["max_cost", "max_requests"]) -> None:
        """Waits for a request in flight, which may cost less than its worst. Without one, the run is over."""
        if limit == "max_cost" and self.sent:
            self.ended.clear()
            await self.ended.wait()
        elif self.ending == "done":
            self.ending = limit

    async def send(self, key: str, request: ChatRequest, worst: float) -> Response | RequestFailed | None:
        self.sent += 1
        try:
            response = await self.teacher.ask(request, lambda received: self.budget.add_lost(request, received))
            self.log.append(key, response)
            self.budget.add(response)
            self.budget.learn(request, response)  # before another request is sent
            self.failures = 0
            return response
        except RequestFailed as failure:
            self.failures += 1
            if self.failures < MAX_FAILURES_IN_A_ROW:
                return failure
            self.give_up(EndpointStopped(f"{MAX_FAILURES_IN_A_ROW} requests in a row failed, the last by {failure}"))
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
        self.cancel.request()  # requests that wait for another try need not wait
