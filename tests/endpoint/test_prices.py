import json

import pytest

from llava_jax.endpoint.prices import Price, load_price
from llava_jax.endpoint.request import Response


def reply(**fields) -> Response:
    return Response(**{"text": "", "finish_reason": "stop", "prompt_tokens": 0, "cached_tokens": 0,
                    "completion_tokens": 0, "model": "m", "fingerprint": None, "created": 0} | fields)


def test_cost():
    price = Price(prompt=2.0, completion=10.0, cached=0.5, batch=0.5)
    full = reply(prompt_tokens=3_000_000, cached_tokens=1_000_000, completion_tokens=200_000)
    assert price.cost(full) == pytest.approx(2 * 2.0 + 1 * 0.5 + 0.2 * 10)
    batched = reply(prompt_tokens=3_000_000, cached_tokens=1_000_000, completion_tokens=200_000, batch=True)
    assert price.cost(batched) == pytest.approx(6.5 / 2)
    assert price.of(1e6, 1e6) == pytest.approx(12)


def test_load(tmp_path):
    path = tmp_path / "prices.json"
    table = {"a": {"prompt": 1, "completion": 4}, "b": {"prompt": 0, "completion": 0, "batch": 0.5}}
    path.write_text(json.dumps(table))
    assert load_price(str(path), "a") == Price(1, 4, cached=1, batch=1)
    assert load_price(str(path), "b") == Price(0, 0, cached=0, batch=0.5)


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"), ("[]", "must be an object, and is a list"), ('{"b": {}}', "no prices of 'a'; it has b"),
    ('{"a": {"prompt": 1}}', "'completion' is missing"), ('{"a": {"prompt": -1, "completion": 1}}', "prompt is -1"),
    ('{"a": {"prompt": "1", "completion": 1}}', "prompt is '1'"), ('{"a": {"input": 1}}', "unknown field 'input'"),
    ('{"a": 3}', "a: must be an object of prices, and is a number"), ("{}", "no prices of 'a'; it has none"),
    (json.dumps({f"b{i}": {} for i in range(1010)}), "it has b0, b1, b2, b3, b4, b5, b6, b7, b8, b9 and 1,000 more"),
    ('{"a": {"prompt": NaN, "completion": 1}}', "prompt is nan"), ('{"a": {"prompt": true}}', "prompt is True"),
])
def test_mistakes_name_file_model_and_field(tmp_path, text, message):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_price(str(path), "a")
    assert str(error.value).startswith(str(path)) and message in str(error.value)
