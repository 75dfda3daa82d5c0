"""Run by test_sharding.py in processes of its own: three train steps on a mesh; saves losses and parameters.

python sharded_steps.py OUT.npz full|qlora DATA FSDP TENSOR [DATA FSDP TENSOR ...]
"""

import dataclasses
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, abstract_params, init_params
from llava_jax.models.quantized import store_kernel
from llava_jax.models.vit import VisionConfig
from llava_jax.parallel import sharding
from llava_jax.parallel.processes import initialize
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.step import init_state, make_train_step

MODEL = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4),
    text=LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=12))
STAGE = config.Stage(
    learning_rates=(("vision/.*", None), ("projector/.*", 1e-2), ("decoder/.*", 1e-3)),
    data=config.Data(path="unused"), optimizer=config.Optimizer(clip=1.0))
LORA = dataclasses.replace(MODEL, lora=config.Lora(rank=4, alpha=8.0, dropout=0.2, targets=(
    *config.Lora().targets, "vision/layers/attention/(q|o)_proj")))
# A large eps, because Adam would enlarge the rounding of tiny gradients.
LORA_STAGE = dataclasses.replace(STAGE, optimizer=config.Optimizer(clip=1.0, eps=1e-3), learning_rates=(
    ("projector/.*|.*/lora_.*", 1e-2), ("(vision|decoder)/(?!.*/lora_).*", None)))
MICRO, ROWS, LENGTH = 2, 8, 24


def make_batch() -> dict[str, np.ndarray]:
    """Rows of two conversations with one image each, different numbers of learned tokens, and padding."""
    rng = np.random.default_rng(0)
    shape = (MICRO, ROWS, LENGTH)
    tokens = rng.integers(0, 101, shape).astype(np.int32)
    tokens[..., 1:5] = tokens[..., 13:17] = IMAGE_TOKEN_ID
    segments = np.repeat([1, 2, 0], [12, 10, 2])
    learned = (rng.random(shape) < rng.random((*shape[:2], 1))) & (tokens >= 0) & (segments > 0)
    learned[..., [0, 12]] = False
    is_visual = tokens == IMAGE_TOKEN_ID
    return {
        "tokens": tokens,
        "labels": np.where(learned, tokens, IGNORE).astype(np.int32),
        "positions": np.broadcast_to(np.r_[0:12, 0:12], shape).astype(np.int32),
        "segment_ids": np.broadcast_to(segments, shape).astype(np.int32),
        "visual_index": np.where(is_visual, np.cumsum(is_visual, axis=-1) - 1, -1).astype(np.int32),
        "tiles": rng.integers(0, 256, (MICRO, ROWS, 2, 28, 28, 3)).astype(np.uint8),
    }


def run(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], remat: str = "full",
        offload: bool = False, qlora: bool = False) -> dict[str, np.ndarray]:
    """Losses, gradient norms and trained parameters after three steps; `qlora`: of adapters beside kernels in nf4."""
    model, stage = (LORA, LORA_STAGE) if qlora else (MODEL, STAGE)
    graph, shapes = abstract_params(model, remat=remat)
    shardings = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: init_params(model), out_shardings=shardings)()
        rates = trainable_paths(stage, list(parameters))
        tx = make_optimizer(stage, rates, 10)
        state = init_state(tx, {path: parameters[path] for path in rates}, offload)
        frozen = {path: x for path, x in parameters.items() if path not in rates}
        if qlora:
            frozen = {path: store_kernel(path, x, "nf4") for path, x in frozen.items()}
        step = make_train_step(graph, tx, state)
        rows = NamedSharding(mesh, P(None, ("data", "fsdp")))
        # Every process knows the whole batch here and gives the devices that are its own their rows.
        batch = {name: jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index])
                 for name, x in batch.items()}
        out = {}
        for i in range(3):
            state, metrics = step(state, frozen, batch)
            out |= {f"{name}_{i}": np.asarray(value) for name, value in metrics.items()}
        gather = multihost_utils.process_allgather if jax.process_count() > 1 else lambda x, tiled: np.asarray(x)
        return out | {path: gather(x, tiled=True) for path, x in state.trainable.items()}


if __name__ == "__main__":
    initialize()
    out, kind, *sizes = sys.argv[1:]
    sizes = [int(size) for size in sizes]
    for i in range(0, len(sizes), 3):
        axes = config.Mesh(*sizes[i : i + 3])
        count = axes.data * axes.fsdp * axes.tensor
        result = run(sharding.make_mesh(axes, jax.devices()[:count]), make_batch(), qlora=kind == "qlora")
        if jax.process_index() == 0:
            np.savez(f"{out}_{axes.data}_{axes.fsdp}_{axes.tensor}.npz", **result)
