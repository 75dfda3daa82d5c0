import hashlib
import json
import time

import pytest

from llava_jax.endpoint.request import BYTES_PER_IMAGE, ChatRequest, Response, parse_response
from llava_jax.errors import UserError

ASK = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was ist das – ein Hund?"})


def test_key_is_the_digest_of_canonical_json():
    request = ChatRequest(ASK, {"temperature": 0.2, "max_completion_tokens": 10})
    text = ('{"messages":[{"content":"Be brief.","role":"system"},'
            '{"content":"Was ist das \\u2013 ein Hund?","role":"user"}],'
            '"model":"m","parameters":{"max_completion_tokens":10,"temperature":0.2}}')
    assert request.key("m") == hashlib.sha256(text.encode()).hexdigest()
    again = ChatRequest(ASK, {"temperature": 0.2, "max_completion_tokens": 10}, attempt=1)
    text = '{"attempt":1,' + text[1:]
    assert again.key("m") == hashlib.sha256(text.encode()).hexdigest()


def test_key_tells_apart_all_that_matters():
    base = ChatRequest(ASK, {"a": 1, "b": 2})
    assert base.key("m") == ChatRequest(tuple(dict(reversed(m.items())) for m in ASK), {"b": 2, "a": 1}).key("m")
    others = [ChatRequest(ASK[::-1], {"a": 1, "b": 2}), ChatRequest(ASK, {"a": 1}),
              ChatRequest(ASK, {"a": 1, "b": 2}, 1),
              ChatRequest(ASK[:1], {"a": 1, "b": 2}), ChatRequest((*ASK, ASK[0]), {"a": 1, "b": 2})]
    keys = {base.key("m"), base.key("n"), *(other.key("m") for other in others)}
    assert len(keys) == 2 + len(others)


def test_text_that_is_no_utf8_has_a_key():
    assert len(ChatRequest(({"role": "user", "content": "\ud800"},)).key("m")) == 64


@pytest.mark.parametrize("name", ["model", "messages", "stream", "n"])
def test_parameters_that_are_not_the_callers(name):
    with pytest.raises(UserError, match=name):
        ChatRequest(ASK, {name: 1})


def test_bytes_and_limit():
    parts = [{"type": "text", "text": "äb"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert ChatRequest(({"role": "user", "content": parts},)).bytes == 3 + BYTES_PER_IMAGE
    assert ChatRequest(ASK).bytes == len("Be brief.Was ist das – ein Hund?".encode())
    limits = {}, {"max_tokens": 3}, {"max_completion_tokens": 4}
    assert [ChatRequest(ASK, limit).max_tokens for limit in limits] == [None, 3, 4]


def test_read_reply():
    body = {"id": "x", "object": "chat.completion", "created": 7, "model": "m-2026", "system_fingerprint": "fp",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}
    assert parse_response(body, batch=True) == Response("hi", "stop", 9, 4, 2, "m-2026", "fp", 7, True)
    bare = json.loads(json.dumps(body))
    bare["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I won't."}
    bare |= {"usage": None, "system_fingerprint": None}
    assert parse_response(bare) == Response("I won't.", "stop", 0, 0, 0, "m-2026", None, 7)
    bare["choices"][0] |= {"message": {"content": None}, "finish_reason": "length"}
    assert parse_response(bare).text == "" and parse_response(bare).finish_reason == "length"


@pytest.mark.parametrize("body", [None, [], "x", {}, {"choices": []}, {"choices": [{}]}, {"choices": [3]},
                                  {"choices": [{"message": {"content": 5}}]}, {"choices": [{"message": None}]},
                                  {"choices": {"a": 1}}, {"choices": "text"}, {"choices": [{"text": "old API"}]},
                                  {"error": {"message": "no"}}])
def test_what_is_no_completion(body):
    with pytest.raises(UserError, match="no chat completion"):
        parse_response(body)


@pytest.mark.parametrize(("change", "expected"), [
    ({"usage": {"prompt_tokens": "many", "completion_tokens": 3}}, {"completion_tokens": 3}),
    ({"usage": {"prompt_tokens": -5, "completion_tokens": float("inf")}}, {}),
    ({"usage": {"prompt_tokens": float("nan"), "prompt_tokens_details": 3}}, {}),
    ({"usage": [1]}, {}),
    ({"usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}}},
     {"prompt_tokens": 5, "cached_tokens": 5}),
    ({"created": 7.5}, {"created": 7}),
    ({"system_fingerprint": {"a": 1}, "model": None}, {"fingerprint": "{'a': 1}", "model": ""}),
])
def test_a_text_that_was_paid_is_not_lost_for_odd_figures_beside_it(change, expected):
    body = {"created": 7, "model": "m", "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
    assert parse_response(body | change) == Response(**{
        "text": "hi", "finish_reason": "stop", "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0,
        "model": "m", "fingerprint": None, "created": 7, **expected})


@pytest.mark.parametrize("created", [None, -1, "now", 1e300, float("inf"), 1_790_000_000_000_000])
def test_an_answer_without_a_date_is_of_now(created):
    before = time.time()
    body = {"created": created, "choices": [{"message": {"content": "hi"}}]}
    assert int(before) <= parse_response(body).created <= time.time()


def test_content_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "reasoning"}, {"type": "text", "text": "b"}]
    assert parse_response({"choices": [{"message": {"content": parts}}]}).text == "ab"
    called = {"content": None, "tool_calls": [{"id": "1"}]}
    assert parse_response({"choices": [{"message": called}]}).text == ""
