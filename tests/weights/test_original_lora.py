"""LoRA folders of the original LLaVA, as torch and PEFT write them, against the merged torch model."""

import copy
import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers

import llava_jax
from llava_jax.errors import UserError
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import checkpoint

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IMAGE = 1990


@pytest.fixture(scope="module")
def parts(hf_model, hf_dir, tmp_path_factory):
    """Folders of the decoder and the vision tower."""
    folder = tmp_path_factory.mktemp("parts")
    decoder = transformers.LlamaForCausalLM(hf_model.config.text_config)
    decoder.model, decoder.lm_head = hf_model.model.language_model, hf_model.lm_head
    decoder.save_pretrained(folder / "decoder")
    shutil.copy(hf_dir / "tokenizer.model", folder / "decoder")
    hf_model.model.vision_tower.save_pretrained(folder / "clip")
    return folder / "decoder", folder / "clip"


@pytest.fixture(scope="module")
def trained(hf_model, parts, tmp_path_factory):
    """The folder as LLaVA's train.py leaves it, and the whole model with adapters merged."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    torch.manual_seed(5)
    decoder = transformers.LlamaForCausalLM.from_pretrained(parts[0])
    wrapped = peft.get_peft_model(decoder, peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, target_modules=LEAVES, task_type="CAUSAL_LM"))
    whole = copy.deepcopy(hf_model)
    whole.config.image_token_id = IMAGE
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
        for weight in whole.model.multi_modal_projector.parameters():
            weight.normal_(std=0.3)
    wrapped.save_pretrained(folder, safe_serialization=False)
    full = {f"base_model.model.model.mm_projector.{2 * int(name[7]) - 2}.{name[9:]}": x
            for name, x in whole.model.multi_modal_projector.state_dict().items()}
    torch.save(full, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(decoder.config.to_dict() | {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}))
    merged = wrapped.merge_and_unload()
    whole.model.language_model.load_state_dict(merged.model.state_dict())
    return folder, whole


def tensors(name, folder):
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.", "model.model.", "model."])
def test_onto_a_plain_decoder_and_a_tower(parts, trained, tmp_path, prefix):
    shutil.copytree(trained[0], tmp_path / "adapter")
    full = tensors("non_lora_trainables.bin", trained[0])
    torch.save({name.replace("base_model.model.model.", prefix): x for name, x in full.items()},
               tmp_path / "adapter" / "non_lora_trainables.bin")
    config, parameters = checkpoint.open_checkpoint(parts[0], vision=parts[1], adapter=tmp_path / "adapter")
    assert (config.processor.mode, config.projector, config.lora.rank, config.lora.alpha) == ("pad", "mlp2x_gelu", 4, 8)
    np.testing.assert_array_equal(parameters.read("projector/layers_1/kernel", None),
                                  full["base_model.model.model.mm_projector.2.weight"].numpy().T)


def test_logits(hf_dir, parts, trained):
    folder, whole = trained
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 1900, (2, 24)).astype(np.int32)
    tokens[:, 5:9] = IMAGE_TOKEN_ID
    images = rng.normal(size=(2, 28, 28, 3)).astype(np.float32)
    ids = torch.tensor(np.where(tokens == IMAGE_TOKEN_ID, IMAGE, tokens)).long()
    with torch.no_grad():
        expected = whole(input_ids=ids, pixel_values=torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()
    llava = llava_jax.load(parts[0], adapter=folder, vision=parts[1], template="vicuna_v1")
    actual = np.asarray(llava.model(tokens, images[:, None]))
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
    opened = checkpoint.open_checkpoint(hf_dir, "vicuna_v1", adapter=folder)[1]  # a finished LLaVA, as of a task LoRA
    assert llava.parameters.keys() == opened.shapes.keys()
    for path, x in checkpoint.load_source("task", opened).items():
        np.testing.assert_array_equal(llava.parameters[path], x, err_msg=path)


def test_what_is_missing_is_told(hf_dir, parts, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "adapter")
    with pytest.raises(UserError, match="decoder alone.*openai/clip-vit-large-patch14-336.*--vision"):
        checkpoint.open_checkpoint(parts[0], adapter=tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"image_aspect_ratio": "highres"}))
    with pytest.raises(UserError, match="adapter/config.json: image_aspect_ratio 'highres' is not supported"):
        checkpoint.open_checkpoint(parts[0], vision=parts[1], adapter=tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(content) | {"mm_vision_tower": 3}))
    with pytest.raises(UserError, match=r"decoder alone.*\(3\) by --vision"):
        checkpoint.open_checkpoint(parts[0], adapter=tmp_path / "adapter")
    file.write_text(content)
    (tmp_path / "adapter" / "non_lora_trainables.bin").unlink()  # as checkpoints within LLaVA's training
    with pytest.raises(UserError, match="no non_lora_trainables.bin.* lack projector/layers_0"):
        checkpoint.open_checkpoint(parts[0], vision=parts[1], adapter=tmp_path / "adapter")
    checkpoint.open_checkpoint(hf_dir, "vicuna_v1", adapter=tmp_path / "adapter")  # the base has a projector
    (tmp_path / "adapter" / "config.json").unlink()
    with pytest.raises(UserError, match="decoder alone.*no config.json of a LLaVA"):
        checkpoint.open_checkpoint(parts[0], vision=parts[1], adapter=tmp_path / "adapter")
