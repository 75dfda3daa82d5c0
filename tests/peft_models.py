"""Models that PEFT wraps, with random adapters, and their logits in torch."""

import copy
import dataclasses
import re

import numpy as np
import peft
import torch

from llava_jax.config import Lora
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import load_checkpoint, source

DECODER = r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
IMAGE = 1990
"""Id of the image token in transformers' model."""


def adapted(model, **settings):
    """The model wrapped by PEFT, with random adapters and, in `modules_to_save`, other weights."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"r": 4, "lora_alpha": 12} | settings))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.2)
    return wrapped.eval()


def torch_logits(model, tokens, images):
    ids = torch.tensor(tokens.copy()).long()
    ids[ids == IMAGE_TOKEN_ID] = IMAGE
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()


def with_adapters(hf_dir, trained="projector/", **settings):
    """The model of `hf_dir` with random adapters and other values of what `trained` matches."""
    config, parameters = load_checkpoint(hf_dir, template="vicuna_v1")
    config = dataclasses.replace(config, lora=Lora(**{"rank": 4, "alpha": 12.0, "dropout": 0.1} | settings))
    rng = np.random.default_rng(3)
    for path, shape in source.shapes(config).items():
        if path not in parameters or re.match(trained, path):
            parameters[path] = rng.normal(0, 0.2, shape).astype(np.float32)
    return config, parameters
