"""Tensors of Hugging Face's layout and the parameters they are: one table, read in both directions.

Names are those of the checkpoints under llava-hf/ on the hub, which every version of transformers opens. Other
spellings become these by their prefixes (`hf_name`).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llava_jax.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How one layer's parameter is laid out there: some of our axes merged, then permuted. Both ways copy nothing."""

    merge: Callable[[Shape], Shape]
    order: Shape

    def hf_shape(self, shape: Shape) -> Shape:
        merged = self.merge(shape)
        return tuple(merged[axis] for axis in self.order)

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.merge(x.shape)).transpose(self.order)

    def from_hf(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x.transpose(np.argsort(self.order)).reshape(shape)


VECTOR = Transform(lambda s: (math.prod(s),), (0,))
SAME = Transform(lambda s: s, (0, 1))
FROM_WIDTH = Transform(lambda s: (s[0], math.prod(s[1:])), (1, 0))  # kernel [D, ...], weight [..., D]
TO_WIDTH = Transform(lambda s: (math.prod(s[:-1]), s[-1]), (1, 0))  # kernel [..., D], weight [D, ...]
PATCH = Transform(lambda s: s, (3, 2, 0, 1))  # kernel [height, width, 3, D], weight [D, 3, height, width]

VISION = "vision_tower.vision_model."
LANGUAGE = "language_model.model."
PROJECTOR = "multi_modal_projector."

# Module there, module here, transform of its weight. Its bias, if it has one, is a vector in both.
MODULES = (
    (f"{VISION}embeddings.patch_embedding", "vision/patch/kernel", PATCH),
    (f"{VISION}embeddings.position_embedding", "vision/position_embedding", SAME),
    (f"{VISION}pre_layrnorm", "vision/pre_norm/scale", VECTOR),
    (f"{VISION}encoder.layers.*.layer_norm1", "vision/layers/attention_norm/scale", VECTOR),
    (f"{VISION}encoder.layers.*.self_attn.q_proj", "vision/layers/attention/q_proj/kernel", FROM_WIDTH),
    (f"{VISION}encoder.layers.*.self_attn.k_proj", "vision/layers/attention/k_proj/kernel", FROM_WIDTH),
    (f"{VISION}encoder.layers.*.self_attn.v_proj", "vision/layers/attention/v_proj/kernel", FROM_WIDTH),
    (f"{VISION}encoder.layers.*.self_attn.out_proj", "vision/layers/attention/o_proj/kernel", TO_WIDTH),
    (f"{VISION}encoder.layers.*.layer_norm2", "vision/layers/mlp_norm/scale", VECTOR),
    (f"{VISION}encoder.layers.*.mlp.fc1", "vision/layers/mlp/up_proj/kernel", FROM_WIDTH),
    (f"{VISION}encoder.layers.*.mlp.fc2", "vision/layers/mlp/down_proj/kernel", TO_WIDTH),
    (f"{VISION}post_layernorm", "vision/post_norm/scale", VECTOR),
    (f"{PROJECTOR}linear_1", "projector/layers_0/kernel", FROM_WIDTH),
    (f"{PROJECTOR}linear_2", "projector/layers_1/kernel", FROM_WIDTH),
    (f"{LANGUAGE}embed_tokens", "decoder/embedding", SAME),
    (f"{LANGUAGE}layers.*.input_layernorm", "decoder/layers/attention_norm/scale", VECTOR),
    (f"{LANGUAGE}layers.*.self_attn.q_proj", "decoder/layers/attention/q_proj/kernel", FROM_WIDTH),
    (f"{LANGUAGE}layers.*.self_attn.k_proj", "decoder/layers/attention/k_proj/kernel", FROM_WIDTH),
    (f"{LANGUAGE}layers.*.self_attn.v_proj", "decoder/layers/attention/v_proj/kernel", FROM_WIDTH),
    (f"{LANGUAGE}layers.*.self_attn.o_proj", "decoder/layers/attention/o_proj/kernel", TO_WIDTH),
    (f"{LANGUAGE}layers.*.post_attention_layernorm", "decoder/layers/mlp_norm/scale", VECTOR),
    (f"{LANGUAGE}layers.*.mlp.gate_proj", "decoder/layers/mlp/gate_proj/kernel", FROM_WIDTH),
    (f"{LANGUAGE}layers.*.mlp.up_proj", "decoder/layers/mlp/up_proj/kernel", FROM_WIDTH),
    (f"{LANGUAGE}layers.*.mlp.down_proj", "decoder/layers/mlp/down_proj/kernel", TO_WIDTH),
    (f"{LANGUAGE}norm", "decoder/norm/scale", VECTOR),
    ("language_model.lm_head", "decoder/lm_head/kernel", FROM_WIDTH),
)
EMBEDDING = f"{LANGUAGE}embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# What a name may begin with, and what that is on the hub; the first that fits holds. Transformers 4.52 moved all but
# the head below `model.`, 5.6 took `vision_model.` out; a CLIP or LLaMA alone names no part.
PREFIXES = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", VISION),
    (r"(vision_model\.)?(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", VISION),
    (r"(model\.)?multi_modal_projector\.", PROJECTOR),
    (r"(model\.)?(language_model\.)?(model\.)?(?=(embed_tokens|layers|norm)\.)", LANGUAGE),
    (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
)

# Constants that old versions stored, text towers, and the pooling head of SigLIP.
IGNORED = re.compile(r".*\.(position_ids|inv_freq)|text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)|"
                     r"((vision_tower\.)?vision_model\.)?head\.(probe|attention|layernorm|mlp)\b.*")


def hf_name(name: str) -> str:
    """The name that a tensor has in the layout of the hub; itself if no prefix fits."""
    for pattern, prefix in PREFIXES:
        if match := re.match(pattern, name):
            return prefix + name[match.end() :]
    return name


@dataclass(frozen=True)
class TensorMapping:
    """What one tensor of the hub's layout is here: a parameter, or one layer of a stacked one."""

    path: str
    layer: int | None
    shape: Shape
    transform: Transform

    @property
    def hf_shape(self) -> Shape:
        return self.transform.hf_shape(self.shape)


def tensor_mappings(shapes: Mapping[str, Shape]) -> dict[str, TensorMapping]:
    """The tensors of the hub's layout that hold parameters of these shapes, by name.

    UserError if a parameter has no place there: a projector of more than two layers, for example.
    """
    rows = [(f"{VISION}embeddings.class_embedding", "vision/class_embedding", VECTOR)]  # no module's weight
    for module, path, transform in MODULES:
        rows.append((f"{module}.weight", path, transform))
        if path.endswith(("/kernel", "/scale")):
            rows.append((f"{module}.bias", re.sub(r"\w+$", "bias", path), VECTOR))
    found: dict[str, TensorMapping] = {}
    for name, path, transform in rows:
        if path not in shapes:
            continue
        if is_stacked(path):
            layers, *shape = shapes[path]
            found |= {name.replace("*", str(i)): TensorMapping(path, i, tuple(shape), transform) for i in range(layers)}
        else:
            found[name] = TensorMapping(path, None, tuple(shapes[path]), transform)
    if homeless := sorted(shapes.keys() - {place.path for place in found.values()}):
        raise UserError(f"Hugging Face's layout has no place for {', '.join(homeless)}")
    return found


def is_stacked(path: str) -> bool:
    """Whether a parameter's first axis counts layers."""
    return "/layers/" in path
