"""The project's prompts, checked against their own captions and boxes; and folders of users."""

import configparser
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.endpoint.wording import find_source
from llava_jax.errors import UserError
from llava_jax.synthesize import prompts
from llava_jax.synthesize.language import is_language
from llava_jax.synthesize.parse import parse
from llava_jax.synthesize.prompts import KINDS, OWN, Prompts, read_questions

CONTEXT = Context("1", "1.jpg", ("A dog.", "A big dog."), (Box("dog", 0, 0, 0.5, 1),))
LINE = re.compile(r"([a-z ]+?)( \(crowd\))?: \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]")


def examples(kind: str) -> list[tuple[str, str]]:
    return [tuple(path.with_name(f"{path.name[:3]}_{part}.txt").read_text().strip() for part in ("caps", "conv"))
            for path in sorted(Path(OWN, kind).glob("*_caps.txt"))]


def read_example(kind: str, number: int) -> tuple[Context, list[str]]:
    """The image of an example, and its texts: questions and answers in turn, or the description."""
    image, reply = examples(kind)[number]
    captions, _, lines = image.partition("\n\n")
    boxes = [LINE.fullmatch(line) for line in lines.splitlines()]
    assert all(boxes)
    places = tuple(Box(box[1], *map(float, box.groups()[2:]), bool(box[2])) for box in boxes)
    turns = parse(kind, reply, "stop", "What?" if kind == "detail_description" else None)
    return Context("x", "x.jpg", tuple(captions.splitlines()), places), [turn["value"] for turn in turns]


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_what_the_teacher_would_be_given_and_what_is_read(kind):
    assert len(examples(kind)) >= 3
    for number, (image, reply) in enumerate(examples(kind)):
        context, texts = read_example(kind, number)
        assert context.text == image, "written as a context is"
        assert len(context.captions) >= 4 and bool(context.boxes) == (kind != "conversation")
        assert all(box.x1 < box.x2 <= 1 and box.y1 < box.y2 <= 1 for box in context.boxes)
        if kind != "detail_description":
            assert reply == "\n===\n".join(
                f"{('Question', 'Answer')[i % 2]}:\n{text}" for i, text in enumerate(texts)), "in the form asked for"
        assert not any(map(find_source, texts))
        assert not re.search(r"\d", reply), "no number that might be a place"


def test_scenes_are_used_once():
    first = [image.splitlines()[0] for kind in KINDS for image, _ in examples(kind)]
    assert len(set(first)) == len(first) >= 9


def test_conversations_hold_short_and_long_answers():
    for number in range(len(examples("conversation"))):
        answers = read_example("conversation", number)[1][1::2]
        assert 4 <= len(answers) <= 7 and len(answers[0].split()) <= 20
        assert max(len(answer.split()) for answer in answers) > 80 and "\n\n" in "".join(answers)


# Written down by hand from the texts: what they claim, as words with the number of objects that they need (crowds
# apart), and as places: `a < b` means that the middle of a is left of the middle of b, `^` above it.
CLAIMS = {
    ("detail_description", 0): (
        {"Four people": "person 4", "three umbrellas": "umbrella 3", "A yellow tram": "train 1",
         "a bicycle": "bicycle 1", "a traffic light": "traffic light 1", "a handbag": "handbag 1"},
        ["train 0 < bicycle 0", "bicycle 0 < person 0", "person 0 < person 3", "umbrella 1 < umbrella 2",
         "traffic light 0 ^ person 3", "umbrella 2 ^ person 3"]),
    ("detail_description", 1): (
        {"An older woman and a boy": "person 2", "Two bowls": "bowl 2", "A single cup": "cup 1", "an oven": "oven 1",
         "A refrigerator": "refrigerator 1", "a clock": "clock 1", "a wooden table": "dining table 1"},
        ["person 0 < person 1", "bowl 1 < person 1", "person 1 < cup 0", "refrigerator 0 < person 0",
         "person 1 < oven 0", "clock 0 ^ person 1"]),
    ("detail_description", 2): (
        {"The dog": "dog 1", "Five animals": "sheep 5"},
        ["sheep 4 < dog 0", "sheep 4 ^ dog 0", "sheep (crowd) 0 < sheep 0", "sheep (crowd) 0 ^ sheep 0"]),
    ("complex_reasoning", 0): (
        {"two books": "book 2", "a suitcase": "suitcase 1", "a cat": "cat 1", "the bed": "bed 1"},
        ["suitcase 0 < book 0"]),
    ("complex_reasoning", 1): (
        {"cars on both sides": "car 3", "the cyclist": "person 1", "the bike": "bicycle 1"},
        ["car 0 < person 0", "car 1 < person 0", "person 0 < car 2"]),
    ("complex_reasoning", 2): (
        {"Both boys": "person 2", "a racket": "tennis racket 1", "a tennis ball": "sports ball 1"},
        ["sports ball 0 ^ person 0", "sports ball 0 ^ person 1"]),
}


@pytest.mark.parametrize("kind, number", CLAIMS)
def test_examples_agree_with_their_boxes(kind, number):
    counts, places = CLAIMS[kind, number]
    context, texts = read_example(kind, number)
    boxes, text = context.boxes, " ".join(" ".join(texts).split())
    assert [words for words in counts if words not in text] == []
    claimed = {category: int(count) for category, _, count in (claim.rpartition(" ") for claim in counts.values())}
    assert Counter(box.category for box in boxes if not box.crowd) == claimed

    def middle(name: str) -> tuple[float, float]:
        category, _, index = name.strip().rpartition(" ")
        box = [box for box in boxes if box.category + " (crowd)" * box.crowd == category][int(index)]
        return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2

    for claim in places:
        left, relation, right = re.fullmatch(r"(.+) ([<^]) (.+)", claim).groups()
        axis = "<^".index(relation)
        assert middle(left)[axis] < middle(right)[axis], claim


def test_messages_have_the_stable_part_first():
    loaded = Prompts.load()
    assert loaded.kinds == KINDS
    for kind in KINDS:
        messages = loaded.messages(kind, CONTEXT)
        assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
        assert [tuple(message["content"] for message in messages[i : i + 2]) for i in (1, 3, 5)] == examples(kind)
        other = loaded.messages(kind, Context("2", "2.jpg", ("A cat.",)))
        assert other[:-1] == messages[:-1] and other[-1]["content"] == "A cat."
        assert messages[-1]["content"] == (CONTEXT.captions_text if kind == "conversation" else CONTEXT.text)


def test_the_hash_is_of_all_that_goes_into_messages(tmp_path):
    kinds = ("conversation", "complex_reasoning")
    loaded = Prompts.load(kinds=kinds)
    everything = {kind: loaded.messages(kind, CONTEXT)[:-1] for kind in kinds}
    assert loaded.hash == hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    assert len({loaded.hash, Prompts.load().hash, Prompts.load(language="ko").hash}) == 3


def test_languages():
    korean, english = Prompts.load(language="ko"), Prompts.load()
    for kind in KINDS:
        ours, theirs = korean.messages(kind, CONTEXT), english.messages(kind, CONTEXT)
        assert ours[1:] == theirs[1:]
        demand = ours[0]["content"].removeprefix(theirs[0]["content"]).strip()
        assert "in Korean." in demand and ("===" in demand) == (kind != "detail_description")
    assert all(is_language(question, "ko") for question in read_questions("detail_description", "ko"))
    with pytest.raises(UserError, match="no questions in French for detail_description: write a file .*--questions"):
        read_questions("detail_description", "fr")
    assert Prompts.load(language="fr", kinds=("conversation",)).kinds == ("conversation",)
    with pytest.raises(UserError, match="did you mean ko"):
        Prompts.load(language="korean")


def test_pools(tmp_path):
    sizes = {(name, language): len(read_questions(name, language)) for name in ("detail_description", "pairs")
             for language in ("en", "ko")}
    assert min(sizes["detail_description", "en"], sizes["detail_description", "ko"]) >= 16
    assert min(sizes["pairs", "en"], sizes["pairs", "ko"]) >= 11
    file = tmp_path / "own.txt"
    file.write_text("\ufeffWhat is it?\n\n  Tell   me. \nWhat is it?\n", encoding="utf-8")
    assert read_questions("pairs", "fr", file=str(file)) == ("What is it?", "Tell me.")
    assert read_questions("detail_description", "fr", file=str(file)) == ("What is it?", "Tell me.")
    file.write_text("<image> What?")
    with pytest.raises(UserError, match="own.txt: a question holds <image>"):
        read_questions("pairs", file=str(file))


def user_folder(tmp_path, **files: str) -> str:
    """A folder in the original's layout, without questions."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        for name, text in {"system_message": f"Be {kind}.", "001_caps": "B.", "001_conv": "b", "000_caps": "A.\n\n",
                           "000_conv": "a"}.items():
            (tmp_path / kind / f"{name}.txt").write_text(text)
    for name, text in files.items():
        (tmp_path / name.replace("__", "/")).with_suffix(".txt").write_text(text)
    return str(tmp_path)


def test_a_folder_in_the_layout_of_the_original(tmp_path):
    loaded = Prompts.load(user_folder(tmp_path))
    assert [message["content"] for message in loaded.messages("complex_reasoning", CONTEXT)] == [
        "Be complex_reasoning.", "A.", "a", "B.", "b", CONTEXT.text]
    assert read_questions("detail_description", "en", str(tmp_path)) == read_questions("detail_description")
    (tmp_path / "detail_description" / "questions.txt").write_text("What?")
    (tmp_path / "detail_description" / "questions.fr.txt").write_text("Quoi ?")
    assert read_questions("detail_description", "en", str(tmp_path)) == ("What?",)
    assert read_questions("detail_description", "fr", str(tmp_path)) == ("Quoi ?",)


def test_folders_that_are_not_whole(tmp_path):
    folder = user_folder(tmp_path, conversation__002_caps="C.")
    with pytest.raises(UserError, match="conversation/002_conv.txt: no such file"):
        Prompts.load(folder)
    (tmp_path / "conversation/002_conv.txt").write_text(" \n")
    with pytest.raises(UserError, match="002_conv.txt: the file is empty"):
        Prompts.load(folder)
    (tmp_path / "conversation/002_conv.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="002_conv.txt: byte 1 is not UTF-8"):
        Prompts.load(folder)
    (tmp_path / "detail_description/system_message.txt").unlink()
    with pytest.raises(UserError, match="detail_description/system_message.txt: no such file"):
        Prompts.load(folder, kinds=("detail_description",))
    with pytest.raises(UserError, match="no such folder"):
        Prompts.load(str(tmp_path / "none"))


def test_the_folder_is_installed_with_the_package():
    setup = configparser.ConfigParser()
    setup.read(Path(prompts.__file__).parents[2] / "setup.cfg")
    patterns = setup["options.package_data"]["llava_jax.synthesize"].split()
    folder = Path(prompts.__file__).parent
    installed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in Path(OWN).rglob("*") if path.is_file()} <= installed
