"""LLaVA's own layout, written by torch: each version opens as the same weights of the hf layout do."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from original_models import ONEVISION, config_json, siglip_qwen2, without_tower, write

from llava_jax import convert
from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig, abstract_params, from_params
from llava_jax.video import VideoSampling
from llava_jax.weights import load_checkpoint, load_model, original, read_config
from llava_jax.weights.original_export import config_json as exported_json
from llava_jax.weights.original_export import hub_tower


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("has_tower", [True, False])
def test_llava_1_5_opens_as_the_hf_layout(hf_dir, weights, tower, tmp_path, form, has_tower):
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    if has_tower:
        constants["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    stored = (weights if has_tower else without_tower(weights)) | constants
    folder = write(tmp_path / "x", stored, config_json(mm_vision_tower=str(tower)), form)
    expected_config, expected = load_checkpoint(hf_dir)
    config, parameters = load_checkpoint(folder)
    assert_same(parameters, expected)
    assert (config.vision, config.projector, config.feature_layer) == (
        expected_config.vision, expected_config.projector, expected_config.feature_layer)
    assert config.text == expected_config.text
    assert_same(load_model(Model(llava=str(folder)), config, 0), parameters)  # of a recipe
    assert (config.template, config.processor.mode, config.processor.mean) == ("vicuna_v1", "pad", (0.1, 0.2, 0.3))


def test_logits_equal_those_of_transformers(hf_model, weights, tower, tmp_path, monkeypatch):
    from llava_jax import load

    monkeypatch.setattr(hf_model.config, "image_token_index", 1999)
    folder = write(tmp_path / "x", without_tower(weights), config_json())
    llava = load(folder, vision=tower)
    tokens = np.array([[1, 7, *[-200] * 4, 9, 12, 400]])
    tiles = np.random.default_rng(0).normal(size=(1, 1, 28, 28, 3)).astype(np.float32)
    ids = torch.tensor(np.where(tokens < 0, 1999, tokens))
    with torch.no_grad():
        expected = hf_model(input_ids=ids, pixel_values=torch.tensor(tiles[0].transpose(0, 3, 1, 2))).logits.numpy()
    found = np.asarray(llava.model(tokens, tiles))
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


# Other versions.

def test_onevision(tmp_path):
    """Of a SigLIP the output of the last layer but one is read, whatever layer the configuration names."""
    tensors, siglip = siglip_qwen2()
    siglip.save_pretrained(tmp_path / "siglip")
    folder = write(tmp_path / "x", tensors, config_json(**ONEVISION, mm_vision_tower=str(tmp_path / "siglip")))
    config, parameters = load_checkpoint(folder)
    processor = config.processor
    assert (config.vision.num_layers, config.feature_layer, config.template) == (2, -1, "qwen_1_5")
    assert config.text.qkv_bias and config.text.tie_word_embeddings and "image_newline" in parameters
    assert (processor.mode, processor.max_tiles, processor.several, processor.pool, processor.has_newline) == (
        "anyres", 9, "pad", "bilinear", True)
    assert processor.pinpoints == ((28, 28), (28, 56), (56, 28)) and processor.mean == (0.5, 0.5, 0.5)
    np.testing.assert_array_equal(parameters["image_newline"], tensors["model.image_newline"])
    np.testing.assert_array_equal(parameters["vision/post_norm/scale"], siglip.state_dict()[next(
        name for name in siglip.state_dict() if name.endswith("post_layernorm.weight"))])
    assert parameters["vision/layers/mlp/up_proj/kernel"].shape[0] == 2

    model = from_params(abstract_params(config)[0], parameters)
    pixels = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        states = siglip(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(model.features(pixels[None])[0].reshape(2, 4, 32), states[-2], atol=1e-5)

    # The tower of another folder loses its last layer too.
    outside = write(tmp_path / "outside", without_tower(tensors), config_json(
        **ONEVISION | {"mm_tunable_parts": "mm_mlp_adapter"}, mm_vision_tower="google/siglip-x"))
    assert_same(load_checkpoint(outside, vision=tmp_path / "siglip")[1], parameters)


def test_llava_1_6_mistral(weights, tower, tmp_path):
    newline = {"model.image_newline": torch.randn(48)}
    config = config_json(
        model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], mm_vision_tower=str(tower),
        image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),...,(1x2)", sliding_window=None,
        mm_patch_merge_type="spatial_unpad", unfreeze_mm_vision_tower=True)
    read, parameters = load_checkpoint(write(tmp_path / "x", weights | newline, config))
    assert (read.template, read.processor.mode, read.processor.several) == ("mistral_instruct", "anyres", "same")
    assert read.processor.pinpoints == ((28, 28), (28, 56)) and read.processor.merge_type == "spatial_unpad"
    np.testing.assert_array_equal(parameters["image_newline"], newline["model.image_newline"])


@pytest.mark.parametrize("kind, depth", [(None, 1), ("linear", 1), ("mlp3x_gelu", 3), ("identity", 0)])
def test_projectors(weights, tower, tmp_path, kind, depth):
    hidden = 32 if depth == 0 else 48
    kept = {name: x for name, x in weights.items() if "mm_projector" not in name}
    names = ["model.mm_projector."] if depth == 1 else [f"model.mm_projector.{2 * i}." for i in range(depth)]
    for i, name in enumerate(names):
        kept |= {f"{name}weight": torch.randn(48, 48 if i else 32), f"{name}bias": torch.randn(48)}
    if depth == 0:
        kept = {name: x[..., :32].contiguous() if "vision_tower" not in name and x.shape[-1] == 48 else x
                for name, x in kept.items()}
        kept = {name: x[:32].contiguous() if re.search("[qo]_proj|down_proj", name) and "tower" not in name else x
                for name, x in kept.items()}
        kept = {name: x[:16].contiguous() if re.search("[kv]_proj", name) and "tower" not in name else x
                for name, x in kept.items()}
        kept |= {name: x[:, :32].contiguous() for name, x in kept.items() if "o_proj" in name and "tower" not in name}
    changes = {"mm_projector_type": kind, "mm_vision_tower": str(tower), "hidden_size": hidden}
    config = {name: value for name, value in config_json(**changes).items() if value is not None}
    config, parameters = load_checkpoint(write(tmp_path / "x", kept, config))
    assert config.projector == (kind or "linear")
    for i, name in enumerate(names):
        np.testing.assert_array_equal(parameters[f"projector/layers_{i}/kernel"], kept[f"{name}weight"].T)
        np.testing.assert_array_equal(parameters[f"projector/layers_{i}/bias"], kept[f"{name}bias"])


def told(match: str, folder: Path, *options) -> None:
    """A conversion ends in one line and writes nothing."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError, match=match) as error:
        run(folder, folder.parent / "new", "--to", "native", *options)
    assert "\n" not in str(error.value) and str(folder.parent) in str(error.value)
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("changes, message", [
    ({}, r"vision tower openai/clip-vit-large-patch14-336: it is not in the checkpoint; fetch it \(hf download op"),
    ({"mm_vision_tower": "/data/clip"}, "vision tower /data/clip: it is not in the checkpoint; name its folder by"),
    ({"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower says .* trained, but the checkpoint lacks its"),
    ({"mm_tunable_parts": "mm_vision_tower"}, "mm_tunable_parts says that the vision tower was trained, but the check"),
    ({"model_type": "llava_mpt"}, "a LLaVA with an MPT decoder, which is not supported"),
    ({"mm_vision_tower": ["x"]}, r'mm_vision_tower is \["x"\]; it must be a text'),
])
def test_a_missing_tower_is_told(weights, tmp_path, changes, message):
    told(message, write(tmp_path / "x", without_tower(weights), config_json(**changes)))


def test_a_stored_tower_of_unknown_sizes_needs_its_configuration(weights, tower, tmp_path):
    folder = write(tmp_path / "x", weights, config_json())
    told("its config.json is needed, because the tensors do not tell all of its sizes; fetch it", folder)
    assert read_config(folder, vision=tower).vision.num_heads == 4


@pytest.mark.parametrize("changes, message", [
    ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer' is not supported"),
    ({"use_mm_proj": False}, "use_mm_proj is false"),
    ({"mm_projector_type": "mlp2x_res2x_gelu"}, "projector 'mlp2x_res2x_gelu' is not one of identity, linear"),
    ({"mm_projector_type": "merge2x2_linear"}, "projector 'merge2x2_linear' has no form in the original layout"),
    ({"mm_vision_select_feature": "slicefour_patch"}, "feature_select 'slicefour_patch' is neither"),
    ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres' is not supported; square, pad, anyres and"),
    ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints 'null' is no list of sizes"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[30, 30]]}, "pinpoint 30 x 30 is no multiple of"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(28, 28", "mm_patch_merge_type": "flat"}, "no list of"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]], "mm_patch_merge_type": "spatial_unpad"},
     "missing: model.image_newline"),
    ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type 'spatial_maxpool2x2' is not supported"),
    ({"mm_projector_type": "linear"}, "left over: model.mm_projector.2.weight, model.mm_projector.2.bias"),
    ({"vocab_size": 2001}, r"of another shape: model.embed_tokens.weight \[2000, 48\] instead of \[2001, 48\]"),
])
def test_unsupported_settings_are_told(weights, tower, tmp_path, changes, message):
    told(message, write(tmp_path / "x", without_tower(weights), config_json(**changes)), "--vision", tower)


def test_a_llama_with_biases_is_no_qwen2(weights, tower, tmp_path):
    biases = {f"model.layers.{i}.self_attn.{name}_proj.bias": torch.randn(rows)
              for i in range(2) for name, rows in {"q": 48, "k": 24, "v": 24, "o": 48}.items()}
    config, parameters = load_checkpoint(write(tmp_path / "x", without_tower(weights) | biases, config_json(
        attention_bias=True, mm_vision_tower=str(tower))))
    assert config.template == "vicuna_v1" and config.text.qkv_bias and config.text.out_bias
    np.testing.assert_array_equal(parameters["decoder/layers/attention/o_proj/bias"][1],
                                  biases["model.layers.1.self_attn.o_proj.bias"])


def test_quantised_models_and_damaged_towers_are_told(weights, tower, tmp_path):
    config = config_json(mm_vision_tower=str(tower), quantization_config={"load_in_4bit": True})
    load_checkpoint(write(tmp_path / "merged", without_tower(weights), config))  # QLoRA leaves the field
    name = "model.layers.0.mlp.up_proj.weight"
    stored = without_tower(weights) | {name: torch.zeros(1536, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(48)}
    told("config.json: quantization_config: quantised models are not read", write(tmp_path / "x", stored, config))
    shutil.copytree(tower, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text("<html>")
    told(rf"^{re.escape(str(tmp_path))}/clip/preprocessor_config.json: not JSON", write(
        tmp_path / "y", without_tower(weights), config_json()), "--vision", tmp_path / "clip")


def test_unknown_tensors_and_half_downloads_are_told(weights, tower, tmp_path):
    extra = {"model.vision_resampler.x": torch.ones(2), "model.mm_projector.1.weight": torch.ones(2)}
    told("left over: model.vision_resampler.x, model.mm_projector.1.weight", write(
        tmp_path / "x", without_tower(weights) | extra, config_json()), "--vision", tower)
    folder = write(tmp_path / "shards", without_tower(weights), config_json(), "shards")
    shard, index = folder / "pytorch_model-00001-of-00002.bin", folder / "pytorch_model.bin.index.json"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    told("00001-of-00002.bin: truncated, damaged or not a torch file", folder, "--vision", tower)
    shard.unlink()
    told("00001-of-00002.bin is missing, which pytorch_model.bin.index.json names", folder, "--vision", tower)
    shard.write_bytes(content)
    index.unlink()
    told("has torch files, but neither pytorch_model.bin nor", folder, "--vision", tower)


def test_a_configuration_needs_no_tensors(weights, tower, tmp_path):
    """As `plan` reads it: config.json, with the index of the tensors or without."""
    folder = write(tmp_path / "x", weights, config_json(mm_vision_tower=str(tower)), "shards")
    expected = read_config(folder)
    for file in folder.glob("*.bin"):
        file.unlink()
    assert read_config(folder) == expected
    (folder / "pytorch_model.bin.index.json").unlink()
    assert read_config(folder) == expected
    (folder / "config.json").write_text(json.dumps(config_json()))
    assert read_config(folder).vision == LlavaConfig().vision  # a published tower


# Exports.

def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in safetensors.torch.load_file(file).items()}


def run(*arguments) -> None:
    convert.main([*map(str, arguments)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through", ["native", "hf"])
def test_there_and_back_again_keeps_bits(weights, tower, tmp_path, through, dtype):
    weights = {name: x.to(dtype) for name, x in weights.items()}
    source = write(tmp_path / "x", without_tower(weights), config_json(mm_vision_tower=str(tower)))
    run(source, tmp_path / "between", "--to", through, "--dtype", "keep")
    run(tmp_path / "between", tmp_path / "back", "--to", "original", "--dtype", "keep", "--tower", "out",
        "--shard-size", "30KB")
    found = stored(tmp_path / "back")
    assert found.keys() == without_tower(weights).keys()
    for name, x in without_tower(weights).items():  # hf adds rows for <image> and <pad>
        assert found[name].dtype == dtype and torch.equal(found[name][: len(x)], x), name
    config, written = json.loads((source / "config.json").read_text()), json.loads(
        (tmp_path / "back" / "config.json").read_text())
    same = {name: value for name, value in written.items() if name in config and not name.endswith("_id")}
    expected = {"model_type": "llava_llama", "mm_vision_tower": str(tmp_path / "back" / "vision_tower"),
                "torch_dtype": str(dtype).removeprefix("torch."), "vocab_size": 2048 if through == "hf" else 2000}
    assert same == {name: config[name] for name in same} | expected
    # A tower of other sizes than the published ones has a folder of its own, which moves with the checkpoint.
    shutil.move(tmp_path / "back", tmp_path / "moved")
    config, parameters = load_checkpoint(tmp_path / "moved")
    before, expected = load_checkpoint(source)
    assert config.processor == before.processor and config.vision == before.vision
    np.testing.assert_array_equal(parameters["vision/patch/kernel"], expected["vision/patch/kernel"])
    assert transformers.CLIPVisionModel.from_pretrained(tmp_path / "moved" / "vision_tower").dtype == torch.float32


def test_the_tower_is_exported_with_the_rest(weights, tower, tmp_path):
    source = write(tmp_path / "x", weights, config_json(mm_vision_tower=str(tower)))
    run(source, tmp_path / "back", "--to", "original")
    found = stored(tmp_path / "back")
    assert found.keys() == weights.keys() and {x.dtype for x in found.values()} == {torch.bfloat16}
    assert all(torch.equal(x, weights[name].bfloat16()) for name, x in found.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True


def test_onevision_there_and_back_again(tmp_path):
    tensors, siglip = siglip_qwen2()
    siglip.save_pretrained(tmp_path / "siglip")
    video = {"force_sample": True, "add_time_instruction": True}
    source = write(tmp_path / "x", tensors, config_json(**ONEVISION, **video, mm_vision_tower=str(tmp_path / "siglip")))
    assert read_config(source).video == VideoSampling(uniform=True, time_text=True)  # as LLaVA-Video's
    run(source, tmp_path / "native", "--to", "native", "--dtype", "keep")
    run(tmp_path / "native", tmp_path / "back", "--to", "original", "--dtype", "keep")
    found = stored(tmp_path / "back")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], x) for name, x in tensors.items())
    assert read_config(tmp_path / "back") == read_config(source) == read_config(tmp_path / "native")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["LlavaQwenForCausalLM"] and written["mm_newline_position"] == "one_token"
    assert {name: written[name] for name in video} == video
    run(source, tmp_path / "hf", "--to", "hf", "--dtype", "keep")
    run(tmp_path / "hf", tmp_path / "again", "--to", "original", "--dtype", "keep")
    found = stored(tmp_path / "again")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name][: len(x)], x) for name, x in tensors.items())


def test_published_towers_are_named():
    assert hub_tower(LlavaConfig()) == "openai/clip-vit-large-patch14-336"
    stock, cut = original.SIGLIP, dataclasses.replace(original.SIGLIP, num_layers=26)
    assert hub_tower(LlavaConfig(vision=stock)) == hub_tower(LlavaConfig(vision=cut, feature_layer=-1)) == (
        "google/siglip-so400m-patch14-384")
    assert hub_tower(LlavaConfig(vision=stock, feature_layer=-1)) is None
    with pytest.raises(UserError, match="image mode resize with a CLIP has no form in the original layout; crop, pad"):
        exported_json(LlavaConfig().with_image_mode("resize"))
