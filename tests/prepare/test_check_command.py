"""The command `prepare check`: its text, its JSON, the file of bad rows, and exit codes."""

import json

import pytest
from check_data import TOKENIZER, row, run, write
from commands import run_command

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.prepare import audit as audit_module
from llava_jax.prepare.check import Check, describe
from llava_jax.prepare.findings import KINDS, Finding
from llava_jax.prepare.settings import Settings
from llava_jax.text.tokenizer import Tokenizer


def check(*args):
    return cli.parse(Check, [str(arg) for arg in args], prog="check").run()


def test_json_and_the_file_of_bad_rows(tmp_path, capsys):
    rows = [{**row(i), "id": 5} for i in range(1100)] + [row(5000, image="none.jpg")]
    path, file = write(tmp_path, rows), tmp_path / "bad.jsonl"
    assert check(path, "--json", "--bad-rows", file, "--workers", 0, "--allow", "duplicate_id") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == {"missing_image": 1, "duplicate_id": 1099} and report["allowed"] == ["duplicate_id"]
    assert not report["ok"] and len(report["bad_rows"]) == 1000
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved[:1000] == report["bad_rows"] and len(saved) == 1100
    assert saved[0] == {"source": str(path), "row": 1101, "line": 1101, "id": "r5000", "kind": "missing_image",
                        "message": "none.jpg: no such image file", "usable": False}
    assert saved[-1] == {"source": str(path), "row": 1100, "line": 1100, "id": "5", "kind": "duplicate_id",
                         "message": "same id as row 1 (line 1)", "usable": True}
    assert check(path, "--json", "--workers", 0, "--allow", "duplicate_id", "missing_image") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["ok"] and again == {**report, "ok": True, "allowed": ["duplicate_id", "missing_image"]}


def test_the_file_of_bad_rows_is_whole_or_not_there(tmp_path, monkeypatch):
    path, file = write(tmp_path, [row(1, image="none.jpg")]), tmp_path / "bad.jsonl"
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(audit_module, "_find_repeats", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check(path, "--bad-rows", file, "--workers", 0)
    with pytest.raises(UserError, match="none/bad.jsonl: no such folder"):
        check(path, "--bad-rows", tmp_path / "none" / "bad.jsonl", "--workers", 0)
    for target in (path, tmp_path):
        with pytest.raises(UserError, match="--bad-rows .*: (there is something|this is a folder)"):
            check(path, "--bad-rows", target, "--workers", 0)
    assert sorted(tmp_path.iterdir()) == before
    assert check(path, "--bad-rows", file, "--workers", 0) == 1 and file.exists()


def test_text_for_people(tmp_path, capsys):
    rows = [row(i, image=f"{'folder/' * 20}{i}.jpg") for i in range(30)]
    rows += [{**row(100 + i, answer="</s>"), "id": "\x1b[31m\nred" * 9} for i in range(8)]
    path = write(tmp_path, [*rows, row(200, image="good.jpg")])
    assert check(path, "--model", TOKENIZER, "--workers", 0, "--allow", "separator") == 1
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in text
    assert all(f"{i}.jpg: no such image file" in " ".join(text.split()) for i in range(5))  # wrapped, never cut
    findings = [line.split()[0] for line in lines if ", id " in line]
    assert findings == ["missing_image"] * 5 + ["separator"] * 5 + ["duplicate_id"] * 5
    assert "... and 30 more (--bad-rows FILE writes all of them)" in lines
    assert any(line.split()[:3] == ["separator", "8", "allowed"] for line in lines)
    assert "rows      39, of which 9 can be used" in lines and any(line.startswith("packing") for line in lines)
    check(path, "--workers", 0)
    assert "tokens    not counted: lengths, too_long and packing need --model" in capsys.readouterr().out


def test_what_is_wrong_is_never_cut(tmp_path, capsys):
    bad = row(1, conversations=[{"from": "human", "value": "a"}, {"from": "bot\x1b[31m", "value": "b"}])
    path = write(tmp_path, [{**bad, "id": "conversation-" + "0" * 40}])
    assert check(path, "--workers", 0) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "turn 2 is from 'bot\\x1b[31m'; it must be from 'human' (user) or 'gpt' (assistant)" in text


def test_fields_that_nothing_reads_are_counted(tmp_path, capsys):
    rows = [row(i) | {"score": i, "source": None} for i in range(3)]
    rows[1]["conversations"][0]["name\u202e"] = "x"
    path = write(tmp_path, rows)
    assert check(path, "--json", "--workers", 0) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unknown_keys"] == found["sources"][0]["unknown_keys"] == {"score": 3, "turn.name\u202e": 1}
    check(path, "--workers", 0)
    assert "not read  score in 3, turn.name\ufffd in 1 rows" in capsys.readouterr().out


def test_a_rare_kind_is_shown_behind_a_thousand_of_another(tmp_path, capsys):
    path = write(tmp_path, [{**row(i), "id": 5} for i in range(1100)] + [{**row(7), "id": 6}])
    check(path, "--workers", 0)
    assert "duplicate            row 1101 (line 1101), id 6: same images and texts as row 8" in capsys.readouterr().out


def test_at_most_twenty_findings_are_shown(tmp_path):
    _, report = run(write(tmp_path, [row(1)]))
    shown = [Finding("f", i, None, "", KINDS[i % 9], "no") for i in range(20)]
    text = describe({**report, "findings": {kind: 5 for kind in KINDS}}, shown)
    assert text.count(": no\n") == 20 and f"... and {5 * len(KINDS) - 20} more" in text


def test_nothing_usable_at_all(tmp_path, capsys):
    path = write(tmp_path, [row(1, image="none.jpg")])
    assert check(path, "--model", TOKENIZER, "--workers", 0) == 1
    assert "rows      1, of which 0 can be used" in capsys.readouterr().out


def test_the_help_names_every_kind_and_field(tmp_path):
    _, report = run(write(tmp_path, [row(1)]), Settings(tokenizer=Tokenizer.load(TOKENIZER)))
    names = {*KINDS, *report, *report["tokens"], *report["images"], *report["packing"], *report["sources"][0]}
    assert not [name for name in names if name not in Check.__doc__]


@pytest.mark.parametrize("options, says", [
    (["--max-length", 99], "--max-length needs --model"),
    (["--visual-tokens", 100], "--visual-tokens needs --model"),
    (["--allow", "duplicates"], "--allow duplicates: there is no such kind of finding; there are malformed, "),
    (["--tiles-per-sequence", 0], "--tiles-per-sequence is 0: it must be at least 1"),
    (["--workers", -1], "--workers is -1"),
    (["--template", "vicuna"], "unknown template 'vicuna'; did you mean 'vicuna_v1'"),
    (["--model", "none"], "none: no such model or tokenizer"),
])
def test_options_that_cannot_be(options, says, tmp_path):
    path = write(tmp_path, [row(1)])
    with pytest.raises((ValueError, FileNotFoundError), match=says) as raised:
        check(path, *options)
    assert "\n" not in str(raised.value)


def test_exit_codes_of_the_command(tmp_path):
    good, bad = write(tmp_path, [row(1)], "good.jsonl"), write(tmp_path, [row(1, image="none.jpg")], "bad.jsonl")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": 1, "conversations": []},')
    for path, code in ((good, 0), (bad, 1), (broken, 2)):
        ran = run_command("prepare", "check", path, "--json", "--workers", 0)
        assert ran.code == code, ran.err
        if code == 2:
            assert ran.out == "" and "broken JSON" in ran.err and ran.err.count("\n") == 1
        else:
            assert json.loads(ran.out)["ok"] == (code == 0) and ran.err == ""
