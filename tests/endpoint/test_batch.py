import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI
from virtual_time import run

from llava_jax.endpoint import batch as module
from llava_jax.endpoint.batch import answer_all_in_batches
from llava_jax.endpoint.budget import Budget
from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import Endpoint
from llava_jax.endpoint.errors import EndpointStopped, RequestFailed
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import ChatRequest
from llava_jax.errors import UserError

pytest.importorskip("openai")
URL = "http://127.0.0.1:9/v1"


class Jobs:
    """Of a number of requests, made by index."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> "Job":
        return Job(i)


class Job:
    def __init__(self, name: int):
        self.name = name

    def request(self, attempt: int) -> ChatRequest:
        messages = ({"role": "user", "content": f"about {self.name:06} \u2028 안녕"},)
        return ChatRequest(messages, {"max_completion_tokens": 100, "temperature": 0.5}, attempt)


class Settled:
    def __init__(self, accept=lambda job, attempt, answer: True):
        self.accept, self.calls = accept, []

    def __call__(self, job, attempt, answer) -> bool:
        self.calls.append((job.name, attempt, answer))
        return self.accept(job, attempt, answer)


def batched(fake, folder: Path, count: int, record=None, before=None, **options):
    """Ending, settled and the seconds that it took; the log is opened and closed, as one run does."""
    record, cancel = record or Settled(), options.setdefault("cancel", CancelToken())

    async def main():
        with AnswerLog(str(folder / "answers.jsonl")) as log:
            async with Endpoint("teacher", URL, transport=fake.transport(), cancel=cancel) as endpoint:
                if before:
                    before()
                ending = await answer_all_in_batches(Jobs(count), endpoint, log, record, str(folder), **options)
            assert all(reply.batch for _, reply in log.items())
        return ending, record, asyncio.get_running_loop().time()

    return run(main())


def logged(folder: Path) -> set[int]:
    """Which jobs' first requests the log holds."""
    keys = {Job(i).request(0).key("teacher"): i for i in range(1000)}
    with AnswerLog(str(folder / "answers.jsonl"), read_only=True) as log:
        return {keys[key] for key, _ in log.items() if key in keys}


def test_answers_come_in_any_order_and_are_joined_by_key(tmp_path):
    fake = FakeOpenAI(answer=lambda messages: "to " + messages[0]["content"])
    ending, record, _ = batched(fake, tmp_path, 20, requests_per_part=8)
    assert ending == "done" and len(fake.batches) == 3 and set(fake.paid.values()) == {1}
    assert sorted((name, answer.text) for name, _, answer in record.calls) == [
        (i, f"to about {i:06} \u2028 안녕") for i in range(20)]
    assert batched(fake, tmp_path, 20)[0] == "done" and len(fake.batches) == 3
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "batches.json"]


def test_the_input_files_are_as_documented(tmp_path):
    fake = FakeOpenAI()
    batched(fake, tmp_path, 10, requests_per_part=50, bytes_per_part=1000)
    inputs = [data for described, data in fake.files.values() if described["purpose"] == "batch"]
    lines = [json.loads(line) for data in inputs for line in data.split(b"\n") if line]
    assert all(len(data) <= 1000 for data in inputs) and len(inputs) > 2 and len(lines) == 10
    assert lines[0] == {
        "custom_id": Job(0).request(0).key("teacher"), "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "teacher", "messages": list(Job(0).request(0).messages), "max_completion_tokens": 100,
                 "temperature": 0.5}}
    asked = fake.batches["batch_" + min(fake.batches).split("_")[1]]
    assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"


def test_lines_that_make_no_sense_are_passed_over(tmp_path):
    """And a second answer to a request does not take the first one's place."""

    class Odd(FakeOpenAI):
        async def respond(self, method, path, headers, body):
            response = await super().respond(method, path, headers, body)
            if path.endswith("/content"):
                row = json.loads(response.body.split(b"\n")[0])
                late = json.loads(json.dumps(row).replace("about", "late"))
                failed = row | {"response": {"status_code": 400, "body": {"error": {"message": "no"}}}}
                odd = [late, failed, {"custom_id": "ab", "response": row["response"]}, {"custom_id": 7}, [], "text",
                       row | {"custom_id": "f" * 63 + "x"}, row | {"response": "none"}, row | {"response": None}]
                response.body += b"{broken\n\xff\xfe\n\n" + b"".join(json.dumps(o).encode() + b"\n" for o in odd)
            return response

    fake = Odd(answer=lambda messages: "to " + messages[0]["content"])
    ending, record, _ = batched(fake, tmp_path, 5)
    assert ending == "done" and len(fake.batches) == 1 and len(logged(tmp_path)) == 5
    assert sorted(answer.text for _, _, answer in record.calls) == [f"to about {i:06} \u2028 안녕" for i in range(5)]
    with AnswerLog(str(tmp_path / "answers.jsonl")) as log:
        assert len(log) == 5 and log.damaged == []


def test_an_expired_batch_gives_what_it_has_and_the_rest_is_asked_again(tmp_path):
    fake = FakeOpenAI(batch_end=lambda number: "expired" if number < 2 else "completed", batch_share=0.6)
    ending, record, _ = batched(fake, tmp_path, 10)
    lines = [fake.files[batch["input_file_id"]][1].count(b"\n") for batch in fake.batches.values()]
    assert ending == "done" and lines == [10, 4, 2] and set(fake.paid.values()) == {1} and len(fake.paid) == 10
    assert len(record.calls) == 10


def test_rejected_answers_and_servers_errors_go_into_the_next_batch(tmp_path):
    fake = FakeOpenAI(batch_faults=lambda number: "500" if number in (3, 4) else None)
    record = Settled(lambda job, attempt, answer: attempt == job.name % 2)
    assert batched(fake, tmp_path, 10, record)[0] == "done"
    assert len(record.calls) == 15 and sorted({name for name, _, _ in record.calls}) == list(range(10))
    assert len(fake.batches) == 3 and sum(fake.paid.values()) == 15


def test_requests_that_no_retry_mends_are_settled_as_failures(tmp_path):
    fake = FakeOpenAI(batch_faults=lambda number: "context" if number == 2 else None)
    ending, record, _ = batched(fake, tmp_path, 5)
    failed = [answer for _, _, answer in record.calls if isinstance(answer, RequestFailed)]
    assert ending == "done" and [failure.reason for failure in failed] == ["context_length"]
    assert len(fake.batches) == 1 and len(record.calls) == 5


def test_a_refused_parameter_costs_one_free_round(tmp_path):
    fake = FakeOpenAI(refuses=("temperature",))
    ending, record, _ = batched(fake, tmp_path, 6)
    assert ending == "done" and len(fake.batches) == 2 and len(record.calls) == 6
    assert all("temperature" not in body for body in fake.bodies) and sum(fake.paid.values()) == 6


@pytest.mark.parametrize("end, words", [("failed", "failed: The batch cannot be run. .invalid_model"),
                                        ("cancelled", "was cancelled; the same command asks for its rest")])
def test_a_batch_that_fails_or_was_cancelled_ends_the_run(tmp_path, end, words):
    fake = FakeOpenAI(batch_end=lambda number: end if number == 0 else "completed")
    with pytest.raises(EndpointStopped, match=words):
        batched(fake, tmp_path, 10)
    kept = logged(tmp_path)
    assert len(kept) == (5 if end == "cancelled" else 0) == sum(fake.paid.values())
    assert batched(fake, tmp_path, 10)[0] == "done" and sum(fake.paid.values()) == 10


def test_a_full_queue_is_waited_for(tmp_path):
    """The account may queue two batches at a time: more fail, which costs nothing, and are submitted later."""

    class Full(FakeOpenAI):
        def _batches(self, method, rest, query, body):
            busy = [b for b in self.batches.values() if b["status"] in ("validating", "in_progress")]
            if method == "POST":
                made = super()._batches(method, rest, query, body)
                number = json.loads(made.body)["id"]
                if len(busy) >= 2:
                    self.full.add(number)
                return made
            return super()._batches(method, rest, query, body)

    full = set()
    fake = Full(batch_end=lambda number: "failed" if list(fake.batches)[number] in full else "completed",
                batch_error="token_limit_exceeded", batch_polls=0)
    fake.full = full
    ending, record, _ = batched(fake, tmp_path, 12, requests_per_part=2)
    assert ending == "done" and full and set(fake.paid.values()) == {1} and len(fake.paid) == 12


def test_a_queue_without_room_for_one_batch_ends_the_run(tmp_path):
    fake = FakeOpenAI(batch_end=lambda number: "failed", batch_error="token_limit_exceeded")
    with pytest.raises(EndpointStopped, match="token_limit_exceeded"):
        batched(fake, tmp_path, 12, requests_per_part=6)


def test_a_server_without_batches(tmp_path):
    class None_(FakeOpenAI):
        def _files(self, *request):
            from fake_openai import error

            return error(404, "Not Found")

    with pytest.raises(EndpointStopped, match="404.*has it a Batch API"):
        batched(None_(), tmp_path, 3)


def test_batches_that_never_answer_end_the_run(tmp_path):
    with pytest.raises(EndpointStopped, match="3 rounds of batches brought no answer"):
        batched(FakeOpenAI(batch_faults=lambda number: "500"), tmp_path, 3)


def test_stop_leaves_the_batches_to_go_on(tmp_path):
    cancel, fake = CancelToken(), FakeOpenAI(batch_polls=5)
    before = lambda: asyncio.get_running_loop().call_later(30, cancel.request)  # noqa: E731
    ending, record, seconds = batched(fake, tmp_path, 10, cancel=cancel, before=before)
    assert ending == "interrupted" and seconds == pytest.approx(30, abs=0.1) and not record.calls
    assert batched(fake, tmp_path, 10)[0] == "done" and len(fake.batches) == 1 and set(fake.paid.values()) == {1}


def test_looks_become_rarer(tmp_path):
    fake = FakeOpenAI(batch_polls=30)
    _, _, seconds = batched(fake, tmp_path, 3)
    assert sum(fake.looks.values()) == 31 and seconds > 15 * module.MAX_POLL_SECONDS


def test_the_budget_holds_with_what_is_on_its_way(tmp_path):
    price = Price(prompt=1000, completion=4000, cached=1000, batch=0.5)
    fake = FakeOpenAI(answer=lambda messages: "x" * 200)
    budget = Budget(2.0, price=price, batch=True)
    ending, record, _ = batched(fake, tmp_path, 100, budget=budget)
    with AnswerLog(str(tmp_path / "answers.jsonl")) as log:
        cost = sum(price.cost(reply) for _, reply in log.items())
    assert ending == "max_cost" and cost == pytest.approx(budget.cost) and budget.reserved == pytest.approx(0)
    assert 2 - budget.worst_cost(Job(0).request(0)) < cost <= 2 and len(record.calls) == sum(fake.paid.values())
    limited = batched(fake, tmp_path, 100, budget=Budget(max_requests=7, batch=True))
    assert limited[0] == "max_requests" and sum(fake.paid.values()) == len(record.calls) + 7


def test_creating_is_looked_up_before_it_is_tried_again(tmp_path):
    """The connection is lost after the server has made the batch; there is one, all the same."""

    class Lossy(FakeOpenAI):
        lost = 0

        async def respond(self, method, path, headers, body):
            response = await super().respond(method, path, headers, body)
            if method == "POST" and path.startswith("/v1/batches") and self.lost < 1:
                self.lost += 1
                return None
            return response

    fake = Lossy()
    assert batched(fake, tmp_path, 10)[0] == "done" and fake.lost == 1 and len(fake.batches) == 1


def test_a_state_that_cannot_be_read(tmp_path):
    (tmp_path / "batches.json").write_text("{")
    with pytest.raises(UserError, match="batches.json: cannot be read"):
        batched(FakeOpenAI(), tmp_path, 3)


def test_a_part_that_was_deleted_before_its_upload_is_written_anew(tmp_path):
    part = {"name": "batch-0000000000000000.jsonl", "requests": 3, "worst": 1.0, "fields": ["model"]}
    (tmp_path / "batches.json").write_text(json.dumps({"parts": [part]}))
    ending, record, _ = batched(FakeOpenAI(), tmp_path, 3)
    assert ending == "done" and len(record.calls) == 3


def child(url: str, folder: Path, steps: int | None) -> int:
    """Runs all in a forked process, which dies before one of its steps: a write, a rename, an unlink, a request.

    What is not on disk or at the server then is lost. Returns how it ended.
    """
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    try:
        left = [steps]

        def step() -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)  # as kill -9: nothing is cleaned up

        def dying(function):
            def call(*args, **kwargs):
                step()
                return function(*args, **kwargs)

            return call

        import httpx2

        handle = httpx2.AsyncHTTPTransport.handle_async_request

        async def handled(self, request):
            step()
            return await handle(self, request)

        httpx2.AsyncHTTPTransport.handle_async_request = handled
        os.write, os.replace, os.unlink = dying(os.write), dying(os.replace), dying(os.unlink)
        module.MIN_POLL_SECONDS = 0.001

        async def main() -> str:
            with AnswerLog(str(folder / "answers.jsonl")) as log:
                transport = httpx2.AsyncHTTPTransport(verify=False)  # certificates take a while to load
                async with Endpoint("teacher", url, transport=transport) as endpoint:
                    return await answer_all_in_batches(
                        Jobs(4), endpoint, log, Settled(), str(folder), requests_per_part=2)

        os._exit(0 if asyncio.run(main()) == "done" else 1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_any_two_steps_nothing_is_submitted_twice(tmp_path, stride):
    """A child is killed after 0, `stride`, 2 * `stride`, ... steps, and the next one finishes its work."""
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        fake = FakeOpenAI(batch_polls=0)
        with fake.serve() as url:
            first = child(url, folder, steps)
            if first == 0:
                break
            assert os.waitstatus_to_exitcode(first) == 9
            assert child(url, folder, None) == 0
        assert len(fake.batches) == 2 and sorted(fake.paid.values()) == [1] * 4, steps
        assert logged(folder) == set(range(4))
        assert sorted(os.listdir(folder)) == ["answers.jsonl", "batches.json"]
        steps += stride
    assert steps > 25  # or the steps were not those of the run
