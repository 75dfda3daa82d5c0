"""The page of samples: what it says, where boxes are drawn, and that nothing gets out of its place."""

import dataclasses
import html.parser
import json
import re

import pytest
from PIL import Image
from synthesis_data import fill, good_answer, make_synthesis

from llava_jax.endpoint.log import AnswerLog
from llava_jax.errors import UserError
from llava_jax.synthesize import __main__ as synthesize
from llava_jax.synthesize.synthesis import Outcome
from llava_jax.synthesize.viewer import ViewedSample, render_page

VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Text by class of the element that it stands in; refuses tags that do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.attributes = [], {}, []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes.append((tag, attrs))
        if tag not in VOID:
            self.open.append((tag, attrs.get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1][1] or self.open[-1][0], []).append(data)


@pytest.fixture
def synthesis(tmp_path):
    return make_synthesis(tmp_path, 4)


def page_of(synthesis, tmp_path, answers, image_root=""):
    with AnswerLog(str(tmp_path / "log")) as log:
        for task, texts in answers:
            fill(log, task, *texts)
        samples = [ViewedSample(task, task.outcome(log)) for task, _ in answers]
    return render_page("Title <&>", {"teacher": "<b>"}, samples, image_root, "en")


def test_verdicts_turns_and_captions(synthesis, tmp_path):
    conversation, detail, reasoning = (synthesis[i] for i in range(3))
    page = Reader(page_of(synthesis, tmp_path, [
        (conversation, [good_answer(conversation)]), (detail, ["", "Too short."]), (reasoning, []),
        (synthesis[4], [good_answer(synthesis[4]) + " There are three chairs in the room."]),
        (synthesis[7], ["a", "b", "c"])]))
    assert page.text["chip good"] == ["✓ accepted"] * 2 and page.text["chip flag"] == ["1 contradiction"]
    assert page.text["chip bad"] == ["✗ too short", "✗ too short"]
    assert page.text["b"].count("count") == 1 and any("there is one chair" in text for text in page.text["li"])
    assert page.text["chip open"] == ["to be asked again", "not asked yet"]
    assert page.text["human"][0] == "Which animal is in the picture?" and "room 000000" in page.text["gpt"][0]
    assert "A dog stands to the left of a chair." in page.text["li"]
    assert page.text["pre"][0] == "Too short."


def test_boxes_are_where_the_annotations_say(synthesis, tmp_path):
    page = Reader(page_of(synthesis, tmp_path, [(synthesis[0], [])]))
    boxes = [attributes for _, attributes in page.attributes if attributes.get("class") == "box"]
    drawn = {box["title"].split(":")[0]: box["style"] for box in boxes}
    assert "left:5.00%;top:25.00%;width:30.00%;height:50.00%" in drawn["dog"]  # [5, 20, 30, 40] of 100 x 80
    assert "left:60.00%;top:25.00%;width:25.00%;height:62.50%" in drawn["chair"]


def test_images_are_in_the_page_and_others_are_told(synthesis, tmp_path):
    Image.new("RGB", (2000, 1600), (9, 99, 199)).save(tmp_path / "000000.jpg")
    (tmp_path / "000001.jpg").write_bytes(b"no image")
    page = page_of(synthesis, tmp_path, [(synthesis[0], []), (synthesis[3], []), (synthesis[6], [])], str(tmp_path))
    assert page.count("data:image/jpeg;base64,") == 1 and 'width="640" height="512"' in page
    assert len(re.findall("no picture: ", page)) == 2


def test_text_cannot_become_markup(synthesis, tmp_path):
    evil = "<script>alert(1)</script>'\"> & \ud83d"
    answers = [(synthesis[1], [evil]), (synthesis[0], [good_answer(synthesis[0]) + evil[:-1]])]
    page = page_of(synthesis, tmp_path, answers)
    assert "<script" not in page and "&lt;script&gt;" in page and "Title &lt;&amp;&gt;" in page
    Reader(page)
    page.encode()
    assert not re.search(r"""(?:src|href)=['"]?(?!data:)[a-z]+:""", page) and not re.search("https?:", page)


def test_the_command_draws_and_filters(synthesis, tmp_path, capsys):
    out = tmp_path / "out"
    with AnswerLog(str(out / "answers.jsonl")) as log:
        for task in synthesis:
            fill(log, task, *(["", "", ""] if task.context.id == "000002" else [good_answer(task)]))
    (out / "settings.json").write_text(json.dumps(synthesis.settings.as_json()))

    def view(*options):
        assert synthesize.main(["view", str(out), *options]) == 0
        return Reader((out / "view.html").read_text()).text

    assert len(view()["chip good"]) == 9 and len(view()["chip bad"]) == 3
    assert len(view("--only", "rejected")["chip bad"]) == 3
    accepted = view("--only", "accepted", "-n", "5")
    assert len(accepted["chip good"]) == 5 and "chip bad" not in accepted
    detail = {"kind": "detail_description", "id": "000003", "reason": "duplicate", "detail": "another has the same"}
    other = {"kind": "detail_description", "id": "000001", "reason": "empty", "detail": "\"duplicate\""}
    (out / "rejected.jsonl").write_text(f"{json.dumps(detail)}\n{json.dumps(other)}\n")
    assert view("--only", "rejected")["chip bad"].count("✗ duplicate") == 1  # as the outputs have it
    (out / "rejected.jsonl").unlink()
    assert [text.split(". ")[1].strip() for text in view("--kind", "detail")["h2"]] == ["detailed description"] * 4
    assert view("-n", "3", "--seed", "1")["quiet"] != view("-n", "3", "--seed", "2")["quiet"]
    (out / "other.html").write_text("data")
    with pytest.raises(UserError, match="there is something else than a page"):
        synthesize.main(["view", str(out), "--out", str(out / "other.html")])


def test_pictures_outside_of_the_image_root_are_not_shown(tmp_path):
    """By an absolute name, by .., and by a link."""
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    for path in (secret, root / "own.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    (root / "link.png").symlink_to(secret)
    (root / "inner.png").symlink_to(root / "own.png")
    (root / "folder").mkdir()
    synthesis = make_synthesis(tmp_path, 1)
    for name, shown in (("own.png", 1), ("folder/../own.png", 1), ("inner.png", 1), (str(secret), 0), ("link.png", 0),
                        ("../secret.png", 0), ("folder/../../secret.png", 0), (".", 0), ("", 0), ("\0", 0)):
        context = dataclasses.replace(synthesis[0].context, image=name)
        task = dataclasses.replace(synthesis[0], context=context)
        page = render_page("Title", {}, [ViewedSample(task, Outcome(None, (), False))], str(root), "en")
        assert page.count("data:image/") == shown and page.count("no picture: ") == 1 - shown, name
