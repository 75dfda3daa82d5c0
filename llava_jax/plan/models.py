"""Finds the model of a recipe without its checkpoints: sizes of published models are known by their names."""

import re
from pathlib import Path

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.train.setup import model_config
from llava_jax.weights import read_config

_LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40, "num_kv_heads": 40}
_LLAMA_3 = {"vocab_size": 128256, "intermediate_size": 14336, "num_kv_heads": 8, "max_length": 8192}
_MISTRAL = {"intermediate_size": 14336, "num_kv_heads": 8, "max_length": 32768}
_QWEN2 = {"qkv_bias": True, "max_length": 32768}
_HUB_VOCABULARY = 32064
_CLIP_PINPOINTS = "(336x672),(672x336),(672x672),(1008x336),(336x1008)"

_QWEN2_SIZES = {
    "0.5b": LlamaConfig(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, **_QWEN2),
    "7b": LlamaConfig(152064, 3584, 18944, 28, 28, 4, **_QWEN2)}
_SIGLIP = VisionConfig(384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", class_token=False, patch_bias=True,
                       pre_norm=False)


def _next(**sizes) -> LlavaConfig:
    return LlavaConfig(text=LlamaConfig(**sizes)).with_image_mode("anyres", _CLIP_PINPOINTS)


def _onevision(size: str) -> LlavaConfig:
    model = LlavaConfig(vision=_SIGLIP, text=_QWEN2_SIZES[size])
    return model.with_image_mode("anyres_max_9", "(1x1),...,(6x6)")


KNOWN = tuple((re.compile(pattern), sizes) for pattern, sizes in (
    (r"clip-vit-large-patch14", VisionConfig(image_size=224)),
    (r"clip-vit-large-patch14-336(px)?", VisionConfig()),
    (r"clip-vit-base-patch(16|32)", lambda side: VisionConfig(224, int(side), 768, 3072, 12, 12)),
    (r"siglip-so400m-patch14-384", _SIGLIP),
    (r"vicuna-7b(-v1\.[135])?|llama-2-7b(-hf|-chat|-chat-hf)?|llama-7b(-hf)?", LlamaConfig()),
    (r"vicuna-13b(-v1\.[135])?|llama-2-13b(-hf|-chat|-chat-hf)?|llama-13b(-hf)?", LlamaConfig(**_LLAMA_13B)),
    (r"(?:meta-)?llama-3(?:\.1)?-8b(?:-instruct)?(-hf)?", LlamaConfig(**_LLAMA_3)),
    (r"mistral-7b(-instruct)?-v0\.[12]", LlamaConfig(**_MISTRAL)),
    (r"mistral-7b(-instruct)?-v0\.3", LlamaConfig(vocab_size=32768, **_MISTRAL)),
    (r"qwen2(?:\.5)?-(0\.5b|7b)(?:-instruct)?", _QWEN2_SIZES.get),
    (r"qwen2(\.5)?-1\.5b(-instruct)?", LlamaConfig(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True, **_QWEN2)),
    (r"qwen2\.5-3b(-instruct)?", LlamaConfig(151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True, **_QWEN2)),
    (r"llava-(v?1\.5)-7b(-hf)?", LlavaConfig(text=LlamaConfig(vocab_size=_HUB_VOCABULARY))),
    (r"llava-(v?1\.5)-13b(-hf)?", LlavaConfig(text=LlamaConfig(vocab_size=_HUB_VOCABULARY, **_LLAMA_13B))),
    (r"llava-v1\.6-vicuna-7b(-hf)?", _next(vocab_size=_HUB_VOCABULARY)),
    (r"llava-v1\.6-vicuna-13b(-hf)?", _next(vocab_size=_HUB_VOCABULARY, **_LLAMA_13B)),
    (r"llava-v1\.6-mistral-7b(-hf)?", _next(vocab_size=_HUB_VOCABULARY, **_MISTRAL)),
    (r"(?:llama3-llava-next-8b|llava-next-llama3-8b)(-hf)?", _next(**_LLAMA_3)),
    (r"llava-onevision-qwen2-(0\.5b|7b)-(?:si|ov|ov-chat)(?:-hf)?", _onevision),
))
"""Sizes by the names of directories on the hub, in lower case. Values that do not shape the program (the base of the
rotary embedding, the epsilon of norms) are defaults."""


def planned_config(model: config.Model) -> tuple[LlavaConfig, list[str]]:
    """Returns the configuration of a recipe's model, and a note for every part whose published sizes are used.

    Raises UserError if a directory does not exist and its name is not that of a published model.
    """
    notes = []

    def read(directory: str, template: str | None = None,
             vision: str | None = None) -> LlavaConfig | VisionConfig | LlamaConfig:
        if Path(directory).is_dir():
            return read_config(directory, template, vision)
        sizes = known(directory)
        notes.append(f"{directory} does not exist: the published sizes of {Path(directory).name} are used")
        return sizes

    return model_config(model, read), notes


def known(directory: str) -> LlavaConfig | VisionConfig | LlamaConfig:
    """Returns the sizes of the published model with the name of a directory. Raises UserError if there is none."""
    name = Path(directory).name.lower()
    for pattern, sizes in KNOWN:
        if found := pattern.fullmatch(name):
            return sizes(*found.groups()) if callable(sizes) else sizes
    raise UserError(f"{directory}: no such directory, and {Path(directory).name!r} is no published model that "
                            "is known here; its config.json in that directory is enough to plan")
