"""The routes, with stand-ins for the model: OpenAI's client reads every answer, and each mistake has its status."""

import asyncio
import base64
import contextlib
import gc
import json
import logging

import numpy as np
import openai
import pytest
import stand_ins
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from llava_jax.serve import app as app_module
from llava_jax.serve.app import Status, make_app
from llava_jax.serve.errors import ApiError
from llava_jax.serve.limits import Limits

CHAT = "/v1/chat/completions"
HELLO = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}
TEXT = "".join(stand_ins.TEXTS)


class Site:
    """An application with stand-ins."""

    def __init__(self, limits=None, **options):
        self.llava, self.scheduler, self.status = stand_ins.FakeLlava(), stand_ins.FakeScheduler(), Status()
        self.app = make_app(self.llava, self.scheduler, stand_ins.FakeMedia(), limits or Limits(),
                            {"base": 0, "dogs": 1}, stand_ins.CONTEXT, status=self.status, **options)
        self.client = TestClient(self.app, base_url="http://127.0.0.1:8000")
        self.openai = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="k", http_client=self.client,
                                    max_retries=0)

    def chat(self, headers=None, **fields):
        return self.client.post(CHAT, json=HELLO | fields, headers=headers)


@pytest.fixture
def make_site():
    with contextlib.ExitStack() as stack:

        def make(*args, **options):
            site = Site(*args, **options)
            stack.enter_context(site.client)  # one event loop for all requests
            return site

        yield make


@pytest.fixture
def site(make_site):
    return make_site()


def is_error(response, status, param=None, code=None):
    """Whether a response is an error in OpenAI's form."""
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert isinstance(error["message"], str) and error.keys() == {"message", "type", "param", "code"}
    return True


def test_completion(site):
    completion = site.openai.chat.completions.create(**HELLO, temperature=0.5, seed=7)
    assert isinstance(completion, ChatCompletion) and completion.model == "base"
    [choice] = completion.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (TEXT, "assistant", "stop")
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 5, 10)
    assert usage.prompt_tokens_details.cached_tokens == 2
    [job] = site.scheduler.jobs
    assert (job.temperature, job.seed, job.adapter, job.max_new_tokens) == (0.5, 7, 0, stand_ins.CONTEXT - 5)


def test_images_and_adapter(site):
    parts = [{"type": "image_url", "image_url": {"url": "one"}}, {"type": "text", "text": "abc"},
             {"type": "image_url", "image_url": {"url": "two"}}]
    completion = site.openai.chat.completions.create(model="dogs", messages=[{"role": "user", "content": parts}],
                                                     max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.prompt_tokens == 3 + 2 * stand_ins.VISUAL_TOKENS
    assert completion.usage.prompt_tokens_details.image_tokens == 2 * stand_ins.VISUAL_TOKENS
    [job] = site.scheduler.jobs
    assert job.adapter == 1 and [image.digest for image in job.images] == [b"one", b"two"] and job.max_new_tokens == 2


def test_stream_of_several_choices(site):
    chunks = list(site.openai.chat.completions.create(**HELLO, n=3, seed=5, stream=True,
                                                      stream_options={"include_usage": True}))
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.id == chunks[0].id for chunk in chunks)
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:3]] == [
        (0, "assistant"), (1, "assistant"), (2, "assistant")]
    for index in range(3):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == TEXT
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 15 and chunks[-1].usage.prompt_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [job.seed for job in site.scheduler.jobs] == [5, 6, 7]


def test_events_of_a_stream(site):
    response = site.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2]) and events[-2:] == ["data: [DONE]", ""]
    assert '"usage"' not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(site, stream):
    answer = site.openai.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    content = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in content] == stand_ins.TEXTS
    assert content[0].logprob == -9999 and content[1].logprob == -0.5 and bytes(content[0].bytes) == "어".encode()
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("어", 0), ("제 ", -1)]


@pytest.mark.parametrize("reason, status, finish", [
    ("deadline", 200, "length"), ("error", 500, None), ("cancelled", 503, None)])
def test_answers_that_end_early(site, reason, status, finish):
    site.scheduler.reason = reason
    response = site.chat()
    assert response.status_code == status
    if finish:
        assert response.json()["choices"][0]["finish_reason"] == finish
        return
    with pytest.raises(openai.APIError) as error:  # within a stream
        list(site.openai.chat.completions.create(**HELLO, stream=True))
    assert error.value.code == response.json()["error"]["code"] is not None


def test_models(site):
    assert [model.id for model in site.openai.models.list()] == ["base", "dogs"]
    assert site.openai.models.retrieve("dogs").owned_by == "llava_jax"
    assert is_error(site.client.get("/v1/models/cats"), 404, "model", "model_not_found")
    assert is_error(site.chat(model="cats"), 404, "model", "model_not_found")


def test_paths_and_methods(site):
    assert is_error(site.client.get("/v1/completions"), 404)
    assert is_error(site.client.get("/v1/models/"), 404, "model", "model_not_found")
    assert is_error(site.client.get("/../setup.cfg"), 404)
    assert is_error(site.client.get("/%2e%2e/app.py"), 404)
    assert is_error(site.client.get(CHAT), 405)
    assert is_error(site.client.request("OPTIONS", CHAT), 405)  # a browser's preflight: no foreign page may ask
    assert is_error(site.client.post("/health"), 405)
    assert site.client.get("/health").json() == {"status": "alive"}


def test_content_types_and_bodies(site):
    assert is_error(site.client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert is_error(site.client.post(CHAT, content=b"{}"), 415)
    json = {"content-type": "Application/JSON; charset=utf-8"}
    assert is_error(site.client.post(CHAT, content=b"{", headers=json), 400)
    assert is_error(site.client.post(CHAT, content=b"{}", headers=json), 400, "messages")


def test_a_body_over_the_limit(make_site):
    site = make_site(Limits(body_bytes=1000))
    json = {"content-type": "application/json"}
    chunks = lambda size: (b"[" * 100 for _ in range(size))  # noqa: E731  without a Content-Length
    assert is_error(site.client.post(CHAT, content=b"[" * 1001, headers=json), 413, code="request_too_large")
    assert is_error(site.client.post(CHAT, content=chunks(11), headers=json), 413, code="request_too_large")
    assert is_error(site.client.post(CHAT, content=chunks(10), headers=json), 400)
    assert site.chat().status_code == 200


def test_bodies_over_their_total(make_site):
    site = make_site(Limits(total_body_bytes=200))
    assert is_error(site.chat(user="a" * 200), 429, code="rate_limit_exceeded")
    assert site.chat().status_code == 200  # the bytes of finished requests do not count


def test_prompts(site):
    image = {"type": "image_url", "image_url": {"url": "bad"}}
    ask = lambda content: site.chat(messages=[{"role": "user", "content": content}])  # noqa: E731
    assert is_error(ask([image]), 400, "messages[0].content[0].image_url.url")
    for length in (stand_ins.CONTEXT, 2000):
        assert is_error(ask("a" * length), 400, "messages", "context_length_exceeded")
    assert ask("a" * (stand_ins.CONTEXT - 1)).json()["usage"]["completion_tokens"] == 1


def test_images_of_a_refused_request_are_not_waited_for(make_site, monkeypatch):
    """Neither if another one is bad, nor if the request's time has ended."""
    cancelled = []

    async def load(self, url, param, images):
        try:
            if url == "bad":
                await asyncio.sleep(0)
                raise ApiError(400, "The image is damaged.", param)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(url)
            raise

    monkeypatch.setattr(stand_ins.FakeMedia, "load", load)
    ask = lambda site, *urls: site.chat(messages=[{"role": "user", "content": [  # noqa: E731
        {"type": "image_url", "image_url": {"url": url}} for url in urls]}])
    assert is_error(ask(make_site(), "one", "bad", "two"), 400, "messages[0].content[1].image_url.url")
    assert is_error(ask(make_site(Limits(request_seconds=0.05)), "three"), 503, code="deadline_exceeded")
    assert cancelled == ["one", "two", "three"]


@pytest.mark.parametrize("turns", range(4))
def test_a_client_that_leaves_before_its_answer_is_submitted(monkeypatch, turns):
    """No turn of the event loop is one in which nobody notices."""
    site, messages = Site(), [{"type": "http.request", "body": json.dumps(HELLO).encode()}]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json")]}

    async def run():
        left = asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def prepare(self, chat):
            await asyncio.sleep(0)
            left.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            return [], np.arange(3)

        async def send(message):
            pass

        monkeypatch.setattr(app_module.ChatServer, "_prepare", prepare)
        await site.app(scope, receive, send)

    asyncio.run(run())
    assert all(job.cancelled.is_set() for job in site.scheduler.jobs)


def test_a_full_queue(site):
    site.scheduler.full = True
    response = site.chat()
    assert is_error(response, 429, code="rate_limit_exceeded") and response.headers["retry-after"] == "7"


def test_ignored_fields(site):
    assert site.chat(best=1, user="u").headers["x-ignored-fields"] == "best"
    assert "x-ignored-fields" not in site.chat().headers


def test_start_and_end(site):
    site.scheduler.ready = False
    site.status.report(2, 9, "decode")
    response = site.client.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "warming up", "done": 2, "total": 9, "stage": "decode"}
    assert is_error(site.chat(), 503, code="warming_up") and site.chat().headers["retry-after"] == "5"
    site.scheduler.ready = True
    assert site.client.get("/ready").status_code == 200
    site.status.draining = True
    assert site.client.get("/ready").json()["status"] == "draining"
    assert is_error(site.chat(), 503, code="shutting_down") and site.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/base", "/page.js"])
def test_every_route_but_health_needs_the_key(make_site, tmp_path, monkeypatch, path):
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / "page.js").write_text("1")
    site = make_site(key="geheim-ü")
    basic = lambda user, key: "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()  # noqa: E731
    for wrong in ({}, {"authorization": ""}, {"authorization": "Bearer geheim"}, {"authorization": "geheim-ü"},
                  {"authorization": basic("", "x")}, {"authorization": "Basic !"}, {"authorization": "Bearer"},
                  {"authorization": basic("geheim-ü", "")}, {"authorization": "Digest geheim-ü"}):
        response = site.client.get(path, headers={name: value.encode() for name, value in wrong.items()})
        assert is_error(response, 401, code="invalid_api_key")
        assert response.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="llava_jax", charset="UTF-8"']
    for right in ("Bearer geheim-ü", "bearer geheim-ü", basic("me", "geheim-ü"), basic("", "geheim-ü")):
        assert site.client.get(path, headers={"authorization": right.encode()}).status_code == 200
    assert is_error(site.chat(), 401, code="invalid_api_key") and not site.llava.chats
    assert site.client.get("/health").status_code == 200


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:8000", 200), ("127.1.2.3", 200), ("[::1]:8000", 200),
    ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("", 403),
    ("localhost:8000/health?", 403), ("evil.example/v1/models", 403), ("127.0.0.1@evil.example", 403)])
def test_without_a_key_only_loopback_names_are_answered(make_site, host, status):
    assert make_site(loopback_only=True).client.get("/v1/models", headers={"host": host}).status_code == status


def test_the_page(make_site, tmp_path, monkeypatch):
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "index.html").write_text("<p>어")
    (tmp_path / "examples" / "1.jpg").write_bytes(b"jpeg")
    (tmp_path / "secret.py").write_text("")
    site = make_site()
    response = site.client.get("/")
    assert response.text == "<p>어" and response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert site.client.get("/examples/1.jpg").content == b"jpeg"
    assert is_error(site.client.get("/secret.py"), 404)


def test_metrics(site):
    site.chat()
    site.client.get("/x%0A%22%7B%7D")
    text = site.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['llava_jax_http_requests_total{route="/v1/chat/completions",status="200"}'] == "1"
    assert values['llava_jax_http_requests_total{route="other",status="404"}'] == "1"
    assert values["llava_jax_slots"] == "3" and values['llava_jax_token_seconds_bucket{le="+Inf"}'] == "0"


def test_the_log_has_nothing_that_a_client_sent(site, caplog):
    caplog.set_level(logging.INFO)
    response = site.chat({"x-request-id": "abc-1"}, user="PRIVATE")
    site.chat({"x-request-id": "a b PRIVATE"}, messages=[{"role": "user", "content": "PRIVATE"}])
    site.client.get("/PRIVATE?PRIVATE=1", headers={"authorization": "Bearer PRIVATE"})
    site.client.request("PRIVATE", "/version")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("llava_jax")]
    assert len(lines) == 4 and "PRIVATE" not in "".join(lines)
    assert lines[0].startswith(response.headers["x-request-id"] + " POST /v1/chat/completions 200 prompt 5 answer 5 ")
    assert lines[0].endswith(" ms client's id abc-1") and lines[2].split()[1:4] == ["-", "other", "404"]


def test_a_failure_is_told_by_the_id_alone(site, caplog):
    site.llava.encode_chat = lambda *_: 1 / 0
    response = site.chat()
    assert is_error(response, 500)
    assert "division" not in response.text and response.headers["x-request-id"] in response.text
    assert "ZeroDivisionError" in caplog.text and response.headers["x-request-id"] in caplog.text


def test_finished_requests_are_freed(site):
    site.chat(n=2)
    with contextlib.suppress(openai.APIError):
        list(site.openai.chat.completions.create(**HELLO, stream=True))
    site.scheduler.jobs.clear()
    site.scheduler.ended.clear()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ in ("Answers", "Job")]
