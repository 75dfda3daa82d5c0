"""scripts/score_published.py on a made-up folder of the same layout: what agrees, what differs, what is not there."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "tokenizer.model"
EVAL = "llava/playground/data/eval"


def run(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, REPOSITORY / "scripts" / "score_published.py", folder], text=True,
                          capture_output=True, timeout=300)


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path) -> Path:
    """MM-Vet's questions with answers and upload, and the ids of the prompts by hand."""
    texts = ["What is x? ", " And y?"]
    questions = [{"question_id": n, "image": "v.png", "text": text} for n, text in enumerate(texts)]
    lines(tmp_path / EVAL / "mm-vet" / "llava-mm-vet.jsonl", questions)
    tokens = tmp_path / "derived" / "tokenizers" / "llama_legacy_false"
    tokens.mkdir(parents=True)
    shutil.copy(GOLDEN, tokens)
    tokenizer, rows = Tokenizer.load(tokens), []
    for n, text in enumerate(texts):
        before, after = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the user's questions. USER: <image>\n{text} ASSISTANT:").split("<image>")
        ids = [*tokenizer.encode(before, bos=True), -200, *tokenizer.encode(after)]
        rows.append(["mmvet", n, hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]])
    lines(tmp_path / "derived" / "prompts" / "ids_legacy_false.jsonl", [*rows, ["pope", 1, "0" * 12]])
    for size in ("7b", "13b"):
        lines(tmp_path / EVAL / "mm-vet" / "answers" / f"llava-v1.5-{size}.jsonl", [
            {"question_id": n, "prompt": text, "text": f"{size} {n}"} for n, text in enumerate(texts)])
        results = tmp_path / EVAL / "mm-vet" / "results" / f"llava-v1.5-{size}.json"
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps({f"v1_{n}": f"{size} {n}" for n in range(2)}))
    return tmp_path


def test_what_agrees_and_what_is_not_there(folder):
    process = run(folder)
    assert process.returncode == 0, process.stderr
    printed = process.stdout
    assert "MM-Vet's upload, LLaVA-1.5 7B                          2          2\n" in printed
    assert "prompts of mmvet                                       2          2\n" in printed
    assert "mme: left out from here, derived/mme is not there" in printed
    assert "prompts of pope left out: " in printed and "3 figures, ours beside the published; 0 differ" in printed


def test_a_figure_that_differs_is_told(folder):
    path = folder / EVAL / "mm-vet" / "llava-mm-vet.jsonl"
    path.write_text(path.read_text().replace("And y", "And z"))
    results = folder / EVAL / "mm-vet" / "answers" / "llava-v1.5-7b.jsonl"
    results.write_text(results.read_text().replace("And y", "And z").replace("7b 1", "7b one"))
    other = folder / EVAL / "mm-vet" / "answers" / "llava-v1.5-13b.jsonl"
    other.write_text(other.read_text().replace("And y", "And z"))
    process = run(folder)
    assert process.returncode == 1
    assert process.stdout.count("DIFFERS") == 2 and "1          2   DIFFERS" in process.stdout


def test_nothing_to_compare(tmp_path):
    assert run(tmp_path).returncode == 2
