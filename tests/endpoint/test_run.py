import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
from fake_openai import FakeOpenAI, share_of_faults
from virtual_time import run

from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import Endpoint
from llava_jax.endpoint.errors import EndpointStopped, RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.endpoint.run import MAX_FAILURES_IN_A_ROW, answer_all
from llava_jax.errors import UserError

pytest.importorskip("openai")
URL = "http://127.0.0.1:9/v1"


@dataclasses.dataclass(frozen=True)
class Job:
    name: int

    def request(self, attempt: int) -> ChatRequest:
        message = {"role": "user", "content": f"about {self.name:06}"}
        return ChatRequest((message,), {"max_completion_tokens": 100}, attempt)


def jobs(count: int):
    return (Job(i) for i in range(count))


class Settled:
    """Accepts what `accept` does, and keeps what came."""

    def __init__(self, accept=lambda job, attempt, answer: True):
        self.accept, self.calls = accept, []

    def __call__(self, job, attempt, answer) -> bool:
        self.calls.append((job.name, attempt, answer))
        return self.accept(job, attempt, answer)


@pytest.fixture
def log(tmp_path):
    with AnswerLog(str(tmp_path / "answers.jsonl")) as log:
        yield log


def answered(fake, log, work, record=None, endpoint=None, before=None, **options):
    record = record or Settled()

    async def main():
        cancel = options.setdefault("cancel", CancelToken())
        async with Endpoint("teacher", URL, transport=fake.transport(), cancel=cancel, **(endpoint or {})) as teacher:
            if before:
                before()
            return await answer_all(work, teacher, log, record, **options)

    return run(main()), record


def test_every_job_is_settled_once_and_nothing_is_paid_twice(log):
    names = "429-ms,500,502,slow,length,drop,never,nonsense".split(",")
    fake = FakeOpenAI(faults=lambda number: share_of_faults(0.2, names, number), latency=2)
    ending, record = answered(fake, log, jobs(500), endpoint={"timeout": 60})
    assert ending == "done" and sorted(name for name, _, _ in record.calls) == list(range(500))
    assert len(log) == 500 and len(fake.paid) == 500 and set(fake.paid.values()) == {1}
    assert all(log[Job(name).request(0).key("teacher")] == reply for name, _, reply in record.calls)


def test_what_the_log_holds_is_not_asked(log):
    fake = FakeOpenAI()
    answered(fake, log, jobs(30))
    ending, record = answered(fake, log, jobs(40))
    assert ending == "done" and len(record.calls) == 40 and sum(fake.paid.values()) == 40


def test_a_reply_is_in_the_log_before_it_is_settled(log):
    record = Settled(lambda job, attempt, answer: job.request(attempt).key("teacher") in log)
    assert answered(FakeOpenAI(), log, jobs(5), record)[0] == "done"


def test_rejected_answers_are_asked_for_again(log):
    record = Settled(lambda job, attempt, answer: attempt == job.name % 3)
    fake = FakeOpenAI()
    answered(fake, log, jobs(9), record)
    assert Counter(name for name, _, _ in record.calls) == {i: i % 3 + 1 for i in range(9)}
    assert len(log) == sum(i % 3 + 1 for i in range(9)) == sum(fake.paid.values())
    again = Settled(record.accept)
    answered(fake, log, jobs(9), again)  # all from the log
    assert sorted(again.calls, key=str) == sorted(record.calls, key=str) and sum(fake.paid.values()) == 18


def test_equal_requests_are_asked_once(log):
    fake = FakeOpenAI(latency=1)
    ending, record = answered(fake, log, (Job(i % 2) for i in range(20)))
    assert ending == "done" and len(record.calls) == 20 and sum(fake.paid.values()) == 2


def test_jobs_are_read_as_they_are_needed(log):
    taken = []

    def lazily():
        for i in range(100):
            taken.append(i)
            yield Job(i)

    fake = FakeOpenAI(latency=1)
    record = Settled(lambda job, attempt, answer: len(taken) <= len(record.calls) + 7)
    answered(fake, log, lazily(), record, concurrency=7)
    assert len(record.calls) == 100  # no job was taken too early, or its first answer would not have done


def test_concurrency_is_bounded_and_used(log):
    fake = FakeOpenAI(latency=1)
    answered(fake, log, jobs(100), concurrency=20)
    assert Counter(round(at) for at in fake.times) == {0: 20, 1: 20, 2: 20, 3: 20, 4: 20}


def test_failures_are_settled_and_not_logged(log):
    fake = FakeOpenAI(faults=lambda number: "context" if number % 4 == 0 else None)
    ending, record = answered(fake, log, jobs(40))
    failed = [answer for _, _, answer in record.calls if isinstance(answer, RequestFailed)]
    assert ending == "done" and len(failed) == 10 and {failure.reason for failure in failed} == {"context_length"}
    assert len(log) == 30


def test_many_failures_in_a_row_end_the_run(log):
    fake = FakeOpenAI(faults=lambda number: "context")
    with pytest.raises(EndpointStopped, match=f"{MAX_FAILURES_IN_A_ROW} requests in a row failed.*maximum context"):
        answered(fake, log, jobs(1000), concurrency=4)
    assert fake.refused["context"] < MAX_FAILURES_IN_A_ROW + 4


def test_a_key_that_is_refused_meanwhile_ends_the_run_after_what_is_in_flight(log):
    fake = FakeOpenAI(latency=5, faults=lambda number: "quota" if number == 13 else "500" if number == 14 else None)
    with pytest.raises(EndpointStopped, match="quota"):
        answered(fake, log, jobs(1000), concurrency=10)
    # Ten were answered, the quota ends the eleventh to come on the wire; those beside it were paid and are kept.
    assert len(log) == sum(fake.paid.values()) and 10 < len(log) < 20


def test_who_waits_for_another_try_is_not_waited_for_when_all_is_over(log):
    async def main():
        fake, cancel = FakeOpenAI(faults=lambda number: "quota" if number == 20 else "500"), CancelToken()
        async with Endpoint("teacher", URL, transport=fake.transport(), cancel=cancel, retries=1000) as teacher:
            with pytest.raises(EndpointStopped, match="quota"):
                await answer_all(jobs(100), teacher, log, Settled(), cancel=cancel, concurrency=10)
        return asyncio.get_running_loop().time()

    assert run(main()) < 10


def test_a_full_disk_ends_the_run(log, monkeypatch):
    write, lines = os.write, []

    def full(file, data):
        lines.append(data)
        if len(lines) > 5:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left"):
        answered(FakeOpenAI(latency=1), log, jobs(100), concurrency=1)
    assert len(log) == 5


def test_max_requests(log):
    fake = FakeOpenAI(latency=1)
    ending, record = answered(fake, log, jobs(100), budget=Budget(max_requests=12), concurrency=5)
    assert ending == "max_requests" and len(record.calls) == len(log) == sum(fake.paid.values()) == 12


@pytest.mark.parametrize("concurrency", [1, 7, 50])
def test_max_cost_is_never_passed_and_nearly_reached(log, concurrency):
    price = Price(prompt=1000, completion=4000, cached=500)
    fake = FakeOpenAI(latency=1, answer=lambda messages: "x" * (4 * (20 + int(messages[0]["content"][-2:]) % 60)))
    budget = Budget(max_cost=10.0, price=price)
    ending, record = answered(fake, log, jobs(1000), budget=budget, concurrency=concurrency)
    cost = sum(price.cost(reply) for _, reply in log.items())
    assert ending == "max_cost" and budget.cost == pytest.approx(cost) and budget.reserved == pytest.approx(0)
    worst = budget.worst_cost(Job(0).request(0))
    assert worst == pytest.approx(price.of(next(log.items())[1].prompt_tokens, 100))  # learned from the answers
    assert 10 - worst <= cost <= 10 and len(record.calls) == len(log)
    # The next run of the same command starts from what was spent.
    again = Budget(max_cost=10.0, price=price, cost=cost)
    assert answered(fake, log, jobs(1000), budget=again)[0] == "max_cost" and sum(fake.paid.values()) == len(log)


def test_a_budget_needs_prices():
    with pytest.raises(UserError, match="--prices"):
        Budget(max_cost=3)


def test_without_a_limit_of_tokens_the_longest_answer_counts():
    price, budget = Price(1e6, 1e6, 1e6), Budget(price=Price(1e6, 1e6, 1e6))
    plain = ChatRequest(({"role": "user", "content": "x" * 100},))
    assert budget.worst_cost(plain) == price.of(50, 4096)
    for tokens in (30, 70, 50):
        reply = Response("", "stop", 25, 0, tokens, "m", None, 0)
        budget.add(reply)
        budget.learn(plain, reply)
    assert budget.worst_cost(plain) == price.of(25, 70) and budget.cost == 3 * 25 + 150


def test_stop_finishes_what_is_in_flight(log):
    cancel, fake = CancelToken(), FakeOpenAI(latency=10)
    before = lambda: asyncio.get_running_loop().call_later(25, cancel.request)  # noqa: E731
    ending, record = answered(fake, log, jobs(100), cancel=cancel, concurrency=8, before=before)
    assert ending == "interrupted" and len(record.calls) == len(log) == sum(fake.paid.values()) == 24
    assert answered(fake, log, jobs(100))[0] == "done" and sum(fake.paid.values()) == 100


def test_stop_does_not_wait_for_turns(log):
    cancel, fake, budget = CancelToken(), FakeOpenAI(latency=1), Budget(price=Price(1, 1, 1))
    before = lambda: asyncio.get_running_loop().call_later(90, cancel.request)  # noqa: E731

    async def main():
        transport = fake.transport()
        async with Endpoint("teacher", URL, transport=transport, cancel=cancel, requests_per_minute=1) as teacher:
            before()
            await answer_all(jobs(100), teacher, log, Settled(), cancel=cancel, concurrency=50, budget=budget)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(90, abs=0.1) and len(log) == 2
    assert budget.requests == 2 and budget.reserved == pytest.approx(0)  # the others were never sent


SCRIPT = textwrap.dedent("""
    import asyncio, sys
    sys.path.insert(0, {here!r})
    from test_run import Job
    from llava_jax.endpoint.client import Endpoint
    from llava_jax.endpoint.errors import NotSentError
    from llava_jax.endpoint.log import AnswerLog
    from llava_jax.endpoint.run import answer_all
    from llava_jax.endpoint.cancel import CancelToken

    def record(job, attempt, answer):
        print("settled", flush=True)
        return True

    async def tell(cancel):
        try:
            await cancel.sleep(1000)
        except NotSentError:
            print("heard", flush=True)

    async def main():
        cancel = CancelToken()
        task = asyncio.create_task(tell(cancel))
        async with Endpoint("teacher", sys.argv[1], cancel=cancel) as endpoint:
            with AnswerLog(sys.argv[2]) as log, cancel.handle_signals():
                jobs = (Job(i) for i in range(1000))
                print(await answer_all(jobs, endpoint, log, record, cancel=cancel, concurrency=8))
        print("signal", cancel.signal)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
""")


@pytest.fixture
def process(tmp_path):
    """A run of a thousand jobs in a process of its own, whose first answers have come and whose next never will."""
    path, started = str(tmp_path / "log.jsonl"), []

    def begin(faults):
        fake = FakeOpenAI(faults=faults, slow=1.0)
        context = fake.serve()
        url = context.__enter__()
        script = SCRIPT.format(here=os.path.dirname(__file__))
        child = subprocess.Popen([sys.executable, "-c", script, url, path], stdout=subprocess.PIPE, text=True)
        started.extend([(child, context)])
        for _ in range(20):
            assert child.stdout.readline() == "settled\n"
        return fake, child, path

    yield begin
    for child, context in started:
        child.kill()
        child.wait()
        context.__exit__(None, None, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_once_finishes(process, number):
    fake, child, path = process(lambda number: None if number < 20 else "slow")
    child.send_signal(number)
    rest = child.stdout.read().split("\n")
    assert child.wait() == 0 and rest[-3:] == ["interrupted", f"signal {int(number)}", ""]
    assert "Traceback" not in rest
    with AnswerLog(path) as log:
        assert len(log) == sum(fake.paid.values()) == 20 + rest.count("settled") < 60


def test_ctrl_c_twice_leaves(process):
    fake, child, path = process(lambda number: None if number < 20 else "never")
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "heard\n"
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    with AnswerLog(path) as log:
        assert len(log) == 20 and log.dropped == 0


def test_kill_loses_at_most_what_was_in_flight(process):
    fake, child, path = process(lambda number: None)
    child.kill()
    child.wait()
    paid = sum(fake.paid.values())
    with AnswerLog(path) as log:
        assert 20 <= len(log) and 0 <= paid - len(log) <= 8
        kept = len(log)
        quiet = FakeOpenAI()
        assert answered(quiet, log, jobs(1000))[0] == "done" and sum(quiet.paid.values()) == 1000 - kept


def test_a_summary_of_costs_and_rejects():
    budget = Budget(price=Price(1, 1, 1))
    budget.cost, budget.lost = 2.0, 0.5
    assert budget.summary(Counter(too_short=2, empty=3)) == "$2.50, 3 empty, 2 too_short"
    assert Budget().summary() == ""
