"""Adapters in files: PEFT's and the original LLaVA's against PEFT and torch, on random models."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import next_models
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from commands import run_command
from peft_models import DECODER, IMAGE, adapted, torch_logits, with_adapters

import llava_jax
from llava_jax.errors import UserError
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import checkpoint, load_checkpoint, save_peft
from llava_jax.weights import peft as adapters

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def base(hf_model):
    model = copy.deepcopy(hf_model)
    model.config.image_token_id = IMAGE
    return model


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 1900, (2, 24)).astype(np.int32)
    tokens[:, 5:9] = IMAGE_TOKEN_ID
    return tokens, rng.normal(size=(2, 28, 28, 3)).astype(np.float32)


def assert_merges_to(base_dir, adapter, model, tmp_path):
    """Merged parameters are those of a model whose adapters PEFT merges."""
    shutil.copytree(base_dir, tmp_path / "merged", ignore=shutil.ignore_patterns("*.safetensors"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load_checkpoint(tmp_path / "merged", template="vicuna_v1")[1]
    config, parameters = adapters.merge(*checkpoint.open_checkpoint(base_dir, "vicuna_v1", adapter=adapter))
    assert config.lora is None
    actual = checkpoint.load_source("test", parameters)
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(actual[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_folder_of_peft_has_its_logits(base, hf_dir, tmp_path, inputs):
    wrapped = adapted(base, target_modules=["q_proj", "v_proj", "fc1", "linear_1"], use_rslora=True)
    wrapped.save_pretrained(tmp_path / "adapter")
    llava = llava_jax.load(hf_dir, adapter=tmp_path / "adapter", template="vicuna_v1")
    expected = torch_logits(wrapped, *inputs)
    actual = np.asarray(llava.model(inputs[0], inputs[1][:, None]))
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()


SETTINGS = {
    "projector": dict(target_modules=DECODER, modules_to_save=["multi_modal_projector"]),
    "all-linear": dict(target_modules="all-linear"),
    "some layers": dict(target_modules=["o_proj", "down_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "excluded": dict(target_modules=["q_proj"], exclude_modules=r".*vision_tower.*", init_lora_weights="gaussian"),
    "patterns": dict(target_modules=DECODER, rank_pattern={"q_proj": 2, r"layers\.0\.mlp\.up_proj": 6},
                     alpha_pattern={"v_proj": 5}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_peft(base, hf_dir, tmp_path, name):
    wrapped = adapted(base, **SETTINGS[name])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert_merges_to(hf_dir, tmp_path / "adapter", wrapped, tmp_path)


RENAMED = {
    "transformers 4.52": ("model.vision_tower.", "model.vision_tower.vision_model."),
    "transformers 4.51": ("model.language_model.", "language_model.model."),
    "decoder of 4.51 alone": ("model.language_model.", "model."),
    "decoder without head": ("model.language_model.", ""),
}


@pytest.mark.parametrize("name", RENAMED)
def test_older_names(base, hf_dir, tmp_path, name):
    old, new = RENAMED[name]
    target = ["q_proj"] if "vision" in old else r"(.*\.|)layers\.\d+\.self_attn\.q_proj"
    wrapped = adapted(base, target_modules=target, exclude_modules=None if "vision" in old else ".*vision_tower.*")
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    renamed = {key.replace(f"base_model.model.{old}", f"base_model.model.{new}"): x for key, x in tensors.items()}
    assert renamed.keys() != tensors.keys()
    torch.save(renamed, file.with_suffix(".bin"))
    file.unlink()
    assert_merges_to(hf_dir, tmp_path / "adapter", wrapped, tmp_path)


TOWER = ("vision/layers/attention/q_proj", "decoder/layers/mlp/(gate|down)_proj", "projector/layers_1")


@pytest.mark.parametrize("settings", [{}, dict(targets=TOWER, rslora=True, alpha=2.5)], ids=["decoder", "tower"])
def test_peft_and_transformers_open_ours(base, hf_dir, tmp_path, inputs, monkeypatch, settings):
    config, parameters = with_adapters(hf_dir, "nothing" if settings else "projector/", **settings)
    save_peft(tmp_path / "adapter", config, parameters, hf_dir)
    assert checkpoint.read_config(hf_dir, "vicuna_v1", adapter=tmp_path / "adapter") == dataclasses.replace(
        config, lora=dataclasses.replace(config.lora, targets=config.lora.targets if not settings else (
            "decoder/layers/mlp/down_proj", "decoder/layers/mlp/gate_proj", "projector/layers_1",
            "vision/layers/attention/q_proj")))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert (wrapped.peft_config["default"].r, wrapped.peft_config["default"].lora_dropout) == (4, 0.1)
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path / "adapter"))
    np.testing.assert_array_equal(torch_logits(model.eval(), *inputs), torch_logits(wrapped, *inputs))
    assert_merges_to(hf_dir, tmp_path / "adapter", wrapped, tmp_path)


@pytest.mark.parametrize("kind, text, tower, fields", [
    ("llava_next", "mistral", "clip", {}), ("llava_onevision", "qwen2", "siglip", {"tie_word_embeddings": True})])
def test_1_6_and_onevision(tmp_path, kind, text, tower, fields):
    """PEFT opens ours with a newline and a tower that were trained in full, and we open PEFT's."""
    model = next_models.build(kind, text, tower, **fields)
    base = next_models.save(model, tmp_path / "base", GOLDEN)
    wrapped = adapted(model, target_modules=DECODER, modules_to_save=["multi_modal_projector"])
    wrapped.save_pretrained(tmp_path / "theirs")
    assert_merges_to(base, tmp_path / "theirs", wrapped, tmp_path)
    shutil.rmtree(tmp_path / "merged")

    config, parameters = with_adapters(base, "projector/|image_newline|vision/")
    trained = [path for path in parameters if re.match("projector/|image_newline|vision/", path)]
    save_peft(tmp_path / "ours", config, parameters, base, trained=trained)
    loaded = checkpoint.load_source("ours", checkpoint.open_checkpoint(base, "vicuna_v1", adapter=tmp_path / "ours")[1])
    assert loaded.keys() == parameters.keys()
    for path in parameters:
        np.testing.assert_array_equal(loaded[path], parameters[path], err_msg=path)
    assert_merges_to(base, tmp_path / "ours", peft.PeftModel.from_pretrained(model, tmp_path / "ours"), tmp_path)


def test_ours_comes_back(hf_dir, ours, tmp_path):
    """From the base with the adapter, unmerged, to the native layout and to an adapter again."""
    config, parameters = with_adapters(hf_dir)
    steps = (hf_dir, tmp_path / "native", "--adapter", ours, "--to", "native", "--template", "vicuna_v1"), (
        tmp_path / "native", tmp_path / "adapter", "--to", "peft")
    for arguments in steps:
        result = run_command("convert", *arguments, "--dtype", "keep")
        assert result.code == 0, result.err
    again, loaded = load_checkpoint(hf_dir, template="vicuna_v1", adapter=tmp_path / "adapter")
    assert again == config
    for path, x in parameters.items():
        np.testing.assert_array_equal(loaded[path], x, err_msg=path)


def test_modules_that_an_adapter_has_in_full_are_exported(base, hf_dir, tmp_path):
    """A tower is written again. A norm has no place, and a projector not beside its own adapters: one line."""
    for name, target, module in [("tower", DECODER, "vision_tower"), ("norm", DECODER, "norm"),
                                 ("half", ["linear_1", "up_proj"], "linear_2")]:
        wrapped = adapted(base, target_modules=target, modules_to_save=[module])
        wrapped.save_pretrained(tmp_path / name)
        result = run_command("convert", hf_dir, tmp_path / f"{name} again", "--adapter", tmp_path / name,
                             "--to", "peft", "--template", "vicuna_v1", "--dtype", "keep")
        if name == "tower":
            assert_merges_to(hf_dir, tmp_path / "tower again", wrapped, tmp_path)
        else:
            assert result.code == 2 and re.search("trained in full.*for which peft has no place", result.err)
            assert not (tmp_path / f"{name} again").exists()


def test_an_adapter_of_a_decoder_alone(hf_dir, tmp_path):
    """LlamaForCausalLM, wrapped by PEFT alone, with the decoder's weights."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hf_dir)
    decoder = transformers.LlamaForCausalLM(model.config.text_config)
    decoder.model, decoder.lm_head = model.model.language_model, model.lm_head
    adapted(decoder, target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    wrapped = adapted(model, target_modules=DECODER)
    wrapped.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                name = name.replace("model.model.language_model.", "model.model.").replace(".default", "")
                weight.copy_(safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")[name])
    assert_merges_to(hf_dir, tmp_path / "adapter", wrapped, tmp_path)


@pytest.fixture(scope="module")
def ours(hf_dir, tmp_path_factory):
    config, parameters = with_adapters(hf_dir)
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    save_peft(directory, config, parameters, "the/base")
    return directory


def edit(directory, name, change):
    """Changes a JSON file or the tensors of an adapter."""
    file = directory / name
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    else:
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)


LAYER = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
INVALID = [
    (TENSORS, lambda t: t.pop(f"{LAYER}.lora_B.weight"), "layers.1.self_attn.q_proj.lora_B.weight is missing"),
    (TENSORS, lambda t: [t.pop(f"{LAYER}.lora_{half}.weight") for half in "AB"], "no adapters of.*q_proj"),
    (TENSORS, lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(5, 48)}), r"\[5, 48\] instead of \[4, 48\]"),
    (TENSORS, lambda t: t.update({f"{LAYER}.lora_embedding_A": torch.zeros(2)}), "lora_embedding_A: adapters of an"),
    (TENSORS, lambda t: t.update({f"{LAYER.replace('.1.', '.2.')}.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}),
     "adapters of .*layers.2.*base model does not have"),
    (TENSORS, lambda t: [t.pop(name) for name in list(t) if "projector" in name], "no tensor of multi_modal_projector"),
    (TENSORS, lambda t: t.update({"base_model.model.model.multi_modal_projector.linear_1.bias": torch.zeros(3)}),
     r"linear_1.bias is \[3\], but the base model's is \[48\]"),
    (CONFIG, lambda c: c.update(use_dora=True), "use_dora is true"),
    (CONFIG, lambda c: c.update(lora_bias=True), "lora_bias is true"),
    (CONFIG, lambda c: c.update(bias="all"), "bias is \"all\""),
    (CONFIG, lambda c: c.update(trainable_token_indices=[3]), "trainable_token_indices"),
    (CONFIG, lambda c: c.update(of_tomorrow={"a": 1}), "of_tomorrow"),
    (CONFIG, lambda c: c.update(init_lora_weights="pissa_niter_4"), "init_lora_weights is \"pissa_niter_4\""),
    (CONFIG, lambda c: c.update(peft_type="LOHA"), "peft_type is \"LOHA\""),
    (CONFIG, lambda c: c.update(r="4"), "r is \"4\"; it must be a whole number"),
    (CONFIG, lambda c: c.update(target_modules="(q_proj"), "invalid"),
    (CONFIG, lambda c: c.update(target_modules=None), "target_modules is null"),
    (CONFIG, lambda c: c.update(target_modules=r".*language_model.*q_proj"), "adapters of .*mlp"),
    (CONFIG, lambda c: c.update(modules_to_save=[3]), "no tensor of 3"),
    (CONFIG, lambda c: c.update(alpha_pattern={"q_proj": "x"}), "alpha_pattern has \"x\""),
    ("llava_jax.json", lambda c: c.update(fingerprint=[]), "fingerprint is"),
]


@pytest.mark.parametrize("name, change, message", INVALID, ids=[message for *_, message in INVALID])
def test_invalid_adapters(hf_dir, ours, tmp_path, name, change, message):
    shutil.copytree(ours, tmp_path / "adapter")
    edit(tmp_path / "adapter", name, change)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.open_checkpoint(hf_dir, "vicuna_v1", adapter=tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_half_a_download(hf_dir, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).write_bytes((ours / TENSORS).read_bytes()[:-99])
    with pytest.raises(UserError, match="truncated"):
        checkpoint.open_checkpoint(hf_dir, "vicuna_v1", adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        checkpoint.open_checkpoint(hf_dir, "vicuna_v1", adapter=tmp_path / "adapter")


def test_a_wrong_base_is_refused(hf_dir, ours, tmp_path):
    config, parameters = load_checkpoint(hf_dir, template="vicuna_v1")
    kernel = "decoder/layers/attention/q_proj/kernel"
    moved = parameters | {kernel: parameters[kernel] * 1.02}
    checkpoint.save_native(tmp_path / "wrong", config, moved, hf_dir)
    with pytest.raises(UserError, match="trained on another model than .*wrong.*the/base"):
        checkpoint.open_checkpoint(tmp_path / "wrong", adapter=ours)
    for dtype in ("float16", "bfloat16"):  # the same base in other dtypes and layouts
        checkpoint.save_hf(tmp_path / dtype, config, parameters, hf_dir, dtype=dtype)
        checkpoint.open_checkpoint(tmp_path / dtype, adapter=ours)
