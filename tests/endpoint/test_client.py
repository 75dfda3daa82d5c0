import asyncio
import gzip
import re

import pytest
from fake_openai import FakeOpenAI, Response, error
from virtual_time import run

from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.client import MAX_ANSWER_BYTES, RATE_LIMIT_PATIENCE, Endpoint, read_key
from llava_jax.endpoint.errors import EndpointStopped, NotSentError, RequestFailed
from llava_jax.endpoint.request import ChatRequest
from llava_jax.errors import UserError

openai = pytest.importorskip("openai")

URL = "http://127.0.0.1:9/v1"


def request(i: int = 0, **parameters) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": f"question {i}"},), parameters)


def asked(fake: FakeOpenAI, *requests: ChatRequest, **options):
    """Replies, one request after another, with the seconds that all took and the endpoint."""

    async def main():
        async with Endpoint("teacher", URL, transport=fake.transport(), **options) as endpoint:
            replies = [await endpoint.ask(one) for one in requests]
            return replies, asyncio.get_running_loop().time(), endpoint

    return run(main())


def checked(fake: FakeOpenAI, model: str = "teacher", **options) -> list[str]:
    async def main():
        async with Endpoint(model, URL, transport=fake.transport(), **options) as endpoint:
            return await endpoint.check()

    return run(main())


def once(fault: str):
    return lambda number: fault if number == 0 else None


def test_a_reply():
    fake = FakeOpenAI(answer=lambda messages: messages[-1]["content"].upper())
    (reply,), seconds, _ = asked(fake, request(3, max_completion_tokens=9, top_k=4))
    assert reply.text == "QUESTION 3" and reply.finish_reason == "stop" and seconds < 0.1
    assert reply.model == "teacher-2026-06-01" and reply.fingerprint == "fp_fake" and reply.created > 1.7e9
    assert reply.completion_tokens == 3 and reply.cached_tokens == reply.prompt_tokens // 2 > 0 and not reply.batch
    assert fake.bodies == [{"model": "teacher", "messages": [{"role": "user", "content": "question 3"}],
                            "max_completion_tokens": 9, "top_k": 4}]


@pytest.mark.parametrize("fault, least, most", [
    ("429", 2, 2.01), ("429-ms", 1.5, 1.51), ("429-date", 1.9, 3.01), ("429-bare", 0.5, 1), ("500", 0.5, 1),
    ("502", 0.5, 1), ("drop", 0.5, 1), ("nonsense", 0.5, 1), ("error200", 0.5, 1), ("slow", 1, 1.01),
    ("never", 30.5, 31.01),
])
def test_what_passes_is_waited_for(fault, least, most):
    fake = FakeOpenAI(faults=once(fault))
    (reply,), seconds, _ = asked(fake, request(), timeout=30)
    assert reply.text.startswith("answer to") and least <= seconds <= most
    assert sum(fake.paid.values()) == 1


def test_truncated_filtered_and_empty_answers_are_answers():
    for fault, reason in (("length", "length"), ("filter", "content_filter"), ("empty", "stop")):
        (reply,), _, _ = asked(FakeOpenAI(faults=once(fault)), request())
        assert reply.finish_reason == reason and (fault == "length" or reply.text == "")


@pytest.mark.parametrize("fault, words", [("500", "500: The server had an error"), ("502", "502: 502 Bad Gateway"),
                                          ("never", "no answer within 30 s"), ("drop", "disconnected"),
                                          ("nonsense", "no chat completion"), ("error200", "Provider returned")])
def test_tries_are_bounded(fault, words):
    fake = FakeOpenAI(faults=lambda number: fault)
    with pytest.raises(RequestFailed) as failure:
        asked(fake, request(), timeout=30, retries=4)
    assert failure.value.reason == "no_answer" and "after 5 tries" in failure.value.detail
    assert words in failure.value.detail and fake.refused[fault] == 5


def test_too_many_requests_are_waited_for_as_long_as_others_get_answers():
    """One answer in ten tries: more refusals for each than it has retries."""
    fake = FakeOpenAI(faults=lambda number: None if number % 10 == 9 else "429-bare")

    async def main():
        async with Endpoint("teacher", URL, transport=fake.transport(), retries=2) as endpoint:
            return await asyncio.gather(*(endpoint.ask(request(i)) for i in range(10)))

    assert len(run(main())) == 10 and max(fake.paid.values()) == 1


def test_too_many_requests_without_an_answer_to_anybody_end():
    async def main():
        fake = FakeOpenAI(faults=lambda number: "429-bare")
        async with Endpoint("teacher", URL, transport=fake.transport()) as endpoint:
            with pytest.raises(RequestFailed, match="429: Rate limit"):
                await endpoint.ask(request())
        return asyncio.get_running_loop().time()

    assert RATE_LIMIT_PATIENCE < run(main()) < RATE_LIMIT_PATIENCE + 61


@pytest.mark.parametrize("refused, fourth", [(3, 2.0), (2, 0.5)])
def test_retry_after_holds_for_all_when_several_are_refused_in_a_row(refused, fourth):
    async def main():
        fake = FakeOpenAI(faults=lambda number: "429" if number < refused else None)
        async with Endpoint("teacher", URL, transport=fake.transport()) as endpoint:
            first = [asyncio.create_task(endpoint.ask(request(i))) for i in range(refused)]
            await asyncio.sleep(0.5)
            await endpoint.ask(request(refused))
            await asyncio.gather(*first)
        return fake.times

    times = run(main())
    assert times[refused] == pytest.approx(fourth, abs=0.1) and len(times) == 2 * refused + 1
    assert times[refused - 1] < 0.1 and times[-1] == pytest.approx(2, abs=0.1)


def test_a_wait_of_hours_ends_the_run():
    with pytest.raises(EndpointStopped, match="asks to wait 2.0 hours"):
        asked(FakeOpenAI(faults=once("429-hours")), request())


@pytest.mark.parametrize("fault, reason", [("context", "context_length")])
def test_what_no_retry_mends(fault, reason):
    fake = FakeOpenAI(faults=lambda number: fault)
    with pytest.raises(RequestFailed) as failure:
        asked(fake, request())
    assert failure.value.reason == reason and fake.refused[fault] == 1


def test_an_exhausted_quota_ends_the_run():
    with pytest.raises(EndpointStopped, match="quota is used up: You exceeded"):
        asked(FakeOpenAI(faults=once("quota")), request())


def test_a_wrong_key_ends_the_run_and_is_not_shown():
    fake = FakeOpenAI(key="right")
    with pytest.raises(EndpointStopped, match="refuses the API key") as refused:
        asked(fake, request(), api_key="wrong-secret")
    assert "wrong-secret" not in str(refused.value)
    with pytest.raises(EndpointStopped, match="wants an API key"):
        asked(fake, request())
    assert asked(fake, request(), api_key="right")[0][0].text


@pytest.mark.parametrize("style", ["openai", "pydantic", "plain"])
def test_refused_parameters_are_left_out_once_for_all(style):
    fake = FakeOpenAI(refuses=("temperature", "seed"), refusal=style)
    requests = [request(i, temperature=0.2, seed=1, top_p=0.5) for i in range(3)]
    _, seconds, endpoint = asked(fake, *requests)
    assert fake.refused == {"temperature": 1, "seed": 1} and seconds < 0.1
    assert [set(body) for body in fake.bodies] == [{"model", "messages", "top_p"}] * 3
    assert len(endpoint.notes) == 2 and "teacher refuses temperature: left out" in endpoint.notes[0]


def test_refusals_of_many_in_flight_are_one():
    class Slow(FakeOpenAI):
        async def _chat(self, body):
            await asyncio.sleep(1)
            return await super()._chat(body)

    async def main():
        fake = Slow(refuses=("temperature",))
        async with Endpoint("teacher", URL, transport=fake.transport()) as endpoint:
            await asyncio.gather(*(endpoint.ask(request(i, temperature=0)) for i in range(20)))
        return endpoint.notes, fake

    notes, fake = run(main())
    assert len(notes) == 1 and len(fake.paid) == 20


@pytest.mark.parametrize("style", ["openai", "pydantic", "plain"])
@pytest.mark.parametrize("old, new", [("max_completion_tokens", "max_tokens"), ("max_tokens", "max_completion_tokens")])
def test_the_limit_of_tokens_is_renamed(style, old, new):
    fake = FakeOpenAI(refuses=(old,), refusal=style)
    _, _, endpoint = asked(fake, request(0, **{old: 50}), request(1, **{old: 60}))
    assert [body[new] for body in fake.bodies] == [50, 60] and fake.refused == {old: 1}
    assert "sent as " + new in endpoint.notes[0]


def test_the_limit_of_tokens_is_never_left_out():
    fake = FakeOpenAI(refuses=("max_tokens", "max_completion_tokens"))
    with pytest.raises(EndpointStopped, match="refuses both"):
        asked(fake, request(0, max_completion_tokens=50))
    assert not fake.paid


@pytest.mark.parametrize("words, code, param", [
    ("max_completion_tokens is too large: 99999. This model supports at most 16384.", "invalid_value", "max_tokens"),
    ("Invalid 'temperature': decimal above maximum value.", "decimal_above_max_value", "temperature"),
    ("'temperature' must be a number", None, None),
    ("Unsupported content in messages", None, None),
])
def test_a_refused_value_is_no_refused_parameter(words, code, param):
    class Strict(FakeOpenAI):
        async def _chat(self, body):
            return error(400, words, code, param)

    with pytest.raises(RequestFailed) as failure:
        asked(Strict(), request(0, temperature=9, max_completion_tokens=99999))
    assert failure.value.reason == "bad_request" and failure.value.detail == f"400: {words}"


def test_rates_are_kept_at_the_server():
    """The fake refuses what passes its limit in any minute: nothing is refused, and the limit is reached."""
    fake = FakeOpenAI(requests_per_minute=300, latency=4, answer=lambda messages: "x" * 400)

    async def main():
        async with Endpoint("teacher", URL, transport=fake.transport(), requests_per_minute=300) as endpoint:
            gate = asyncio.Semaphore(50)

            async def one(i: int) -> None:
                async with gate:
                    await endpoint.ask(request(i))

            await asyncio.gather(*(one(i) for i in range(1500)))
        return asyncio.get_running_loop().time()

    seconds = run(main())
    assert fake.refused["rate"] == 0 and 1500 / (seconds - 4) * 60 >= 0.985 * 300


def test_who_waits_for_another_try_is_told_to_stop():
    async def main():
        cancel, fake = CancelToken(), FakeOpenAI(faults=lambda number: "500")
        async with Endpoint("teacher", URL, transport=fake.transport(), cancel=cancel) as endpoint:
            asyncio.get_running_loop().call_later(0.2, cancel.request)
            with pytest.raises(NotSentError):
                await endpoint.ask(request())
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(0.2)


def test_check_pays_nothing():
    fake = FakeOpenAI(faults=lambda number: pytest.fail("a chat was asked"))
    assert checked(fake) == [] and not fake.paid


def test_check_warns_of_shutdowns():
    fake = FakeOpenAI(models={"teacher": {"shutdown_date": "2999-01-14"}, "old": {"shutdown_date": "2020-01-01"}})
    assert checked(fake) == ["teacher shuts down on 2999-01-14: a later run cannot go on with it"]
    assert "old was to shut down on 2020-01-01" in checked(fake, "old")[0]


@pytest.mark.parametrize("model, names", [("teachr", "it has teacher"), ("zzz", "it has a-model, teacher")])
def test_check_names_models(model, names):
    with pytest.raises(UserError, match=f"has no model '{model}'; {names}"):
        checked(FakeOpenAI(models={"teacher": {}, "a-model": {}}), model)


def test_check_finds_a_key_missing_or_refused():
    with pytest.raises(UserError, match="wants an API key: set OPENAI_API_KEY or --api-key-env"):
        checked(FakeOpenAI(key="right"))
    with pytest.raises(UserError, match="refuses the API key"):
        checked(FakeOpenAI(key="right"), api_key="wrong")
    with pytest.raises(UserError, match="OpenAI wants an API key"):
        Endpoint("teacher")


def test_check_without_a_list_of_models():
    assert checked(FakeOpenAI(models=None)) == []

    class Knowing(FakeOpenAI):
        async def _chat(self, body):
            return error(404, f"The model `{body['model']}` does not exist", "model_not_found")

    with pytest.raises(UserError, match="has no model 'other': The model `other` does not exist"):
        checked(Knowing(models=None), "other")


def test_check_finds_what_is_no_chat_api():
    with pytest.raises(UserError, match="no chat API answers there$"):
        checked(FakeOpenAI(chat=False))

    class Site(FakeOpenAI):
        async def respond(self, method, path, headers, body):
            return Response(200, b"<html>hello</html>", "text/html")

    with pytest.raises(UserError, match="no chat API answers there$"):
        checked(Site())

    async def main():
        async with Endpoint("teacher", URL[:-3], transport=FakeOpenAI().transport()) as endpoint:
            await endpoint.check()

    with pytest.raises(UserError, match="no chat API answers there .do its addresses begin with /v1"):
        run(main())


def test_check_of_an_address_where_nothing_is():
    class Nothing(FakeOpenAI):
        async def respond(self, method, path, headers, body):
            raise openai._base_client.httpx2.ConnectError("All connection attempts failed")

    with pytest.raises(UserError, match=re.escape(URL) + ": after 3 tries: Connection error. .All connection att"):
        checked(Nothing())
    for url in ("localhost:8000", "ftp://x", "http://", "http://[::1/v1", "http://a:99999/v1", "http://a:b/v1"):
        with pytest.raises(UserError, match="not the address of an API"):
            Endpoint("teacher", url)


def test_read_key(monkeypatch):
    monkeypatch.setenv("A_KEY", " sk-abc\n")
    assert read_key("A_KEY") == "sk-abc"
    monkeypatch.setenv("A_KEY", "sk abc")
    with pytest.raises(UserError, match="A_KEY holds no API key"):
        read_key("A_KEY")
    monkeypatch.delenv("A_KEY")
    assert read_key("A_KEY") is None
    with pytest.raises(UserError, match="A_KEY is not set"):
        read_key("A_KEY", required=True)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UserError, match=re.escape("pip install 'llava_jax[teacher]'")):
        Endpoint("teacher", URL)


class Always(FakeOpenAI):
    """Answers everything with the same."""

    def __init__(self, response: Response):
        super().__init__()
        self.response = response

    async def respond(self, *request) -> Response:
        return self.response


def test_compressed_blanks_without_end_are_no_answer_and_counted():
    bomb = Response(200, gzip.compress(b" " * (MAX_ANSWER_BYTES + 1)), headers={"content-encoding": "gzip"})
    lost = []

    async def main():
        async with Endpoint("teacher", URL, transport=Always(bomb).transport(), retries=0) as endpoint:
            with pytest.raises(RequestFailed, match="more than 16,777,216 bytes"):
                await endpoint.ask(request(), lambda came: lost.append(came) or True)

    run(main())
    assert lost == [MAX_ANSWER_BYTES + 1]


def test_what_cannot_be_sent_is_not_tried():
    lost = []

    async def main():
        async with Endpoint("teacher", URL, transport=FakeOpenAI().transport()) as endpoint:
            with pytest.raises(RequestFailed, match="bad_request: .*half of a surrogate pair"):
                await endpoint.ask(ChatRequest(({"role": "user", "content": "a\ud800b"},)), lost.append)

    run(main())
    assert not lost


def test_json_without_end_is_no_chat_api():
    with pytest.raises(UserError, match="no chat API answers there"):
        checked(Always(Response(200, b"[" * 200_000)))
