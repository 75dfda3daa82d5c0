"""Finds the model of a recipe without its checkpoints: sizes of published models are known by their names."""

import re
from dataclasses import replace
from pathlib import Path

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.train.setup import model_config
from llava_jax.weights import read_config

_SIGLIP = VisionConfig(384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", class_token=False, patch_bias=True,
                       pre_norm=False)
_QWEN2 = {"qkv_bias": True, "max_length": 32768}
_TIED = {"tie_word_embeddings": True, **_QWEN2}
TEXT = {
    "7b": LlamaConfig(), "13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40),
    "llama3": LlamaConfig(128256, intermediate_size=14336, num_kv_heads=8, max_length=8192),
    "mistral": LlamaConfig(intermediate_size=14336, num_kv_heads=8, max_length=32768),
    "qwen2-0.5b": LlamaConfig(151936, 896, 4864, 24, 14, 2, 64, **_TIED),
    "qwen2-1.5b": LlamaConfig(151936, 1536, 8960, 28, 12, 2, **_TIED),
    "qwen2-3b": LlamaConfig(151936, 2048, 11008, 36, 16, 2, **_TIED),
    "qwen2-7b": LlamaConfig(152064, 3584, 18944, 28, 28, 4, **_QWEN2)}


def _next(name: str) -> LlavaConfig:
    text = TEXT[name] if name == "llama3" else replace(TEXT[name], vocab_size=32064)
    return LlavaConfig(text=text).with_image_mode("anyres", "(336x672),(672x336),(672x672),(1008x336),(336x1008)")


KNOWN = (
    (r"clip-vit-large-patch14(-336(?:px)?)?", lambda large: VisionConfig(image_size=336 if large else 224)),
    (r"clip-vit-base-patch(16|32)", lambda side: VisionConfig(224, int(side), 768, 3072, 12, 12)),
    (r"siglip-so400m-patch14-384()", lambda _: _SIGLIP),
    (r"vicuna-(7b|13b)(?:-v1\.[135])?|llama-2-(7b|13b)(?:-hf|-chat|-chat-hf)?|llama-(7b|13b)(?:-hf)?", TEXT.get),
    (r"(?:meta-)?llama-3(?:\.1)?-8b(?:-instruct)?(?:-hf)?()", lambda _: TEXT["llama3"]),
    (r"mistral-7b(?:-instruct)?-v0\.([123])",
     lambda version: replace(TEXT["mistral"], vocab_size=32768 if version == "3" else 32000)),
    (r"(?:qwen2(?:\.5)?-(0\.5b|1\.5b|7b)|qwen2\.5-(3b))(?:-instruct)?", lambda size: TEXT[f"qwen2-{size}"]),
    (r"llava-v?1\.5-(7b|13b)(?:-hf)?", lambda size: LlavaConfig(text=replace(TEXT[size], vocab_size=32064))),
    (r"llava-v1\.6-(?:vicuna-(7b|13b)|(mistral)-7b)(?:-hf)?", _next),
    (r"(?:(llama3)-llava-next-8b|llava-next-(llama3)-8b)(?:-hf)?", _next),
    (r"llava-onevision-qwen2-(0\.5b|7b)-(?:si|ov|ov-chat)(?:-hf)?", lambda size: LlavaConfig(
        vision=_SIGLIP, text=TEXT[f"qwen2-{size}"]).with_image_mode("anyres_max_9", "(1x1),...,(6x6)")))
"""Sizes by the names of directories on the hub, in lower case. Values that do not shape the program (the base of the
rotary embedding, the epsilon of norms) are defaults."""


def planned_config(model: config.Model) -> tuple[LlavaConfig, list[str]]:
    """Returns the configuration of a recipe's model, and a note for every part whose published sizes are used.

    Raises UserError if a directory does not exist and its name is not that of a published model.
    """
    notes = []

    def read(directory: str, *options: str | None) -> LlavaConfig | VisionConfig | LlamaConfig:
        if Path(directory).is_dir():
            return read_config(directory, *options)
        sizes = known(directory)
        notes.append(f"{directory} does not exist: the published sizes of {Path(directory).name} are used")
        return sizes

    return model_config(model, read), notes


def known(directory: str) -> LlavaConfig | VisionConfig | LlamaConfig:
    """Returns the sizes of the published model with the name of a directory. Raises UserError if there is none."""
    name = Path(directory).name.lower()
    for pattern, sizes in KNOWN:
        if found := re.fullmatch(pattern, name):
            return sizes(next((group for group in found.groups() if group is not None), ""))
    raise UserError(f"{directory}: no such directory, and {Path(directory).name!r} is no published model that "
                    "is known here; its config.json in that directory is enough to plan")
