"""The limit of cost against servers that bill for more than they tell: by a till that counts what was really sent."""

import asyncio
import json

import pytest
from fake_openai import FakeOpenAI, Response
from test_run import URL, Job, Settled, jobs
from virtual_time import run

from llava_jax.endpoint.batch import answer_all_in_batches
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import Endpoint
from llava_jax.endpoint.errors import RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.run import answer_all

PRICE = Price(prompt=1000, completion=4000, cached=1000)
LIMIT = 100  # max_completion_tokens of a Job
USAGES = {
    "as it is": lambda usage: usage,
    "none": lambda usage: None,
    "empty": lambda usage: {},
    "zero": lambda usage: {"prompt_tokens": 0, "completion_tokens": 0},
    "one": lambda usage: {"prompt_tokens": 1, "completion_tokens": 1},
    "negative": lambda usage: {"prompt_tokens": -5, "completion_tokens": -5},
    "huge": lambda usage: {"prompt_tokens": 1e300, "completion_tokens": 10**400},
    "texts": lambda usage: {"prompt_tokens": "9", "completion_tokens": "many"},
    "true": lambda usage: {"prompt_tokens": True, "completion_tokens": True},
    "nan": lambda usage: {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
    "a list": lambda usage: [1, 2],
    "only the prompt": lambda usage: {"prompt_tokens": usage["prompt_tokens"]},
    "all cached": lambda usage: usage | {"prompt_tokens_details": {"cached_tokens": 10**9}},
}


class Till(FakeOpenAI):
    """Bills each completion by its true size, a token for four characters, whatever it tells; `sizes`: tokens of the
    number-th answer."""

    def __init__(self, sizes=lambda number: 40, usage=USAGES["as it is"], **fields):
        super().__init__(**fields)
        self.sizes, self.usage, self.bills = sizes, usage, []

    def complete(self, body, fault=None):
        size = self.sizes(len(self.bills))
        self.answer = lambda messages: "word" * size
        completion = super().complete(body, None)
        usage = completion["usage"]
        self.bills.append(PRICE.of(usage["prompt_tokens"], usage["completion_tokens"]))
        return completion | {"usage": self.usage(usage)}

    @property
    def billed(self) -> float:
        return sum(self.bills)


def spend(fake, log, budget, concurrency=10, count=1000, **endpoint):
    record = Settled()

    async def main():
        async with Endpoint("teacher", URL, transport=fake.transport(), **endpoint) as teacher:
            return await answer_all(jobs(count), teacher, log, record, budget=budget, concurrency=concurrency)

    return run(main()), record


@pytest.fixture
def log(tmp_path):
    with AnswerLog(str(tmp_path / "answers.jsonl")) as log:
        yield log


@pytest.mark.parametrize("concurrency", [1, 7, 50])
@pytest.mark.parametrize("usage", USAGES)
def test_what_came_counts_whatever_the_server_tells(log, usage, concurrency):
    fake = Till(usage=USAGES[usage], latency=1)
    budget = Budget(max_cost=10.0, price=PRICE)
    ending, record = spend(fake, log, budget, concurrency)
    assert ending == "max_cost" and len(record.calls) == len(log) == len(fake.bills)
    assert 1 < fake.billed <= 10.0 and budget.cost >= fake.billed - 1e-9 and budget.reserved == pytest.approx(0)
    # What the log says was spent holds the next run too.
    spent = sum(PRICE.cost(reply) for _, reply in log.items())
    assert spend(fake, log, Budget(max_cost=10.0, price=PRICE, cost=spent), concurrency)[0] == "max_cost"
    assert fake.billed <= 10.0


@pytest.mark.parametrize("usage", ["as it is", "none", "one"])
@pytest.mark.parametrize("concurrency", [1, 50])
def test_a_server_that_ignores_the_limit_goes_beyond_by_one_answer_at_most(log, usage, concurrency):
    """The first request goes alone; from then on there is room for what the server really sends."""
    fake = Till(sizes=lambda number: 20 * LIMIT, usage=USAGES[usage], latency=1)
    ending, _ = spend(fake, log, Budget(max_cost=50.0, price=PRICE), concurrency)
    assert ending == "max_cost" and 8 < fake.billed <= 50.0
    with AnswerLog(log.path + "2") as other:
        fake = Till(sizes=lambda number: 20 * LIMIT, usage=USAGES[usage], latency=1)
        ending, _ = spend(fake, other, Budget(max_cost=1.0, price=PRICE), concurrency)  # less than one answer costs
        assert ending == "max_cost" and len(fake.bills) == 1


@pytest.mark.parametrize("sizes", [lambda number: LIMIT * (number + 1), lambda number: LIMIT * (1, 40)[number > 30]])
def test_a_server_that_goes_ever_further_beyond_is_bounded_by_what_is_in_flight(log, sizes):
    fake, flying = Till(sizes=sizes, latency=1), 8
    spend(fake, log, Budget(max_cost=40.0, price=PRICE), flying)
    *_, last = [i for i in range(len(fake.bills)) if sum(fake.bills[:i]) <= 40.0]
    assert fake.billed <= 40.0 + sum(sorted(fake.bills)[-flying:]) and len(fake.bills) - last <= flying


@pytest.mark.parametrize("fault", ["cut", "never", "nonsense", "stream"])
def test_tries_that_bring_no_answer_count_too(log, fault):
    """They are billed: answers that are cut off, come too late, or are no completion."""

    class Cruel(Till):
        async def respond(self, method, path, headers, body):
            number = len(self.bills)
            response = await super().respond(method, path, headers, body)
            if len(self.bills) > number and number % 3:
                response.cut = fault == "cut"
                if fault == "never":
                    await asyncio.sleep(1e6)
                if fault == "nonsense":
                    response.body = json.dumps({"text": "word" * 40}).encode()
                if fault == "stream":
                    response = Response(200, b"data: {}\n\n" + response.body, "text/event-stream")
            return response

    fake, budget = Cruel(latency=1), Budget(max_cost=10.0, price=PRICE)
    ending, record = spend(fake, log, budget, 10, timeout=60)
    assert ending == "max_cost" and 1 < fake.billed <= 10.0 and budget.lost > 0
    assert len(log) < len(fake.bills) and not [a for _, _, a in record.calls if isinstance(a, RequestFailed)]


def test_what_nobody_bills_does_not_count(log):
    budget = Budget(max_cost=10.0, price=PRICE)
    fake = Till(latency=1, faults=lambda number: "429-ms" if number % 2 else None)
    assert spend(fake, log, budget)[0] == "max_cost" and budget.lost == 0
    unreached = Budget(max_cost=10.0, price=PRICE)

    async def main():  # on a port where nobody listens
        async with Endpoint("teacher", URL, retries=0) as teacher:
            return await answer_all(jobs(3), teacher, log, Settled(lambda *_: True), budget=unreached)

    with AnswerLog(log.path + "2") as log:
        asyncio.run(main())
    assert unreached.lost == 0


@pytest.mark.parametrize("usage", USAGES)
def test_batches_count_what_came(tmp_path, usage):
    fake = Till(usage=USAGES[usage])
    budget = Budget(max_cost=10.0, price=PRICE, batch=True)

    async def main():
        with AnswerLog(str(tmp_path / "answers.jsonl")) as log:
            async with Endpoint("teacher", URL, transport=fake.transport()) as endpoint:
                return await answer_all_in_batches([Job(i) for i in range(1000)], endpoint, log, Settled(),
                                                   str(tmp_path), budget=budget, cancel=CancelToken())

    assert run(main()) == "max_cost" and 1 < fake.billed <= 10.0
    assert budget.cost >= fake.billed - 1e-9 and budget.reserved == pytest.approx(0)
