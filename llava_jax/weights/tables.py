"""Maps tensors of Hugging Face's layout (hf) to parameters, by one table for reading and writing.

Names are those of the checkpoints under llava-hf/ at Hugging Face, which every version of transformers opens. Other
spellings differ in their prefixes (`hf_name`).
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llava_jax.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """Layout of a parameter in the hf layout: axes merged, then permuted. Both directions return views."""

    merge: Callable[[Shape], Shape]
    order: Shape

    def hf_shape(self, shape: Shape) -> Shape:
        """Returns the tensor's shape in the hf layout for a parameter of `shape`."""
        merged = self.merge(shape)
        return tuple(merged[axis] for axis in self.order)

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """Converts a parameter to the hf layout."""
        return x.reshape(self.merge(x.shape)).transpose(self.order)

    def from_hf(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts a tensor of the hf layout to a parameter of `shape`."""
        return x.transpose(np.argsort(self.order)).reshape(shape)


@functools.cache
def same(axes: int) -> Transform:
    """Returns the layout of a parameter that is stored as it is."""
    return Transform(lambda s: s, tuple(range(axes)))


VECTOR = Transform(lambda s: (math.prod(s),), (0,))
SAME = same(2)
ROWS = Transform(lambda s: (math.prod(s[:-1]), s[-1]), (0, 1))
FROM_HIDDEN = Transform(lambda s: (s[0], math.prod(s[1:])), (1, 0))  # kernel [D, ...], weight [..., D]
TO_HIDDEN = Transform(lambda s: (math.prod(s[:-1]), s[-1]), (1, 0))  # kernel [..., D], weight [D, ...]
PATCH = Transform(lambda s: s, (3, 2, 0, 1))  # kernel [height, width, 3, D], weight [D, 3, height, width]

VISION = "vision_tower.vision_model."
LANGUAGE = "language_model.model."
PROJECTOR = "multi_modal_projector."
QKV = ("q_proj", "k_proj", "v_proj")

# Module in the hf layout, parameter, transform of the weight. A bias is a vector in both layouts.
MODULES = (
    (f"{VISION}embeddings.patch_embedding", "vision/patch/kernel", PATCH),
    (f"{VISION}embeddings.position_embedding", "vision/position_embedding", SAME),
    (f"{VISION}pre_layrnorm", "vision/pre_norm/scale", VECTOR),
    (f"{VISION}encoder.layers.*.layer_norm1", "vision/layers/attention_norm/scale", VECTOR),
    *((f"{VISION}encoder.layers.*.self_attn.{x}", f"vision/layers/attention/{x}/kernel", FROM_HIDDEN) for x in QKV),
    (f"{VISION}encoder.layers.*.self_attn.out_proj", "vision/layers/attention/o_proj/kernel", TO_HIDDEN),
    (f"{VISION}encoder.layers.*.layer_norm2", "vision/layers/mlp_norm/scale", VECTOR),
    (f"{VISION}encoder.layers.*.mlp.fc1", "vision/layers/mlp/up_proj/kernel", FROM_HIDDEN),
    (f"{VISION}encoder.layers.*.mlp.fc2", "vision/layers/mlp/down_proj/kernel", TO_HIDDEN),
    (f"{VISION}post_layernorm", "vision/post_norm/scale", VECTOR),
    *((f"{PROJECTOR}linear_{i + 1}", f"projector/layers_{i}/kernel", FROM_HIDDEN) for i in range(99)),
    (f"{LANGUAGE}embed_tokens", "decoder/embedding", SAME),
    (f"{LANGUAGE}layers.*.input_layernorm", "decoder/layers/attention_norm/scale", VECTOR),
    *((f"{LANGUAGE}layers.*.self_attn.{x}", f"decoder/layers/attention/{x}/kernel", FROM_HIDDEN) for x in QKV),
    (f"{LANGUAGE}layers.*.self_attn.o_proj", "decoder/layers/attention/o_proj/kernel", TO_HIDDEN),
    (f"{LANGUAGE}layers.*.post_attention_layernorm", "decoder/layers/mlp_norm/scale", VECTOR),
    (f"{LANGUAGE}layers.*.mlp.gate_proj", "decoder/layers/mlp/gate_proj/kernel", FROM_HIDDEN),
    (f"{LANGUAGE}layers.*.mlp.up_proj", "decoder/layers/mlp/up_proj/kernel", FROM_HIDDEN),
    (f"{LANGUAGE}layers.*.mlp.down_proj", "decoder/layers/mlp/down_proj/kernel", TO_HIDDEN),
    (f"{LANGUAGE}norm", "decoder/norm/scale", VECTOR),
    ("language_model.lm_head", "decoder/lm_head/kernel", FROM_HIDDEN),
)
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Prefixes of names and their replacement; the first match is used. Transformers 4.52 moved all but the head below
# `model.`, 5.6 removed `vision_model.`. A CLIP or LLaMA alone names no part.
PREFIXES = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", VISION),
    (r"(vision_model\.)?(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", VISION),
    (r"(model\.)?multi_modal_projector\.", PROJECTOR),
    (r"(model\.)?(language_model\.)?(model\.)?(?=(embed_tokens|layers|norm)\.)", LANGUAGE),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"(model\.)?image_newline$", "image_newline"),
)

# Constants that old versions stored, text towers, and the pooling head of SigLIP.
IGNORED = re.compile(r".*\.(position_ids|inv_freq)|text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)|"
                     r"((vision_tower\.)?vision_model\.)?head\.(probe|attention|layernorm|mlp)\b.*")


def hf_name(name: str) -> str:
    """Returns a tensor's name in the hf layout; the same name if no prefix matches."""
    for pattern, prefix in PREFIXES:
        if match := re.match(pattern, name):
            return prefix + name[match.end() :]
    return name


@dataclass(frozen=True)
class TensorMapping:
    """The parameter, or layer of a stacked parameter, that a tensor of the hf layout contains."""

    path: str
    layer: int | None
    shape: Shape
    transform: Transform

    @property
    def hf_shape(self) -> Shape:
        return self.transform.hf_shape(self.shape)


def tensor_mappings(shapes: Mapping[str, Shape]) -> dict[str, TensorMapping]:
    """Maps names of tensors in the hf layout to the parameters of these shapes.

    Raises UserError if the layout has no tensor for a parameter. transformers reads `linear_1` and `linear_2` alone.
    """
    rows = [(f"{VISION}embeddings.class_embedding", "vision/class_embedding", VECTOR),  # no module's weight
            ("image_newline", "image_newline", VECTOR)]
    for module, path, transform in MODULES:
        rows.append((f"{module}.weight", path, transform))
        if path.endswith(("/kernel", "/scale")):
            rows.append((f"{module}.bias", re.sub(r"\w+$", "bias", path), VECTOR))
    mappings: dict[str, TensorMapping] = {}
    for name, path, transform in rows:
        if path not in shapes:
            continue
        if is_stacked(path):
            layers, *shape = shapes[path]
            for i in range(layers):
                mappings[name.replace("*", str(i))] = TensorMapping(path, i, tuple(shape), transform)
        else:
            mappings[name] = TensorMapping(path, None, tuple(shapes[path]), transform)
    if unmapped := sorted(shapes.keys() - {mapping.path for mapping in mappings.values()}):
        raise UserError(f"Hugging Face's layout has no tensor for {', '.join(unmapped)}")
    return mappings


def is_stacked(path: str) -> bool:
    """Returns whether the first axis of a parameter counts layers."""
    return "/layers/" in path
