"""Rows as LLaVA writes them and as people break them."""

import pickle

import pytest

from llava_jax.data.records import REASONS, BadRow, Record, parse_row

ASK, ANSWER = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
TEXT_ONLY = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def test_llava_row():
    row = {"id": "000000033471", "image": "coco/1.jpg", "conversations": [ASK, ANSWER], "model": "ignored"}
    assert parse_row(row, "data.json, row 7") == Record(
        "000000033471", ("coco/1.jpg",), (ASK, ANSWER), "data.json, row 7, id 000000033471"
    )


IMAGES = [("1.jpg", 1), (["1.jpg"], 1), (["1.jpg", "2.jpg"], 2), (None, 0), ("", 0), ([], 0)]


@pytest.mark.parametrize("value, images", IMAGES)
def test_image_is_a_path_a_list_or_absent(value, images):
    turns = [{"from": "human", "value": "<image>" * images + "So?"}, ANSWER]
    assert len(parse_row({"id": 1, "image": value, "conversations": turns}, "here").images) == images


def test_absent_image_and_id():
    assert parse_row({"conversations": TEXT_ONLY}, "here") == Record("", (), tuple(TEXT_ONLY), "here")
    assert parse_row({"id": 12, "conversations": TEXT_ONLY}, "here").id == "12"


@pytest.mark.parametrize("value", ["<image>\nSo?", "So?\n<image>", "This <image> here?", "<image>"])
def test_image_anywhere_in_the_turn(value):
    turns = [{"from": "human", "value": value}, ANSWER]
    assert parse_row({"id": 1, "image": "1.jpg", "conversations": turns}, "here").turns == tuple(turns)


def test_several_images_over_several_turns():
    turns = [ASK, ANSWER, {"from": "human", "value": "And <image> or <image>?"}, ANSWER]
    assert parse_row({"image": ["1", "2", "3"], "conversations": turns}, "here").images == ("1", "2", "3")


def test_sharegpt_rows_may_open_with_an_answer():
    turns = [ANSWER, {"from": "human", "value": "Hello"}, ANSWER]
    assert parse_row({"id": "x_0", "conversations": turns}, "here").turns == tuple(turns)


def turn(role, value="Hello"):
    return {"from": role, "value": value}


@pytest.mark.parametrize(
    "row, reason, says",
    [
        ([1], "malformed", "must be an object, not a list"),
        ({"id": 1.5, "conversations": TEXT_ONLY}, "malformed", "id must be text or a whole number"),
        ({"id": True, "conversations": TEXT_ONLY}, "malformed", "id must be text or a whole number"),
        ({"id": 1, "image": 5, "conversations": [ASK, ANSWER]}, "malformed", "a path or a list of paths, not a number"),
        ({"id": 1, "image": ["a", None], "conversations": [ASK, ANSWER]}, "malformed", "image must be"),
        ({"id": 1, "image": {"path": "a"}, "conversations": [ASK, ANSWER]}, "malformed", "not an object"),
        ({"id": 1}, "malformed", "conversations must be a list of turns, not nothing"),
        ({"id": 1, "conversations": []}, "malformed", "conversations must be a list of turns, not empty"),
        ({"id": 1, "conversations": "hello"}, "malformed", "not text"),
        ({"id": 1, "conversations": ["hello"]}, "malformed", "turn 1 must be an object"),
        ({"id": 1, "conversations": [turn("human"), turn("gpt", None)]}, "malformed", "turn 2 must be an object"),
        ({"id": 1, "conversations": [turn("human"), {"value": "x"}]}, "malformed", "turn 2 is from None"),
        ({"id": 1, "conversations": [turn("user"), turn("gpt")]}, "malformed", "turn 1 is from 'user'"),
        ({"id": 1, "conversations": [turn("human"), turn(["gpt"])]}, "malformed", r"turn 2 is from \['gpt'\]"),
        ({"id": 1, "conversations": [turn("human"), turn("human")]}, "malformed", "1 and 2 are both from 'human'"),
        ({"id": 1, "image": "a", "conversations": TEXT_ONLY}, "image_count", "1 images, but 0 times <image>"),
        ({"id": 1, "conversations": [ASK, ANSWER]}, "image_count", "0 images, but 1 times <image>"),
        ({"id": 1, "image": ["a", "b"], "conversations": [ASK, ANSWER]}, "image_count", "2 images, but 1 times"),
    ],
)  # fmt: skip
def test_bad_rows_say_where_and_why(row, reason, says):
    with pytest.raises(BadRow, match=says) as raised:
        parse_row(row, "data.json, row 3")
    assert raised.value.reason == reason and reason in REASONS
    assert str(raised.value).startswith("data.json, row 3") and "\n" not in str(raised.value)
    if isinstance(row, dict) and row["id"] == 1 and row["id"] is not True:
        assert "id 1" in str(raised.value)


def test_bad_row_crosses_processes_unchanged():
    copy = pickle.loads(pickle.dumps(BadRow("too_long", "data.json, row 3: too long")))
    assert isinstance(copy, BadRow) and (copy.reason, str(copy)) == ("too_long", "data.json, row 3: too long")
