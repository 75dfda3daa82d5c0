"""Run by test_gradients.py in a process of eight devices: gradients on meshes beside those of one device.

python sharded_gradients.py CASE [CASE ...]. A CASE is MODEL:TRAINED:REMAT:DATA,FSDP,TENSOR, where TRAINED is a
regular expression over parameter paths. Writes a JSON line for each case: by parameter, its largest gradient and the
largest difference between the mesh and one device; and how many arrays of both programs have the size of the complete
output kernel. Models whose name starts with "large" have a large vocabulary on the mesh, and a small one on one device.
"""

import dataclasses
import functools
import json
import re
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from sharded_steps import make_batch

from llava_jax import config
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, abstract_params, init_params
from llava_jax.models.vit import VisionConfig
from llava_jax.parallel import sharding
from llava_jax.train import loss
from llava_jax.train.step import loss_sum

# Every sharded dimension divides by eight.
BASE = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=8),
    text=LlamaConfig(vocab_size=101, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=16, num_kv_heads=8,
                     head_dim=8),
    feature_layer=-1)
BIASED = dataclasses.replace(BASE.text, qkv_bias=True, out_bias=True, mlp_bias=True)
MODELS = {kind: dataclasses.replace(BASE, projector=kind)
          for kind in ("identity", "linear", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu")}
NEWLINES = dataclasses.replace(BASE.processor, mode="anyres", pinpoints=((28, 56),), max_tiles=1)
LORA = config.Lora(rank=8, dropout=0.0, targets=(
    r"(vision|decoder)/layers/(attention/(q|k|v|o)_proj|mlp/(gate|up|down)_proj)", r"projector/layers_\d"))
MODELS |= {"biases": dataclasses.replace(BASE, text=BIASED, projector="mlp3x_gelu", processor=NEWLINES, lora=LORA,
                                         vision=dataclasses.replace(BASE.vision, patch_bias=True)),
           "tied": dataclasses.replace(BASE, text=dataclasses.replace(BASE.text, tie_word_embeddings=True))}
MODELS |= {"large": BASE, "large_tied": MODELS["tied"]}
"""One model for every kind of layer: each row of the sharding table must match a parameter of one of them."""


@functools.cache
def parameters(model: str) -> dict[str, np.ndarray]:
    """The same on every mesh; no bias is 0 and no scale 1, so that each has its own gradient."""
    rng = np.random.default_rng(0)
    return {path: np.asarray(x) + 0.02 * rng.standard_normal(x.shape).astype(np.float32)
            for path, x in init_params(MODELS[model]).items()}


@functools.cache
def gradients(model: str, trained: str, remat: str, sizes: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], int]:
    """The loss, and its gradient by every parameter whose path matches `trained`; the number of complete kernels."""
    sharding.LARGE_VOCABULARY = 64 if model.startswith("large") and max(sizes) > 1 else 65_536
    loss.NUM_LANES, loss.MAX_COLUMNS = 16, 48
    mesh = sharding.make_mesh(config.Mesh(*sizes), jax.devices()[: np.prod(sizes)])
    graph, shapes = abstract_params(MODELS[model], remat=remat)
    layout = sharding.parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    rows = NamedSharding(mesh, sharding.ROWS)
    with jax.set_mesh(mesh):
        placed = {path: jax.device_put(x, layout[path]) for path, x in parameters(model).items()}
        batch = {name: x[0] for name, x in make_batch().items()}
        if not MODELS[model].processor.is_fixed:  # one visual token is the newline, behind the features of both tiles
            newline = 2 * MODELS[model].processor.features_per_tile
            batch["visual_index"][:, 4] = newline
            corners = [(batch["visual_index"] + offset) % (newline + 1) for offset in range(4)]
            batch["visual_index"] = np.stack(corners, axis=-1)
            batch["visual_weight"] = np.random.default_rng(1).random(batch["visual_index"].shape, np.float32)
        batch = {name: jax.device_put(x, rows) for name, x in batch.items()}
        learned = {path: x for path, x in placed.items() if re.fullmatch(trained, path)}
        frozen = {path: x for path, x in placed.items() if path not in learned}
        differentiate = jax.jit(functools.partial(jax.value_and_grad(loss_sum, argnums=1), graph),
                                out_shardings=(None, {path: layout[path] for path in learned}))
        program = differentiate.lower(learned, frozen, batch).compile()
        value, found = program(learned, frozen, batch)
        kernels = re.findall(r"(?:f32|bf16)\[(?:64,(?:101|144)|(?:101|144),64)\]\S* (?!parameter)", program.as_text())
        return {"loss": np.asarray(value)} | {path: np.asarray(x) for path, x in found.items()}, len(kernels)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        model, trained, remat, sizes = case.split(":")
        expected, whole = gradients(model, trained, "none", (1, 1, 1))
        found, kernels = gradients(model, trained, remat, tuple(map(int, sizes.split(","))))
        print(json.dumps({"case": case, "kernels": [whole, kernels], "differences": {
            path: [float(np.abs(x).max()), float(np.abs(found[path] - x).max())] for path, x in expected.items()}}))
