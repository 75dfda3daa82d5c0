"""Rows as LLaVA writes them and as people break them."""

import base64
import itertools
import pickle
from pathlib import Path

import pytest

from llava_jax.data.records import REASONS, BadRow, Record, parse_row
from llava_jax.text.encode import encode_conversation, encode_prompt
from llava_jax.text.templates import read_messages
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.video import Video

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


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_roles_of_other_tools_and_a_system_text():
    later = {"role": "user", "content": "So?"}
    turns = [turn("system", "Be brief."), turn("user"), turn("ChatGPT"), later, turn("model")]
    read = parse_row({"conversations": turns}, "here").turns
    assert [t["from"] for t in read] == ["system", "human", "gpt", "human", "gpt"] and read[3]["value"] == "So?"
    row = {"system": "Be brief.", "messages": [{"role": r, "content": "Hello"} for r in ("user", "assistant")]}
    assert parse_row(row, "here").turns == (turn("system", "Be brief."), turn("human"), turn("gpt"))


CLIP = Video("a.mp4")


@pytest.mark.parametrize("row, question, media", [
    ({"video": "a.mp4", "conversations": [ASK, ANSWER]}, "<image>\nWhat is it?", (CLIP,)),  # LLaVA-Video
    ({"video": ["a.mp4"], "conversations": [turn("human", "<video>So?"), ANSWER]}, "<image>So?", (CLIP,)),
    ({"videos": ["a.mp4", {"path": "b.mp4"}], "images": ["1.jpg"],  # ms-swift
      "messages": [user("<video><image>So <video>?"), {"role": "assistant", "content": "A <video> tag."}]},
     "<image><image>So <image>?", (CLIP, "1.jpg", Video("b.mp4"))),
    ({"messages": [user({"type": "text", "text": "So?"}, {"type": "video", "video": "a.mp4"})]},
     "So?\n<image>", (CLIP,)),
    ({"images": ["1.jpg"], "messages": [user({"type": "video_url", "video_url": {"url": "file://a.mp4"}},
                                             {"type": "image"}, "So?")]}, "<image>\n<image>\nSo?", (CLIP, "1.jpg")),
    ({"videos": ["a.mp4"], "messages": [user({"type": "video"}, "So?")]}, "<image>\nSo?", (CLIP,)),
])  # fmt: skip
def test_a_video_has_a_mark_as_an_image_has(row, question, media):
    if "messages" in row:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": "A <video> tag."}][:2]
    record = parse_row(row, "here")
    assert record.images == media and record.turns[0]["value"] == question
    assert record.unknown == () and "<image>" not in record.turns[1]["value"]


def test_columns_are_turns_too():
    """As Arrow and TFDS hold a list of objects."""
    row = {"conversations": {"from": ["human", "gpt"], "value": ["Hello", "Hi"]}}
    assert parse_row(row, "here").turns == tuple(TEXT_ONLY)


DATA_URL = "data:image/png;base64," + base64.b64encode(b"png").decode()


@pytest.mark.parametrize("part, image", [
    ({"type": "image_url", "image_url": {"url": DATA_URL}}, b"png"),
    ({"type": "image_url", "image_url": DATA_URL}, b"png"),
    ({"type": "image_url", "image_url": {"url": "data:image/svg,%3Csvg"}}, b"<svg"),
    ({"type": "image", "path": "own.jpg"}, "own.jpg"),
    ({"type": "image", "url": "own.jpg"}, "own.jpg"),
    ({"type": "image", "image": "own.jpg"}, "own.jpg"),
    ({"type": "image", "base64": "cG5n"}, b"png"),
    ({"type": "image", "image": {"bytes": b"png", "path": "a.png"}}, b"png"),
    ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
])  # fmt: skip
def test_parts_with_images_of_their_own(part, image):
    record = parse_row({"messages": [user({"type": "text", "text": "See"}, part), turn("gpt")]}, "here")
    assert record.images == (image,) and record.turns[0]["value"] == "See\n<image>"


@pytest.mark.parametrize("url", [
    "data:image/png;base64,+/+/YQ==", "DATA:image/png;BASE64,+/+/YQ", " data:image/png;charset=utf-8; base64, -_-_YQ==",
    "data:;base64,%2B%2F%2B%2FYQ%3D%3D", "data:;base64,+/+/\r\nYQ==\n", "data:,%FB%FF%BFa",
])  # fmt: skip
def test_data_urls_as_they_occur(url):
    assert parse_row({"image": url, "conversations": [ASK, ANSWER]}, "here").images == (b"\xfb\xff\xbfa",)


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}])
def test_empty_cells_are_no_images(cell):
    assert parse_row({"image": cell, "conversations": TEXT_ONLY}, "here").images == ()
    assert parse_row({"images": [cell, cell], "conversations": TEXT_ONLY}, "here").images == ()


def test_turns_with_the_keys_of_two_formats():
    turns = [{"from": "human", "value": "Hello", "role": "user"}, {"role": "assistant", "value": "Hi"}]
    assert parse_row({"conversations": turns}, "here").turns == tuple(TEXT_ONLY)
    assert parse_row({"messages": TEXT_ONLY, "system": "", "id": 3.0}, "here").turns == tuple(TEXT_ONLY)


def test_parts_are_read_as_when_a_model_is_asked():
    kinds = ["words", {"type": "text", "text": " a\n"}, {"type": "text", "text": ""}, {"type": "image", "path": "x"},
             {"type": "image_url", "image_url": {"url": "y"}}, {"type": "text", "text": "a <image> b"}]
    for parts in itertools.product(kinds, repeat=3):
        images = ["z"] * sum("<image>" in part.get("text", "") for part in parts if isinstance(part, dict))
        messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": ["yes", "no"]}]
        record = parse_row({"messages": messages, "images": images}, "here")
        assert [turn["value"] for turn in record.turns] == [text for _, text in read_messages(messages)[1]]


def test_an_empty_system_turn_is_read_as_when_a_model_is_asked():
    tokenizer = Tokenizer.load(Path(__file__).parents[1] / "golden")
    for system in ("", "Be brief."):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        record = parse_row({"messages": [*messages, {"role": "assistant", "content": "Hi"}]}, "here")
        trained = encode_conversation(record.turns, "vicuna_v1", tokenizer).tokens.tolist()
        prompt = encode_prompt(messages, "vicuna_v1", tokenizer).tolist()
        assert trained[: len(prompt)] == prompt


def test_images_come_in_the_order_of_their_marks():
    """From the parts, by index, by text mark, several in a turn and over several turns."""
    own, first = {"type": "image", "path": "own"}, {"type": "text", "text": "<image> and"}
    turns = [user(first, {"type": "image"}, own), turn("gpt", "<image>")]
    record = parse_row({"messages": turns, "images": ["a", {"path": "b"}, b"c"]}, "here")
    assert record.images == ("a", "b", "own", b"c") and record.turns[0]["value"] == "<image> and\n<image>\n<image>"
    indexed = [{"type": "image", "index": 1, "text": None}, {"type": "text", "text": "or", "index": None},
               {"type": "image", "index": 0, "text": None}]
    record = parse_row({"messages": [user(*indexed), turn("gpt")], "images": ["a", "b"]}, "here")
    assert record.images == ("b", "a") and record.turns[0]["value"] == "<image>\nor\n<image>"


def test_ms_swift_rows():
    row = {"query": "<image>And?", "response": "No.", "history": [["<image>Is it?", "Yes."]], "system": "S"}
    values = [t["value"] for t in parse_row(row | {"images": ["a", "b"]}, "here").turns]
    assert values == ["S", "<image>Is it?", "Yes.", "<image>And?", "No."]


@pytest.mark.parametrize(
    "row, reason, says",
    [
        ([1], "malformed", "must be an object, not a list"),
        ({"id": 1.5, "conversations": TEXT_ONLY}, "malformed", "id must be text or a whole number"),
        ({"id": True, "conversations": TEXT_ONLY}, "malformed", "id must be text or a whole number"),
        ({"id": 1, "image": 5, "conversations": [ASK, ANSWER]}, "malformed", "a path or a list of paths, not a number"),
        ({"id": 1, "image": ["a", 5], "conversations": [ASK, ANSWER]}, "malformed", "image must be"),
        ({"id": 1, "image": {"file": "a"}, "conversations": [ASK, ANSWER]},
         "malformed", "image must be .* not nothing"),
        ({"id": 1}, "malformed", "must have one of conversations, conversation, messages, query; this one has id"),
        ({"id": 1, "conversations": []}, "malformed", "the turns must be a list, not empty"),
        ({"id": 1, "conversations": "hello"}, "malformed", "not text"),
        ({"id": 1, "conversations": ["hello"]}, "malformed", "turn 1 must be an object"),
        ({"id": 1, "conversations": [turn("human"), turn("gpt", None)]},
         "malformed", "turn 2's value must be text .* nothing"),
        ({"id": 1, "conversations": [turn("human"), turn("gpt", 5)]},
         "malformed", "turn 2's value must be text .* a number"),
        ({"id": 1, "conversations": [turn("human"), {"value": "x"}]}, "role", "turn 2 names no role"),
        ({"id": 1, "conversations": [turn("human"), turn("")]}, "role", "turn 2 names no role"),
        ({"id": 1, "conversations": [turn("human"), turn("tool")]}, "role", "turn 2 is from 'tool'; it must be from"),
        ({"id": 1, "conversations": [turn("human"), turn(["gpt"])]}, "role", r"turn 2 is from \['gpt'\]"),
        ({"id": 1, "conversations": [turn("human"), turn("human")]}, "turn_order", "1 and 2 are both from 'human'"),
        ({"id": 1, "system": "s", "conversations": [turn("user"), turn("human")]},
         "turn_order", "turns 1 and 2 are both"),
        ({"id": 1, "conversations": [turn("human"), turn("gpt"), turn("system")]},
         "turn_order", "turn 3 is from 'system'"),
        ({"id": 1, "conversations": [turn("gpt")]}, "turn_order", "there is no human turn"),
        ({"id": 1, "conversations": TEXT_ONLY, "system": 5}, "malformed", "system must be text, not a number"),
        ({"id": 1, "conversations": [turn("human", "\ud800"), turn("gpt")]}, "malformed", "half of a UTF-16 pair"),
        ({"id": 1, "conversations": [turn("human", "a\0b"), turn("gpt")]}, "malformed", "turn 1's value has a NUL"),
        ({"id": 1, "conversations": TEXT_ONLY, "messages": TEXT_ONLY},
         "malformed", "ambiguous: it has conversations and messages"),
        ({"id": 1, "image": "a", "images": ["b"], "conversations": [ASK]},
         "malformed", "ambiguous: it has image and images"),
        ({"id": 1, "image": "http://x/1.jpg", "conversations": [ASK]}, "malformed", "not on this machine; download it"),
        ({"id": 1, "image": "data:image/png;base64,%%", "conversations": [ASK]}, "broken_image", "image is not base64"),
        ({"id": 1, "image": "data:,", "conversations": [ASK]}, "broken_image", "has an image of 0 bytes"),
        ({"id": "\ud800", "conversations": TEXT_ONLY}, "malformed", "id has half of a UTF-16 pair"),
        ({"id": 1, "image": "a\0", "conversations": [ASK]}, "malformed", "image has a NUL"),
        ({"id": 1, "messages": [user({"type": "video"})]}, "image_count", "0 videos, but 1 times <video>"),
        ({"id": 1, "video": "a.mp4", "conversations": TEXT_ONLY}, "image_count", "1 videos, but 0 times <video>"),
        ({"id": 1, "video": "a.mp4", "image": "b.jpg", "conversations": [ASK, ANSWER]}, "image_count", "1 videos, but"),
        ({"id": 1, "video": "http://a/b.mp4", "conversations": [ASK, ANSWER]}, "malformed", "not on this machine"),
        ({"id": 1, "video": "a.mp4", "videos": ["b"], "conversations": [ASK, ANSWER]}, "malformed", "video and videos"),
        ({"id": 1, "messages": [user(7)]}, "malformed", "part 1: type None"),
        ({"id": 1, "messages": [user({"type": "text", "text": None})]}, "malformed", "part 1 must be text"),
        ({"id": 1, "messages": [user({"type": "image"})]}, "image_count", "0 images, but 1 times <image>"),
        ({"id": 1, "messages": [user({"type": "image", "index": 1})], "images": ["a"]},
         "image_count", r"indices \[1\]"),
        ({"id": 1, "messages": [user("<image>", {"type": "image"})], "images": ["a"]},
         "image_count", "1 images, but 2"),
        ({"id": 1, "query": "<image>?", "response": "x"}, "image_count", "0 images, but 1"),
        ({"id": 1, "query": "a", "response": "b", "history": ["x"]}, "malformed", "history must be a list of pairs"),
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
