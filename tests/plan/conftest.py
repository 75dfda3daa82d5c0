"""A tiny recipe whose checkpoints are config.json files alone, and an environment that planning leaves as it was."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.plan.kernels import KernelCost
from llava_jax.weights.configs import hf_text, hf_vision

VISION = VisionConfig(image_size=28, patch_size=14, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=2)
TEXT = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2, num_kv_heads=2,
                   head_dim=128)


@pytest.fixture(autouse=True)
def environment():
    """What planning sets for libtpu must not reach the processes that other tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def kernels_of_known_cost(request, monkeypatch):
    """A kernel takes a process and some seconds to measure, which test_kernels.py tests."""
    if "test_kernels" not in request.node.nodeid:
        monkeypatch.setattr("llava_jax.plan.kernels.measure", lambda chip, job: KernelCost(8, 1000, 9000))


@pytest.fixture(scope="session")
def needs_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed: pip install 'llava_jax[plan]'")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> config.Recipe:
    folder = tmp_path_factory.mktemp("tiny")
    for name, raw in (("vision", hf_vision(VISION)), ("language", hf_text(TEXT, TEXT.vocab_size))):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(raw))
    data = config.Data(path="nowhere.json", sequence_length=128, tiles_per_sequence=2)
    return config.Recipe(
        model=config.Model(vision=str(folder / "vision"), language=str(folder / "language")),
        stages={
            "align": config.Stage((("projector/.*", 1e-3), ("(vision|decoder)/.*", None)), data, batch_size=8),
            "instruct": config.Stage((("(projector|decoder)/.*", 1e-3), ("vision/.*", None)), data, batch_size=8)},
        output="nowhere")


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory) -> Path:
    """The same recipe as a file."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.py"
    file.write_text(f"from llava_jax.config import *\n\n\ndef recipe():\n    return {tiny!r}\n")
    return file


@pytest.fixture(scope="session")
def planned(needs_libtpu, tiny):
    """The model, the mesh and the compiled step of stage instruct on v5e-4: the one compilation of many tests."""
    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.plan.models import planned_config
    from llava_jax.plan.step import compile_step
    from llava_jax.plan.topologies import parse

    where, (model, _) = parse("v5e-4"), planned_config(tiny.model)
    mesh = make_mesh(tiny.mesh, where.jax_devices())
    return model, mesh, compile_step(tiny, "instruct", where, mesh, model)
