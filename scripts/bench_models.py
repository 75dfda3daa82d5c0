"""Makes the models of bench_train.py and bench_decode.py: equal random weights for llava_jax and transformers."""

import tempfile

import jax
import numpy as np

from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, Parameters
from llava_jax.models.vit import VisionConfig
from llava_jax.weights.checkpoint import load_checkpoint
from llava_jax.weights.configs import hf_config

SIZES = {
    # The size of configs/mini.py.
    "mini": LlavaConfig(
        VisionConfig(image_size=60, patch_size=10, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4),
        LlamaConfig(vocab_size=1280, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=4,
                    head_dim=32, qkv_bias=True, out_bias=True, tie_word_embeddings=True)),
    "30m": LlavaConfig(
        VisionConfig(image_size=168, patch_size=14, hidden_size=192, intermediate_size=768, num_layers=6, num_heads=3),
        LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1376, num_layers=7, num_heads=8, num_kv_heads=8,
                    head_dim=64)),
    "100m": LlavaConfig(
        VisionConfig(image_size=168, patch_size=14, hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=4),
        LlamaConfig(vocab_size=4096, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12,
                    num_kv_heads=12, head_dim=64)),
    # The size of LLaVA-1.5 7B.
    "7b": LlavaConfig(VisionConfig(), LlamaConfig()),
}


def torch_model(config: LlavaConfig, device: str = "cpu", dtype: str = "float32"):
    """Returns transformers' LLaVA with sdpa attention, and weights large enough for every part to affect the output."""
    import torch
    from transformers import LlavaConfig as HubConfig
    from transformers import LlavaForConditionalGeneration

    image = image_id(config)
    raw = hf_config(config, {"image": image, "pad": 0, "bos": 1, "eos": 2}, config.text.vocab_size, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            HubConfig(**raw), attn_implementation="sdpa", dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    model.generation_config.eos_token_id = None  # answers end at their limit
    return model


def parameters_of(model) -> Parameters:
    """Returns a torch model's weights, read from its saved files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_checkpoint(folder)[1]


def image_id(config: LlavaConfig) -> int:
    """Returns the id of the image token in transformers, which no text here uses."""
    return config.text.vocab_size - 1


def count(parameters: Parameters) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(parameters))


def pixel_values(tiles: np.ndarray):
    """Converts tiles, uint8 [N, H, W, 3], to the input of transformers: a normalised tensor [N, 3, H, W]."""
    import torch

    from llava_jax.images import ImageProcessor

    return torch.from_numpy(np.ascontiguousarray(ImageProcessor().normalise(tiles).transpose(0, 3, 1, 2)))


def machine() -> str:
    """Returns one line on the machine and the versions that the figures depend on."""
    import os
    import platform

    import torch
    import transformers

    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return (f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; jax {jax.__version__} on "
            f"{devices}; torch {torch.__version__} with {torch.get_num_threads()} threads, "
            f"transformers {transformers.__version__}")
