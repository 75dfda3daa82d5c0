"""Damaged small files of a model end in one line that names the file: no traceback, no hang, no gigabyte of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import convert

SCRIPT = Path(__file__).with_name("mutations.py")
TOKENIZER = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json"]
FILES = {
    "hf": ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "model.safetensors.index.json", "chat_template.jinja", *TOKENIZER],
    "native": ["config.json", "generation_config.json", "model.safetensors.index.json"],
    "original": ["config.json", "vision_tower/config.json", "vision_tower/preprocessor_config.json"],
}


@pytest.mark.parametrize("layout, count", [
    ("hf", 3), ("native", 3), *(pytest.param(layout, 200, marks=pytest.mark.slow) for layout in FILES)])
def test_damaged_files_are_told(hf_dir, tmp_path, layout, count):
    model = tmp_path / "model"
    convert.main([str(hf_dir), str(model), "--to", layout, "--shard-size", "100KB"])
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, SCRIPT, model, "0", str(count), *FILES[layout]], env=environment, text=True,
                          capture_output=True, timeout=3600)
    last = (done.stdout.splitlines() or [""])[-1]
    assert done.returncode == 0 and last.endswith(" 0 wrong"), done.stdout[-3000:] + done.stderr[-1000:]
