"""Rows with videos in the commands: checked, shown, moved with their paths, and refused by name elsewhere."""

import json

import clips
import pytest
from conftest import GOLDEN
from PIL import Image

from llava_jax import cli
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
from llava_jax.prepare.check import Check
from llava_jax.prepare.pack import Pack
from llava_jax.prepare.preview import Preview
from llava_jax.prepare.subsets import Mix, Sample, Split
from llava_jax.video import Video

TOKENIZER = GOLDEN / "tokenizer.model"


def row(number, **media):
    turns = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": f"Ball {number}."}]
    return {"id": number, "conversations": turns, **media}


@pytest.fixture
def folder(tmp_path):
    clips.write(tmp_path / "a.mp4", 40, 10)
    clips.write(tmp_path / "b.mp4", 20, 10)
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 99)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "c.png")
    return tmp_path


def write(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def run(kind, *args):
    return cli.parse(kind, [str(arg) for arg in args], prog="prepare").run()


def test_check(folder, capsys):
    data = write(folder / "data.json", row(1, video="a.mp4"), row(2, video="none.mp4"), row(3, video="broken.mp4"),
                 row(4, video="b.mp4"), row(5, video="b.mp4", audio="b.mp3"))
    options = ("--model", TOKENIZER, "--workers", 0, "--json", "--visual-tokens", 36)
    assert run(Check, data, *options) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == {"missing_image": 1, "broken_image": 1, "unsupported": 1} and report["good_rows"] == 2
    messages = {found["row"]: found["message"] for found in report["bad_rows"]}
    assert messages[2] == "none.mp4: no such video file" and "has audio" in messages[5]
    assert messages[3].startswith("broken.mp4: the video cannot be read") or "cannot be read" in messages[3]
    assert report["images"]["references"] == 4 and report["images"]["distinct"] == 4
    total, packing = report["tokens"]["total"], report["packing"]
    assert packing["tiles_per_sequence"] == 4  # the frames of a.mp4

    good = write(folder / "good.json", row(1, video="a.mp4"), row(4, video="b.mp4"))
    assert run(Check, good, *options, "--video.frames", 1) == 0
    fewer = json.loads(capsys.readouterr().out)["tokens"]["total"]
    assert total - fewer == (4 + 2 - 2) * 36
    assert run(Check, good, *options, "--video.frames", 1, "--video.time-text") == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["total"] > fewer + 2 * 20


def test_preview_shows_the_first_frames(folder, capsys):
    data = write(folder / "data.json", row(1, video="a.mp4"), row(2, image="c.png"), row(3, video="broken.mp4"))
    args = ("--model", TOKENIZER, "--out", folder / "page.html", "--first", "--tiles-per-sequence", 8, "--max-length",
            8192, "--video.fps", 2, "--video.time-text")
    assert run(Preview, data, *args) == 0
    page = (folder / "page.html").read_text()
    assert page.count("frame ") >= 4 and "frame 15, 4 of 8 of the video" in page and "frame 20" not in page
    assert str(folder / "a.mp4") in page and "3 records, 1 bad" in capsys.readouterr().out
    assert "The" in page and page.count("data:image/") == 2 * 4 + 2


def test_pack_refuses_videos_by_name(folder, capsys):
    data = write(folder / "data.json", row(1, video="a.mp4"), row(2, image="c.png"))
    with pytest.raises(UserError, match="row 1.*id 1: pack stores no videos; train on this file as it is"):
        run(Pack, data, folder / "packed", "--workers", 0)
    assert run(Pack, data, folder / "packed", "--workers", 0, "--bad-rows", "skip", "--overwrite") == 0
    assert "left out: 1 rows (unsupported 1)" in capsys.readouterr().out


def test_subsets_keep_the_paths(folder):
    (folder / "sub").mkdir()
    clips.write(folder / "sub" / "d.mp4", 4, 10)
    one = write(folder / "one.json", *(row(i, video=name) for i, name in enumerate(["a.mp4", "b.mp4"] * 3)))
    parts = [{"from": "human", "value": [{"type": "video", "video": "d.mp4"}, "So?"]}, {"from": "gpt", "value": "Yes."}]
    two = write(folder / "sub" / "two.json", row(8, videos=["d.mp4"]), {"id": 9, "conversations": parts})
    assert run(Sample, one, folder / "small.json", "--count", 3, "--workers", 0) == 0
    assert [open_source(folder / "small.json")[i].images for i in range(3)]
    assert run(Mix, folder / "mix.json", one, two, "--materialise", "--workers", 0) == 0
    mixed = open_source(folder / "mix.json")
    found = {mixed[i].images[0] for i in range(len(mixed))}
    assert len(mixed) == 8 and found == {Video(str(folder / name)) for name in ("a.mp4", "b.mp4", "sub/d.mp4")}
    assert run(Split, one, folder / "parts", "--parts", "x=0.5,y=0.5", "--workers", 0) == 0
    parts = [{row["video"] for row in json.loads((folder / "parts" / f"{name}.json").read_text())} for name in "xy"]
    assert not parts[0] & parts[1] and set.union(*parts) == {"a.mp4", "b.mp4"}
