"""Fields beside the texts: honoured, refused by name, or counted; never ignored."""

import json

import pytest

from llava_jax.data.records import BadRow, parse_row
from llava_jax.data.sources import open_source
from llava_jax.text.encode import IGNORE, encode_conversation
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokens


class Characters:
    """One token for each character."""

    adds_bos, bos_id, adds_prefix_space = False, None, False

    def tokenize(self, text):
        return Tokens([ord(character) for character in text], [(i, i + 1) for i in range(len(text))])


def chat(first: dict, second: dict | None = None, **question) -> dict:
    return {"messages": [{"role": "user", "content": "Colour?"} | question,
                         {"role": "assistant", "content": "purple"} | first,
                         {"role": "user", "content": "Sure?"},
                         {"role": "assistant", "content": "green"} | (second or {})]}


def learned(row: dict, template: str = "vicuna_v1") -> str:
    example = encode_conversation(parse_row(row, "here").turns, template, Characters(), 1)
    return "".join(chr(token) for token in example.labels if token != IGNORE)


NOT_LEARNED = [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"loss": False}, {"loss": 0}, {"train": False},
               {"loss_scale": 0.0}, {"trainable": 0}, {"masked": True}, {"mask": 1}]
LEARNED = [{}, {"weight": 1}, {"weight": 1.0}, {"weight": None}, {"loss": True}, {"train": True}, {"masked": False}]


@pytest.mark.parametrize("flag", NOT_LEARNED, ids=str)
@pytest.mark.parametrize("template",
                         [name for name in TEMPLATES if name != "plain" and not TEMPLATES[name].supervised_marks])
def test_an_answer_that_is_not_to_be_learned_is_only_read(flag, template):
    whole, rest = learned(chat({}), template), learned(chat(flag), template)
    assert "purple" in whole and "purple" not in rest and "green" in rest
    assert whole.endswith(rest) and "purple" not in learned(chat(flag, {"loss": True}), template)
    assert "green" not in learned(chat({}, flag), template)
    tokens = [encode_conversation(parse_row(row, "here").turns, template, Characters(), 1).tokens.tolist()
              for row in (chat({}), chat(flag))]
    assert tokens[0] == tokens[1]  # what is read stays the same


@pytest.mark.parametrize("flag", LEARNED, ids=str)
def test_an_answer_that_is_to_be_learned_is(flag):
    assert learned(chat(flag)) == learned(chat({}))


def test_nothing_to_learn_says_why():
    with pytest.raises(ValueError, match="no answer with text that is not masked"):
        learned(chat({"weight": 0}, {"weight": 0}))


def test_flags_of_questions():
    assert learned(chat({}, weight=0)) == learned(chat({}))  # SlimOrca has them on every turn
    with pytest.raises(BadRow, match="turn 1 is no answer, but its flag makes it supervised") as raised:
        parse_row(chat({}, train=True), "here")
    assert raised.value.reason == "unsupported"


VIDEO = {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A ball."}]}
PLAIN = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A ball."}]}


def asked(question: str, answer: str = "A ball.") -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize(
    "row, says",
    [
        (PLAIN | {"video_path": "a.mp4"}, "the row has video_path; videos are given by the row's video or videos"),
        (VIDEO | {"video": b"mp4"}, "video is the content of a video; write it to a file"),
        (VIDEO | {"video": [["1.jpg", "2.jpg"]]}, "video is a list of frames; put them in a folder"),
        (VIDEO | {"video": "a.mp4", "video_start": 2.0}, "the row has video_start: a video is read from its start"),
        (asked([{"type": "video", "video": "a.mp4", "end": 3}]), "part 1 has end: a video is read"),
        (PLAIN | {"audio": {"path": "a.wav"}}, "the row has audio"),
        (PLAIN | {"audios": ["a.wav"]}, "the row has audios"),
        (VIDEO, "turn 1's value has the mark <video>"),
        (asked("What is heard?\n<audio>"), "the mark <audio>"),
        (asked("<img>a.jpg</img> What?"), "the mark <img>"),
        (asked("Find <ref-object>", "<bbox>"), "the mark <ref-object>"),
        (asked("Find it.", "It is at <bbox>."), "turn 2's value has the mark <bbox>"),
        (PLAIN | {"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}, "the row has objects"),
        (PLAIN | {"tools": [{"name": "search"}]}, "the row has tools"),
        (PLAIN | {"tools": '[{"name": "search"}]'}, "the row has tools"),
        (chat({"tool_calls": [{"id": 1}], "content": None}), "turn 2 has tool_calls"),
        (chat({"function_call": {"name": "f"}}), "turn 2 has function_call"),
        (chat({}, images=["a.jpg"]), "turn 1 has images of its own"),
        (chat({}, videos=["a.mp4"]), "turn 1 has videos"),
        (chat({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}), "turn 2 has train_detail"),
        (chat({"weight": 0.5}), "turn 2 has weight 0.5; only 0 and 1"),
        (chat({"loss": "no"}), "turn 2 has loss 'no'"),
        (chat({"weight": 1, "loss": False}), "turn 2 contradicts itself: weight and loss"),
        (PLAIN | {"weight": 0}, "the row is masked by its flag"),
        (PLAIN | {"weight": 0.3}, "the row has weight 0.3"),
        (PLAIN | {"label": False}, "label is false"),
        (PLAIN | {"kto_tag": False}, "kto_tag is false"),
        (asked([{"type": "input_audio", "input_audio": {}}]), "part 1: type 'input_audio'"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(row, says):
    with pytest.raises(BadRow) as raised:
        parse_row(row, "data.json, row 3")
    assert raised.value.reason == "unsupported" and says in str(raised.value)
    assert str(raised.value).startswith("data.json, row 3: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"video": None, "videos": [], "audio": "", "tools": "[]", "objects": {"ref": [], "bbox": []}},
        PLAIN | {"audio": {"bytes": None, "path": None}, "weight": 1, "label": True},
        PLAIN | {"video_id": "x", "objects": ["cat", "dog"], "label": "cat"},
        asked("How do I use the <video> tag?", "Write <video>\n</video>."),
        asked("Why?\n<video>\n<source src='a.mp4'>\n</video>"),
        chat({"tool_calls": None, "function_call": None, "train_detail": []}),
    ],
)
def test_what_says_nothing_is_no_matter(row):
    assert parse_row(row, "here").turns


def test_a_system_text_under_its_other_name():
    row = PLAIN | {"system_prompt": "Answer in French."}
    assert parse_row(row, "here").turns == parse_row(PLAIN | {"system": "Answer in French."}, "here").turns
    assert parse_row(row, "here").turns[0] == {"from": "system", "value": "Answer in French."}
    assert parse_row(row | {"system": "Answer in French."}, "here").turns[0]["from"] == "system"
    with pytest.raises(BadRow, match="ambiguous: system and system_prompt differ"):
        parse_row(row | {"system": "Answer in German."}, "here")


def test_a_system_text_beside_the_turns_and_in_them():
    turns = [{"from": "system", "value": "Answer in French."}, *PLAIN["conversations"]]
    row = PLAIN | {"conversations": turns}
    for key in ("system", "system_prompt", "system_message"):
        assert parse_row(row | {key: "Answer in French."}, "here").turns == parse_row(row, "here").turns
        with pytest.raises(BadRow, match="its system text and that of its first turn differ"):
            parse_row(row | {key: "Answer in German."}, "here")


@pytest.mark.parametrize("mark", ["Picture 1: <img>a.png</img>", "See <|vision_start|><|image_pad|><|vision_end|>",
                                  "<|image_1|>", "<|image|>", "<image 1>", "<image_2>"])
def test_marks_of_images_in_other_models_data(mark):
    with pytest.raises(BadRow, match="of marks, only <image> can be read") as error:
        parse_row(asked(f"{mark} What is it?"), "here")
    assert error.value.reason == "unsupported"
    assert parse_row(asked("How is an image written?", f"So: {mark}"), "here").turns


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_preferences_are_refused(key):
    with pytest.raises(BadRow, match=f"the row has {key}: preferences") as error:
        parse_row(PLAIN | {key: {"from": "gpt", "value": "Red."}}, "here")
    assert error.value.reason == "unsupported"


def test_parts_of_a_turn():
    image = {"type": "image", "text": None, "image": {"bytes": None, "path": None}, "image_url": {"url": None}}
    text = {"type": "text", "text": "purple"}
    row = chat({"content": [text]}, content=[image, {"type": "text", "text": "Colour?"}]) | {"images": ["a.png"]}
    assert parse_row(row, "here").images == ("a.png",) and parse_row(row, "here").unknown == ()
    assert parse_row(chat({"content": [text | {"style": "bold"}]}), "here").unknown == ("part.style",)
    for more, reason in [({"weight": 0}, "unsupported"), ({"video": "a"}, "unsupported"), ({"text": 1}, "malformed")]:
        with pytest.raises(BadRow, match="turn 2's content, part 1") as error:
            parse_row(chat({"content": [text | more]}), "here")
        assert error.value.reason == reason


def test_parts_of_parts_are_refused_however_deep():
    deep = "x"
    for _ in range(3000):
        deep = [{"type": "text", "text": deep}]
    with pytest.raises(BadRow, match="part 1 must be text, not a list"):
        parse_row(chat({"content": deep}), "here")


def test_unknown_fields_are_named(tmp_path):
    row = chat({"name": "bob"}) | {"source": "web", "score": 3, "image_sizes": None, "response": "x", "id": 1}
    assert parse_row(row, "here").unknown == ("response", "score", "source", "turn.name")
    (tmp_path / "rows.json").write_text(json.dumps([row, PLAIN | {"messages": PLAIN["conversations"]}][:1]))
    assert open_source(tmp_path / "rows.json")[0].unknown == ("response", "score", "source", "turn.name")


def test_fields_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [chat({"weight": 0.0}), chat({"weight": 1.0}), chat({"weight": 1.0}) | {"audios": ["a.mp3"], "score": 3}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema({
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "weight": pa.float64()})),
        "audios": pa.list_(pa.string()), "score": pa.int64(),
    })), tmp_path / "rows.parquet")  # fmt: skip
    source = open_source(tmp_path / "rows.parquet")
    assert [turn.get("loss") for turn in source[0].turns] == [None, False, None, None]
    assert all("loss" not in turn for turn in source[1].turns)
    with pytest.raises(BadRow, match="row 3: the row has audios"):
        source[2]
