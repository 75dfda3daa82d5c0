"""A model on eight fake devices answers as it does on one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.inference.llava import load
from llava_jax.parallel import sharding

SCRIPT = Path(__file__).with_name("mesh_answers.py")


def answers(out: Path, model: Path, *meshes: str) -> dict:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    process = subprocess.run([sys.executable, str(SCRIPT), str(out), str(model), *meshes], text=True,
                             capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert process.returncode == 0, process.stderr
    assert "onat" not in process.stderr, process.stderr  # the cache is donated, and is taken
    return json.loads(out.read_text())


def test_a_mesh_answers_as_one_device(model_dir, tmp_path):
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "one", model_dir, "none")  # here, where there is one device
    one = json.loads((tmp_path / "one").read_text())["none"]
    assert len({tuple(tokens) for tokens in one["tokens"]}) == 5
    eight = answers(tmp_path / "eight", model_dir, "2,2,2", "1,1,2")
    two = eight.pop("1,1,2")
    assert two["slots"] == one["slots"]
    assert two["kernels"] == one["slots"]["None"]
    assert two["int8 kernels"] == one["int8 slots"]
    assert one["slots"]["None"] == one["tokens"][:2]
    for sizes, found in eight.items():
        assert found["tokens"] == one["tokens"], sizes
        assert found["int8"] == one["int8"]
        np.testing.assert_allclose(found["likelihoods"], one["likelihoods"], atol=1e-3)
        assert found["devices"] == [8]
    assert [found["smallest_share"] for found in eight.values()] == [1 / 4]


def test_what_does_not_divide_is_named(model_dir, monkeypatch):
    class Eight:
        platform, process_index = "cpu", 0

    # Two key-value heads on eight devices. Before anything of the model is read.
    mesh = sharding.make_mesh(config.Mesh(1, 1, 8), [Eight() for _ in range(8)])
    with pytest.raises(UserError, match=r"mesh: decoder/.* does not divide by tensor = 8"):
        load(model_dir, "float32", mesh)
