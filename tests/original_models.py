"""Tiny checkpoints in LLaVA's own layout, written by torch."""

import json
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"vocab_size": 2000, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}


def original_name(name: str) -> str:
    """The original's name of a tensor in memory of transformers 5.6, spelled out by hand."""
    name = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model.", name)
    name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
    return name.replace("model.language_model.", "model.")


def config_json(**changes) -> dict:
    """A config.json of LLaVA 1.5 with tiny sizes."""
    return {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **SIZES, "hidden_act": "silu",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 32,
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
            "use_mm_proj": True, "tie_word_embeddings": False, "torch_dtype": "float16", "pad_token_id": 0} | changes


def write(folder: Path, weights: dict[str, torch.Tensor], config: dict, form: str = "bin") -> Path:
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        safetensors.torch.save_file(weights, folder / "model.safetensors")
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
        for file in names:
            torch.save({name: x for name, x in weights.items() if weight_map[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def without_tower(weights):
    return {name: x for name, x in weights.items() if "vision_tower" not in name}


def siglip_qwen2() -> tuple[dict[str, torch.Tensor], transformers.SiglipVisionModel]:
    """A LLaVA-OneVision of LLaVA-NeXT's code, tied, and the SigLIP whose last layer it deletes."""
    torch.manual_seed(1)
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2))
    decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))
    tensors = {name: x for name, x in decoder.state_dict().items() if name != "lm_head.weight"}
    for name, x in tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if not name.startswith(("encoder.layers.2.", "head.")):
            tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = x
    tensors |= {"model.mm_projector.0.weight": torch.randn(48, 32), "model.mm_projector.0.bias": torch.randn(48),
                "model.mm_projector.2.weight": torch.randn(48, 48), "model.mm_projector.2.bias": torch.randn(48),
                "model.image_newline": torch.randn(48)}
    return {name: x.detach().contiguous() for name, x in tensors.items()}, tower


ONEVISION = {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres_max_9",
             "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]], "mm_patch_merge_type": "spatial_unpad",
             "mm_newline_position": "one_token", "mm_spatial_pool_mode": "bilinear", "mm_vision_select_layer": -2,
             "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "tie_word_embeddings": True,
             "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2}
