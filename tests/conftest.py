"""Small checkpoints and data that several tests start from; torch and transformers make them."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import shapes
from hypothesis import settings
from PIL import Image

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation: LLVM's optimisation doubles it, and so do the fusion emitters.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
                                   "--xla_cpu_parallel_codegen_split_count=1")

# All workers and subprocesses of a session share one compilation cache. The flags above are part of its keys.
OWN_CACHE = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="llava_jax-tests-")
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

shapes.install()  # before the modules are imported

# No deadline, because a busy machine would miss it; no data base, because it is a folder in the checkout.
settings.register_profile("suite", deadline=None, database=None)
settings.load_profile("suite")

GOLDEN = Path(__file__).parent / "golden"


def make_parts(folder: Path) -> tuple[Path, Path]:
    """A tiny CLIP vision tower and a tiny LLaMA, random, with the golden tokenizer, as transformers saves them."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14))
    language = LlamaForCausalLM(LlamaConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2))
    vision.save_pretrained(folder / "vision")
    language.save_pretrained(folder / "language")
    shutil.copy(GOLDEN / "tokenizer.model", folder / "language")
    return folder / "vision", folder / "language"


def make_data(folder: Path, records: int = 24, seed: int = 0) -> Path:
    """Conversations of one or two rounds about one picture, about two, or about none; `folder/data.json`."""
    rng = np.random.default_rng(seed)
    words = "red green blue circle square triangle one two three left right above below".split()
    rows = []
    for i in range(records):
        images = [f"{i}_{k}.png" for k in range((1, 1, 2, 0)[i % 4])]
        for name in images:
            Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)).save(folder / name)
        turns = []
        for turn in range(1 + i % 2):
            marks = "<image>\n" * len(images) if turn == 0 else ""
            turns.append({"from": "human", "value": marks + "What is " + " ".join(rng.choice(words, 3)) + "?"})
            turns.append({"from": "gpt", "value": " ".join(rng.choice(words, 1 + i % 5))})
        rows.append({"id": i, "conversations": turns} | ({"image": images} if images else {}))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def commands_end_no_test(monkeypatch):
    """A command that runs within a test (`cli.run`) neither ends the process later nor keeps its SIGTERM handler."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("llava_jax.cli._end_within", lambda seconds, code: None)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A random model, sharpened, so that what it answers is nonsense of its own for every question."""
    from llava_jax.models.llama import LlamaConfig
    from llava_jax.models.llava import LlavaConfig, init_params
    from llava_jax.models.vit import VisionConfig
    from llava_jax.weights.checkpoint import save_native

    config = LlavaConfig(
        vision=VisionConfig(image_size=14, patch_size=7, hidden_size=16, intermediate_size=16, num_layers=1,
                            num_heads=2),
        text=LlamaConfig(vocab_size=2000, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2,
                         num_kv_heads=2, head_dim=16, max_length=384),
        feature_layer=-1)
    parameters = {path: value if path.endswith("norm/scale") else 20 * value
                  for path, value in init_params(config, seed=1).items()}
    directory = tmp_path_factory.mktemp("talker") / "model"
    save_native(directory, config, parameters, GOLDEN)
    return directory
