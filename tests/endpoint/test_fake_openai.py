"""The fake speaks OpenAI's wire format: its answers, over sockets, are valid as the openai client's types."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI, share_of_faults

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "hello – 안녕"}]


def valid(thing) -> dict:
    """An object of the client, which is lenient, held against its own type, which is not."""
    return type(thing).model_validate(thing.to_dict()).to_dict()


@pytest.fixture
def served():
    fake = FakeOpenAI(answer=lambda messages: "echo " + messages[-1]["content"], key="k")
    with fake.serve() as url, openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        yield fake, client


def test_chat_and_models(served):
    fake, client = served
    completion = client.chat.completions.create(model="teacher", messages=MESSAGES, temperature=0.1)
    valid(completion)
    assert completion.choices[0].message.content == "echo hello – 안녕"
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == completion.usage.total_tokens
    assert [valid(model)["id"] for model in client.models.list()] == ["teacher"]
    assert list(fake.paid.values()) == [1]


def test_errors_are_the_clients(served):
    fake, client = served
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="x").models.list()
    fake.refuses = ("temperature",)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="teacher", messages=MESSAGES, temperature=0.1)
    assert error.value.code == "unsupported_value" and error.value.param == "temperature"
    faults = iter(["429", "500", "502", "cut", "drop", "never"])
    fake.faults = lambda number: next(faults)
    for kind in (openai.RateLimitError, openai.InternalServerError, openai.InternalServerError,
                 openai.APIConnectionError, openai.APIConnectionError, openai.APITimeoutError):
        with pytest.raises(kind):
            client.with_options(timeout=0.2).chat.completions.create(model="teacher", messages=MESSAGES)
    assert sum(fake.paid.values()) == 1  # the answer that was cut off


def test_files_and_batches(served):
    fake, client = served
    lines = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions",
              "body": {"model": "teacher", "messages": [{"role": "user", "content": f"{i}"}]}} for i in range(4)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    uploaded = client.files.create(file=("in.jsonl", data), purpose="batch")
    assert valid(uploaded)["bytes"] == len(data) and client.files.content(uploaded.id).read() == data
    valid(client.files.retrieve(uploaded.id))
    fake.batch_end = lambda number: "completed" if number == 0 else "expired"
    batches = [client.batches.create(input_file_id=uploaded.id, endpoint="/v1/chat/completions",
                                     completion_window="24h") for _ in range(3)]
    assert [batch.status for batch in batches] == ["validating"] * 3
    assert client.batches.retrieve(batches[0].id).status == "in_progress"
    done = client.batches.retrieve(batches[0].id)
    assert valid(done)["status"] == "completed" and done.request_counts.completed == 4 and not done.error_file_id
    rows = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == ["c3", "c2", "c1", "c0"]
    assert openai.types.chat.ChatCompletion.model_validate(rows[0]["response"]["body"])
    client.batches.retrieve(batches[1].id)
    expired = client.batches.retrieve(batches[1].id)
    assert valid(expired)["status"] == "expired" and expired.request_counts.failed == 2
    assert "batch_expired" in client.files.content(expired.error_file_id).text
    assert [batch.id for batch in client.batches.list(limit=2)] == [batch.id for batch in batches[::-1]]
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_0")


def test_fifty_connections_are_kept_alive(served):
    fake, client = served
    connections, accept = [], fake.connection
    fake.latency = 0.01

    async def main(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as many:
            gate = asyncio.Semaphore(50)

            async def one(i: int) -> None:
                async with gate:
                    await many.chat.completions.create(model="teacher", messages=[{"role": "user", "content": f"{i}"}])

            await asyncio.gather(*(one(i) for i in range(300)))

    async def counted(reader, writer):
        connections.append(1)
        await accept(reader, writer)

    fake.connection = counted
    with fake.serve() as url:
        asyncio.run(main(url))
    assert len(connections) <= 50 and len(fake.paid) == 300 and set(fake.paid.values()) == {1}


def test_as_a_process():
    command = [sys.executable, str(Path(__file__).parent / "fake_openai.py"), "--fault-share", "1", "--faults", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="teacher", messages=MESSAGES)
        with urllib.request.urlopen(url.removesuffix("/v1") + "/fake/counts") as page:
            assert json.load(page)["refused"] == {"500": 1}
    finally:
        process.kill()
        process.wait()


def test_share_of_faults():
    named = [share_of_faults(0.2, ["a", "b"], number) for number in range(1000)]
    assert named.count("a") == named.count("b") == 100
