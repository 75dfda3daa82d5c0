"""Imports point one way, from verbs to nouns, and rooms that need no JAX import none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llava_jax

ROOT = Path(llava_jax.__file__).parent
BASE = {"errors", "files", "json_lines", "cli", "progress", "config"}
MODEL = {*BASE, "models", "text", "images", "image_files", "video", "parallel"}
NOUNS = {*MODEL, "weights", "data", "inference", "endpoint", "annotations", "pages"}
ALLOWED = {
    "errors": set(), "files": BASE, "json_lines": BASE, "cli": BASE, "progress": BASE, "image_files": BASE,
    "images": {*BASE, "image_files"}, "video": {*BASE, "image_files"},
    "config": {*BASE, "image_files", "images", "video"},
    "text": BASE, "parallel": BASE, "models": MODEL,
    "data": MODEL - {"models", "parallel"}, "weights": MODEL,
    "inference": {*MODEL, "weights", "data"}, "endpoint": BASE, "annotations": {*BASE, "data"},
    "pages": {*BASE, "image_files"},
    **dict.fromkeys(("train", "prepare", "synthesize", "evaluate", "generate", "serve"), NOUNS),
    "plan": {*NOUNS, "train"},  # it compiles the very step of `train`
    "convert": {*NOUNS, "train"},  # it exports checkpoints of a run
}
"""Room -> the rooms that it may import, besides itself."""
EXCEPTIONS = {("evaluate/judge/make_bench.py", "synthesize")}  # its questions are synthesised
SOCKETS = {"socket", "subprocess", "http", "urllib", "asyncio"}
NO_SOCKETS = ("models", "text", "images.py", "image_files.py", "parallel/sharding.py")


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_point_one_way():
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        room = path.split("/")[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in sorted(imports(file)):
            parts = name.split(".")
            other = parts[1] if parts[0] == "llava_jax" and len(parts) > 1 else room
            is_public = other in ("load", "Llava")  # what llava_jax/__init__.py offers
            if other not in {room, *ALLOWED[room]} and not is_public and (path, other) not in EXCEPTIONS:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_every_room_is_in_the_table():
    rooms = {path.name.removesuffix(".py") for path in ROOT.iterdir()
             if path.suffix == ".py" or any(path.glob("**/*.py"))}  # folders of an older checkout hold caches
    assert rooms - {"__init__", "__pycache__", "configs"} == ALLOWED.keys()


def test_models_open_no_sockets():
    for place in NO_SOCKETS:
        for file in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            names = imports(file)
            assert not {name.split(".")[0] for name in names} & SOCKETS, file
            assert not any(name.startswith("llava_jax.parallel.processes") for name in names), file


@pytest.mark.parametrize("modules", [
    "llava_jax.text.templates, llava_jax.text.encode, llava_jax.text.tokenizer", "llava_jax.images",
    "llava_jax.annotations.context, llava_jax.annotations.scene, llava_jax.annotations.concept_filter",
    "llava_jax.synthesize.commands, llava_jax.synthesize.running", "llava_jax.data.records", "llava_jax.serve.media"])
def test_rooms_without_jax(modules):
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
