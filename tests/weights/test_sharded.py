"""Two processes load checkpoints of every layout together: each reads its part, and both get the same parameters."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from llava_jax import convert
from llava_jax.config import Lora
from llava_jax.weights import load_checkpoint, save_hf, save_peft, sharded, source

SCRIPT = Path(__file__).with_name("sharded_loading.py")


@pytest.fixture
def folder(hf_dir, tmp_path) -> Path:
    """Checkpoints by name: in every layout, an adapter, and one with a value that is not finite."""
    folder = tmp_path / "models"
    shutil.copytree(hf_dir, folder / "hf")
    for layout in ("native", "original"):
        convert.main([str(hf_dir), str(folder / layout), "--to", layout, "--shard-size", "100KB", "--dtype", "keep"])
    tensors = safetensors.torch.load_file(hf_dir / "model.safetensors")
    for name in ("bin", "damaged"):
        shutil.copytree(hf_dir, folder / name)
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][-1, 3] = torch.inf  # in the part of process 1
    safetensors.torch.save_file(tensors, folder / "damaged" / "model.safetensors")
    config, parameters = load_checkpoint(hf_dir)
    adapted = dataclasses.replace(config, lora=Lora(rank=6))
    rng = np.random.default_rng(0)
    factors = {path: rng.normal(size=shape).astype(np.float32) for path, shape in source.shapes(adapted).items()
               if path not in parameters}
    save_peft(folder / "adapter", adapted, parameters | factors, hf_dir)
    return folder


def test_processes_share_the_reading(hf_dir, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [subprocess.Popen([sys.executable, SCRIPT, folder, tmp_path / "saved"], text=True,
                                  env=environment | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE)
                 for i in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    results = [json.loads(output.splitlines()[-1]) for output in outputs]  # Gloo prints lines too
    assert results[0].keys() == {"hf", "native", "original", "bin", "adapter", "damaged"}
    for name in results[0]:
        first, second = (result[name] for result in results)
        if name == "damaged":
            assert first == second and "mlp/up_proj/kernel of layer 1 has values that are not finite" in first
            continue
        assert first[1] == second[1]
        # Vectors are read by both; the rest is shared. The rows of some matrices do not divide by four devices.
        assert first[1] <= first[0] + second[0] <= 1.05 * first[1], name
        assert max(first[0], second[0]) < 0.56 * first[1], name
    save_hf(tmp_path / "whole", *load_checkpoint(hf_dir), hf_dir)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("ranges, joined", [
    ([], []), ([(0, 2)], [(0, 2)]), ([(0, 2), (2, 4), (6, 8), (8, 10)], [(0, 4), (6, 10)])])
def test_neighbours_are_one_read(ranges, joined):
    assert sharded._join_ranges(ranges) == joined
