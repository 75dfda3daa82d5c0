"""Requests are checked field by field: the right status, code and field for each mistake."""

import json

import pytest

from llava_jax.serve.errors import ApiError
from llava_jax.serve.limits import Limits
from llava_jax.serve.protocol import MAX_VALUES, ignored_header, parse_chat, parse_json

LIMITS = Limits()
HELLO = [{"role": "user", "content": "Hello"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def parse(**fields):
    return parse_chat({"model": "m", "messages": HELLO} | fields, LIMITS)


def test_defaults():
    chat = parse()
    assert (chat.temperature, chat.top_p, chat.n, chat.stop, chat.stream, chat.logprobs) == (0, 1, 1, (), False, None)
    assert chat.max_tokens is None and not chat.include_usage and chat.ignored == () and chat.images == []
    assert parse().seed != parse().seed  # drawn for each request


def test_values():
    chat = parse(max_tokens=5, max_completion_tokens=7, temperature=1, top_p=0, n=4, stop="a", seed=-(2**63),
                 stream=True, stream_options={"include_usage": True, "other": 1}, logprobs=True,
                 top_logprobs=20, user="u", best=1)
    assert chat.max_tokens == 7 and chat.temperature == 1 and 0 < chat.top_p < 1e-3 and chat.n == 4
    assert chat.stop == ("a",) and chat.seed == -(2**63) and chat.include_usage and chat.logprobs == 20
    assert chat.ignored == ("best",)
    assert parse(max_tokens=10**1000).max_tokens == 10**1000  # clamped to the context later
    assert parse(stream_options={"include_usage": True}).include_usage is False


def test_neutral_values_of_unsupported_fields():
    parse(tools=None, tool_choice="none", response_format={"type": "text"}, frequency_penalty=0.0, logit_bias={},
          modalities=["text"], guided_json=None, top_k=-1)


@pytest.mark.parametrize("fields, param", [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": HELLO * 257}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
    ({"messages": user("a")}, "messages[0].content[0]"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0].text"),
    ({"messages": user({"type": "input_audio"})}, "messages[0].content[0].type"),
    ({"messages": user({"type": "image"})}, "messages[0].content[0].type"),
    ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url"),
    ({"messages": user({"type": "image_url", "image_url": {}})}, "messages[0].content[0].image_url.url"),
    ({"messages": user({"type": "image_url", "image_url": {"url": 3}})}, "messages[0].content[0].image_url.url"),
    ({"messages": user(*[PICTURE] * 9)}, "messages[0].content[8]"),
    ({"messages": [{"role": "system", "content": [PICTURE]}, *HELLO]}, "messages[0].content[0]"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ({"messages": [*HELLO, {"role": "system", "content": "a"}]}, "messages[1]"),
    ({"messages": [{"role": "assistant", "content": "a"}, *HELLO]}, "messages[0]"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages[1]"),
    ({"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]}, "messages[1].content"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a", "audio": {"id": 1}}, *HELLO]}, "messages[1].audio"),
    ({"model": 3}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": "7"}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": False}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 1.0}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": [None]}, "stop[0]"),
    ({"stop": ["a", "b" * 65]}, "stop[1]"),
    ({"stop": ["a"] * 100_000}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.1}, "frequency_penalty"),
    ({"frequency_penalty": False}, "frequency_penalty"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"guided_regex": "(a+)+"}, "guided_regex"),
    ({"guided_\ud800": 1}, "guided_"),
    ({"logit_bias": {"32000": 100}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
])
def test_mistakes(fields, param):
    with pytest.raises(ApiError) as error:
        parse(**fields)
    assert (error.value.status, error.value.param) == (400, param)
    json.dumps(error.value.body()).encode()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"3", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": \xff}', '{"a": 1}'.encode("utf-16"),
    b'{"a":' * 100_000, b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"[" + b"0," * MAX_VALUES + b"0]", b"{} {}",
])
def test_bodies_that_are_no_json_object(body):
    with pytest.raises(ApiError) as error:
        parse_json(body)
    assert error.value.status == 400


def test_the_last_of_two_equal_names_counts():
    assert parse_json(b'{"n": 1, "n": 2}') == {"n": 2}


def test_adjacent_messages_of_one_role_are_joined():
    chat = parse(messages=[
        {"role": "system", "content": "a"}, {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "user", "content": [PICTURE, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e"}, {"role": "user", "content": [PICTURE]}])
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert chat.messages[1]["content"] == [{"type": "text", "text": "c"}, {"type": "image"},
                                           {"type": "text", "text": "d"}]
    url = PICTURE["image_url"]["url"]
    assert chat.images == [(url, "messages[3].content[0].image_url.url"), (url, "messages[5].content[0].image_url.url")]


def test_a_url_without_an_object():
    assert parse(messages=user({"type": "image_url", "image_url": "data:,"})).images == [
        ("data:,", "messages[0].content[0].image_url")]


def test_names_that_are_unsafe_in_a_header_are_counted():
    assert ignored_header(["a", "b\r\nset-cookie: c", "d" * 100, "top_a"]) == "a, top_a, 2 more"
