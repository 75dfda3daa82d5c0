"""Published sets: a table that agrees with the recipes, fetching from a hub on this machine, trees with gaps."""

import hashlib
import http.server
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.prepare import published
from llava_jax.prepare.fetch import Fetch
from llava_jax.prepare.published import SETS, File, Folder, Published

ROOT = Path(__file__).parents[2]


def row(image=None):
    turns = [{"from": "human", "value": "<image>\nWhat?" if image else "What?"}, {"from": "gpt", "value": "That."}]
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {})


def zip_of(names, lead="") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name in names:
            zipped.writestr(lead + name, f"image {name}")
    return packed.getvalue()


class Hub(http.server.ThreadingHTTPServer):
    """Gives out `files` as the hub does, with ranges; the first answers are cut off after `cut` bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log, self.cut, self.status = {}, [], [], 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, wanted = self.server, self.headers.get("Range")
        hub.log.append((self.command, self.path, wanted))
        content = hub.files.get(self.path)
        if content is None or hub.status != 200:
            self.send_response(404 if hub.status == 200 else hub.status)
            self.send_header("X-Error-Code", "EntryNotFound" if hub.status == 200 else "")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            stop = start + hub.cut.pop(0) if hub.cut else None
            self.wfile.write(content[start:stop])
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CAPTIONS = [f"{i // 4:05}/{i:09}.jpg" for i in range(10)]


@pytest.fixture
def captions(hub, monkeypatch):
    """A set in which all comes from the hub, laid out as lcs_558k is."""
    repo = "someone/captions"
    folder = Folder("captions", 10, File("captions/images.zip", 1e-6, repo=repo), "free")
    monkeypatch.setitem(SETS, "captions", Published(
        about="ten captions", rows=10, licence="free", image_root="captions",
        data=File("captions.json", 1e-6, repo=repo), folders=(folder,)))
    hub.files[f"/datasets/{repo}/resolve/main/captions.json"] = json.dumps([row(name) for name in CAPTIONS]).encode()
    hub.files[f"/datasets/{repo}/resolve/main/images.zip"] = zip_of(CAPTIONS)
    return hub


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """A set whose images come by hand, laid out as mix665k is, with nothing but its data file."""
    folders = tuple(
        Folder(f"mix/{path}", images, File(f"mix/{archive}", 0.5, url=f"https://images.test/{archive}"), "free")
        for path, images, archive in [("coco/train", 5, "coco/train.zip"), ("ocr/images", 4, "ocr/images.zip"),
                                      ("vg/VG_1", 2, "vg/images.zip"), ("vg/VG_2", 2, "vg/images2.zip")])
    monkeypatch.setitem(SETS, "mix", Published(
        about="a mix", rows=13, licence="free", image_root="mix", data=File("mix.json", 0.1, repo="someone/mix"),
        folders=folders))
    names = [f"coco/train/{i}.jpg" for i in range(4)] + [f"ocr/images/{i}.jpg" for i in range(4)]
    names += ["vg/VG_1/1.jpg", "vg/VG_1/2.jpg", "vg/VG_2/1.jpg", "coco/train/3.jpg"]
    (tmp_path / "mix.json").write_text(json.dumps([row(name) for name in names] + [row()]))
    return tmp_path


ALL_BUT_OCR = [f"mix/coco/train/{i}.jpg" for i in range(4)]
ALL_BUT_OCR += ["mix/vg/VG_1/1.jpg", "mix/vg/VG_1/2.jpg", "mix/vg/VG_2/1.jpg"]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_recipes_read_what_fetch_leaves():
    readable = {(f"data/{p.data.path}", os.path.normpath(f"data/{p.image_root}")) for p in SETS.values()}
    for name in ("llava_v1_7b", "llava_1_5_7b", "llava_1_5_13b"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(ROOT / "configs"))  # one recipe imports another
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(ROOT / "configs"))
        for stage in module.recipe().stages.values():
            assert (stage.data.path, stage.data.image_root) in readable


def test_the_table_is_whole():
    text = published.table()
    for name, published_set in SETS.items():
        assert f"{name}:" in text and published_set.data.path in text and f"{published_set.rows:,}" in text
        for file in [published_set.data, *(folder.archive for folder in published_set.folders)]:
            assert bool(file.repo) != bool(file.url) and file.origin.startswith("http")
        for folder in published_set.folders:
            assert folder.path.startswith(published_set.image_root)
            assert folder.archive.path.startswith(os.path.dirname(folder.path))
    parts = [SETS[name].rows for name in ("conversation_58k", "detail_23k", "complex_reasoning_77k")]
    assert sum(parts) == pytest.approx(SETS["instruct_150k"].rows, rel=0.01)


def test_list_and_unknown_names(capsys):
    assert cli.parse(Fetch, [], prog="fetch").run() == 0
    assert cli.parse(Fetch, ["captions", "--list"], prog="fetch").run() == 0
    assert capsys.readouterr().out == 2 * (published.table() + "\n")
    with pytest.raises(UserError, match="no published data set is called 'mix_665k'; did you mean mix665k?"):
        Fetch(name="mix_665k").run()
    with pytest.raises(UserError, match="there are cc3m_595k, lcs_558k"):
        Fetch(name="laion").run()


def test_fetch_from_the_hub(captions, tmp_path, capsys):
    assert Fetch(name="captions", out=str(tmp_path / "data")).run() == 0
    out = capsys.readouterr()
    assert "captions is complete" in out.out and "10 rows" in out.out and "all 10 that are used" in out.out
    assert "GB are free" in out.err
    for name in CAPTIONS:
        assert (tmp_path / "data/captions" / name).read_text() == f"image {name}"
    assert json.loads((tmp_path / "data/captions.json").read_text())[3]["image"] == CAPTIONS[3]


def test_what_is_there_is_not_downloaded_again(captions, tmp_path):
    fetch = Fetch(name="captions", out=str(tmp_path))
    assert fetch.run() == 0
    captions.log.clear()
    assert fetch.run() == 0 and not captions.log
    (tmp_path / "captions/images.zip").unlink()  # it was said to be no longer needed
    assert fetch.run() == 0 and not captions.log
    (tmp_path / "captions" / CAPTIONS[5]).unlink()
    assert fetch.run() == 0
    assert {path.rpartition("/")[2] for _, path, _ in captions.log} == {"images.zip"}


def test_a_download_that_was_stopped_goes_on(captions, tmp_path):
    url, content = next((path, content) for path, content in captions.files.items() if path.endswith("images.zip"))
    part = tmp_path / "captions" / f"images.zip.{hashlib.sha256(content).hexdigest()[:8]}.part"
    part.parent.mkdir()
    part.write_bytes(content[:300])
    assert Fetch(name="captions", out=str(tmp_path)).run() == 0
    assert [wanted for command, path, wanted in captions.log if (command, path) == ("GET", url)] == ["bytes=300-"]
    assert (tmp_path / "captions/images.zip").read_bytes() == content and not part.exists()


def test_a_damaged_download_is_thrown_away(captions, tmp_path):
    content = next(content for path, content in captions.files.items() if path.endswith("images.zip"))
    part = tmp_path / "captions" / f"images.zip.{hashlib.sha256(content).hexdigest()[:8]}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 300)
    with pytest.raises(UserError, match="images.zip: the download was damaged on the way; run this again"):
        Fetch(name="captions", out=str(tmp_path)).run()
    assert not part.exists() and not (tmp_path / "captions/images.zip").exists()
    assert Fetch(name="captions", out=str(tmp_path)).run() == 0


def test_a_lost_connection_is_one_line_and_keeps_what_came(captions, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub library's tries
    content = captions.files["/datasets/someone/captions/resolve/main/captions.json"]
    captions.cut = [200, *[0] * 20]
    with pytest.raises(UserError, match="no network: .*") as raised:
        Fetch(name="captions", out=str(tmp_path)).run()
    assert "\n" not in str(raised.value)
    (part,) = tmp_path.glob("captions.json.*.part")
    assert part.read_bytes() == content[: part.stat().st_size] and part.stat().st_size >= 64


def test_check_touches_no_network(captions, tmp_path, capsys):
    assert Fetch(name="captions", out=str(tmp_path), check=True).run() == 1
    assert not captions.log
    out = capsys.readouterr().out
    assert "captions.json: missing" in out and "https://huggingface.co/datasets/someone/captions/resolve/main/" in out
    assert "captions is not complete" in out and not (tmp_path / "captions").exists()


def test_a_truncated_archive_of_the_hub(captions, tmp_path):
    path = next(path for path in captions.files if path.endswith("images.zip"))
    captions.files[path] = captions.files[path][:300]
    with pytest.raises(UserError, match="images.zip: a broken zip file"):
        Fetch(name="captions", out=str(tmp_path)).run()


def test_no_network_is_one_line(captions, tmp_path, monkeypatch):
    captions.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits, and tries again"))
    with pytest.raises(UserError, match=r"cannot be downloaded \(no network: .*\): try again, or put") as raised:
        Fetch(name="captions", out=str(tmp_path)).run()
    assert "\n" not in str(raised.value) and str(tmp_path / "captions.json") in str(raised.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\(HF_HUB_OFFLINE is set\)"):
        Fetch(name="captions", out=str(tmp_path)).run()


def test_offline_as_a_command(tmp_path):
    code = ("from llava_jax import cli; from llava_jax.prepare.fetch import Fetch; "
            "cli.run(lambda args: cli.parse(Fetch, args, prog='fetch').run())")
    done = subprocess.run([sys.executable, "-c", code, "lcs_558k", "--out", tmp_path], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/blip")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [200, 403, 503])  # 200: the hub is there, the file is not
def test_what_the_hub_answers_is_told(status, captions, tmp_path):
    captions.files.clear()
    captions.status = status
    with pytest.raises(UserError, match="the hub answers: .*(404|403|503)") as raised:
        Fetch(name="captions", out=str(tmp_path)).run()
    assert "\n" not in str(raised.value)


def test_a_wrong_count_is_told_and_the_file_kept(captions, tmp_path, capsys):
    text = json.dumps([row(name) for name in CAPTIONS[:9]])
    (tmp_path / "captions.json").write_text(text)
    assert Fetch(name="captions", out=str(tmp_path)).run() == 1
    out = capsys.readouterr().out
    assert "captions.json: 9 rows instead of 10; move the file away" in out and "all 9 that are used are there" in out
    assert (tmp_path / "captions.json").read_text() == text
    (tmp_path / "captions.json").write_text(text[:-30])
    assert Fetch(name="captions", out=str(tmp_path)).run() == 1
    assert re.search(r"captions.json, line 1: broken JSON .*; move the file away", capsys.readouterr().out)


def test_an_approximate_count_does_not_fail(captions, tmp_path, capsys, monkeypatch):
    about = {**vars(SETS["captions"]), "rows": 9, "approximate": True}
    monkeypatch.setitem(SETS, "captions", Published(**about))
    assert Fetch(name="captions", out=str(tmp_path)).run() == 0
    assert "10 rows, expected about 9" in capsys.readouterr().out


def test_a_tree_of_which_parts_are_missing(mix, capsys):
    put(mix, *(f"mix/coco/train/{i}.jpg" for i in range(5)), "mix/ocr/images/0.jpg", "mix/vg/VG_1/2.jpg")
    assert Fetch(name="mix", out=str(mix)).run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{mix}/mix.json: 13 rows"
    assert lines[1] == f"{mix}/mix/coco/train: 5 images of about 5; all 4 that are used are there"
    assert lines[2:4] == [
        f"{mix}/mix/ocr/images: 1 images of about 4; 3 of the 4 that are used are missing: 1.jpg, 2.jpg, 3.jpg",
        f"  get https://images.test/ocr/images.zip (0.5 GB) as {mix}/mix/ocr/images.zip, then run this without --check"]
    assert lines[4].endswith("VG_1: 1 images of about 2; 1 of the 2 that are used are missing: 1.jpg")
    assert lines[6].endswith("VG_2: 0 images of about 2; 1 of the 1 that are used are missing: 1.jpg")
    assert lines[8:] == ["mix is not complete"]


def test_archives_that_are_put_there_are_unpacked(mix, capsys):
    (mix / "mix/vg").mkdir(parents=True)
    (mix / "mix/coco").mkdir()
    (mix / "mix/coco/train.zip").write_bytes(zip_of([f"{i}.jpg" for i in range(5)], lead="train/"))
    (mix / "mix/vg/images.zip").write_bytes(zip_of(["VG_1/1.jpg", "VG_1/2.jpg"]))
    (mix / "mix/vg/images2.zip").write_bytes(zip_of(["VG_2/1.jpg", "VG_2/7.jpg"]))
    put(mix, *(f"mix/ocr/images/{i}.jpg" for i in range(4)))
    assert Fetch(name="mix", out=str(mix), check=True).run() == 1
    assert "train.zip is there: leave out --check to unpack it" in capsys.readouterr().out
    assert Fetch(name="mix", out=str(mix)).run() == 0
    assert (mix / "mix/coco/train/4.jpg").read_text() == "image 4.jpg"
    assert (mix / "mix/vg/VG_2/7.jpg").read_text() == "image VG_2/7.jpg"


def test_an_archive_that_lacks_an_image_is_no_error(mix, capsys):
    put(mix, *ALL_BUT_OCR)
    (mix / "mix/ocr").mkdir()
    (mix / "mix/ocr/images.zip").write_bytes(zip_of(["0.jpg", "1.jpg", "3.jpg"]))
    for _ in range(2):
        assert Fetch(name="mix", out=str(mix)).run() == 1
        assert "1 of the 4 that are used are missing: 2.jpg" in capsys.readouterr().out


def test_other_extensions_are_told_and_renamed(mix, capsys):
    put(mix, *ALL_BUT_OCR)
    put(mix, "mix/ocr/images/0.jpg", "mix/ocr/images/0.gif", "mix/ocr/images/1.gif", "mix/ocr/images/1.png",
        "mix/ocr/images/2.PNG", "mix/ocr/images/3.txt", "mix/ocr/images/9.gif")
    (mix / "mix/ocr/images/1.gif").write_text("the first")
    assert Fetch(name="mix", out=str(mix), check=True).run() == 1
    out = capsys.readouterr().out
    assert "2 of them are there under another extension, 1.gif for 1.jpg: add --rename" in out
    assert Fetch(name="mix", out=str(mix), check=True, rename=True).run() == 1
    assert "1 of the 4 that are used are missing: 3.jpg" in capsys.readouterr().out
    left = {path.name for path in (mix / "mix/ocr/images").iterdir()}
    assert left == {"0.jpg", "0.gif", "1.jpg", "1.png", "2.jpg", "3.txt", "9.gif"}
    assert (mix / "mix/ocr/images/1.jpg").read_text() == "the first"


def test_a_folder_may_be_a_link(mix, tmp_path, capsys):
    put(mix, *ALL_BUT_OCR)
    put(tmp_path / "another_disk", *(f"{i}.jpg" for i in range(4)))
    (mix / "mix/ocr").mkdir()
    (mix / "mix/ocr/images").symlink_to(tmp_path / "another_disk")
    assert Fetch(name="mix", out=str(mix), check=True).run() == 0
    assert "ocr/images: 4 images of about 4; all 4 that are used are there" in capsys.readouterr().out


@pytest.mark.parametrize("medium", [{"image": "../outside/1.jpg"}, {"image": "/etc/passwd"}, {"image": 5},
                                    {"image": [5]}, {"video": "1.mp4"}])
def test_an_image_outside_is_refused_and_never_renamed(medium, mix, capsys):
    put(mix, "outside/1.png")
    rows = json.loads((mix / "mix.json").read_text())
    rows[0] |= medium
    (mix / "mix.json").write_text(json.dumps(rows))
    assert Fetch(name="mix", out=str(mix / "."), check=True, rename=True).run() == 1
    assert "the data file names" in capsys.readouterr().out and (mix / "outside/1.png").exists()


def test_a_folder_that_cannot_be_is_one_line(mix):
    rows = json.loads((mix / "mix.json").read_text())
    rows[0]["image"] = "a\0b/1.jpg"
    (mix / "mix.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="no file can have this name"):
        Fetch(name="mix", out=str(mix), check=True).run()
