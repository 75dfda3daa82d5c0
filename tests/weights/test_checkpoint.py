"""Whole checkpoints in every layout: loaded, saved, opened by transformers, bit for bit."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx

from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.models import llava
from llava_jax.models.projector import Projector
from llava_jax.models.vit import VisionConfig, Vit
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.weights import files, load_checkpoint, load_model, save_hf, save_native

VISION = r"^vision_tower\.vision_model\."


def hf_tensors(directory):
    """The tensors of a directory under the names of the hub."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensor
            for name, tensor in tensors.items()}


def rewrite(source, target, rename, shards=1):
    """A copy of a checkpoint with other tensor names, in one or several files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {rename(name): tensor.contiguous() for name, tensor in hf_tensors(source).items() if rename(name)}
    if shards == 1:
        safetensors.torch.save_file(tensors, target / "model.safetensors")
        return target
    names = sorted(tensors)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def in_memory_4_52(name):
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model", "language_model", name)
    return name if name.startswith("lm_head") else f"model.{name}"


LAYOUTS = {
    "the hub's": lambda name: name,
    "transformers 4.52 in memory": in_memory_4_52,
    "transformers 5.6 in memory": lambda name: re.sub(r"^model\.vision_tower\.vision_model", "model.vision_tower",
                                                      in_memory_4_52(name)),
    "transformers 5.6 on disk": lambda name: re.sub(VISION, "vision_tower.", name),
}


@pytest.fixture(scope="module")
def loaded(hf_dir):
    return load_checkpoint(hf_dir)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == x.dtype, path
        np.testing.assert_array_equal(found[path], x, err_msg=path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling_is_the_same_model(hf_dir, tmp_path, loaded, layout, shards):
    config, parameters = load_checkpoint(rewrite(hf_dir, tmp_path / "copy", LAYOUTS[layout], shards))
    assert config == loaded[0]
    assert_same(parameters, loaded[1])


def test_parameters_are_the_modules(loaded):
    config, parameters = loaded
    expected = llava.abstract_params(config)[1]
    assert {path: (x.shape, x.dtype) for path, x in parameters.items()} == {
        path: (x.shape, x.dtype) for path, x in expected.items()}


def test_constants_and_a_clips_text_tower_are_left_out(tmp_path):
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4),
        text_config=dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, eos_token_id=2, bos_token_id=1)))
    clip.save_pretrained(tmp_path / "clip")
    tensors = safetensors.torch.load_file(tmp_path / "clip" / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    safetensors.torch.save_file(tensors, tmp_path / "clip" / "model.safetensors")
    config, parameters = load_checkpoint(tmp_path / "clip")
    assert config.hidden_size == 32 and all(path.startswith("vision/") for path in parameters)
    np.testing.assert_array_equal(parameters["vision/layers/mlp/up_proj/kernel"][1],
                                  tensors["vision_model.encoder.layers.1.mlp.fc1.weight"].T)

    transformers.CLIPVisionModel(clip.config.vision_config).save_pretrained(tmp_path / "alone")
    assert load_checkpoint(tmp_path / "alone")[1].keys() == parameters.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_alone(tmp_path, tied):
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama")
    tensors = safetensors.torch.load_file(tmp_path / "llama" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()  # old files hold a tied head too
    safetensors.torch.save_file(tensors, tmp_path / "llama" / "model.safetensors")
    _, parameters = load_checkpoint(tmp_path / "llama")
    assert ("decoder/lm_head/kernel" in parameters) is not tied
    np.testing.assert_array_equal(parameters["decoder/embedding"], model.model.embed_tokens.weight.detach())


def spoil(directory, change):
    tensors = hf_tensors(directory)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("language_model.lm_head.weight"), "missing: language_model.lm_head.weight$"),
    (lambda t: t.update({"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(4)}),
     "left over: language_model.model.layers.0.self_attn.q_norm.weight$"),
    (lambda t: t.update({"multi_modal_projector.linear_1.weight": torch.ones(48, 33)}),
     r"of another shape: multi_modal_projector.linear_1.weight \[48, 33\] instead of \[48, 32\]$"),
    (lambda t: t.update({"model.norm.weight": torch.ones(48)}),
     r"left over: (model|language_model.model).norm.weight$"),
    (lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
     r"missing: (\S+, ){9}\S+ and 15 more$"),
    (lambda t: (t.pop("language_model.lm_head.weight"), t.update({"head.weight": torch.ones(2)})),
     "missing: language_model.lm_head.weight; left over: head.weight$"),
])
def test_tensors_that_do_not_fit_are_listed(hf_dir, tmp_path, change, message):
    copy = rewrite(hf_dir, tmp_path / "copy", lambda name: name)
    spoil(copy, change)
    with pytest.raises(UserError, match=f"copy: the tensors do not match config.json; {message}"):
        load_checkpoint(copy)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(hf_dir, tmp_path, loaded, stored, dtype):
    copy = rewrite(hf_dir, tmp_path / "copy", lambda name: name)
    spoil(copy, lambda t: t.update({name: tensor.to(stored) for name, tensor in t.items()}))
    _, parameters = load_checkpoint(copy, dtype=dtype)
    for path, x in loaded[1].items():
        assert parameters[path].dtype == jnp.dtype(dtype)
        expected = torch.tensor(np.asarray(x)).to(stored).float().numpy().astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(parameters[path], expected)


def torch_logits(model, tokens, images, image_id):
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.where(tokens == IMAGE_TOKEN_ID, image_id, tokens)).long(),
                     pixel_values=torch.tensor(images).flatten(0, 1).permute(0, 3, 1, 2)).logits.numpy()


def our_logits(config, parameters, tokens, images):
    graph = llava.abstract_params(config)[0]
    return np.asarray(jax.jit(lambda p: llava.from_params(graph, p)(tokens, images))(parameters))


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 2000, (2, 20)).astype(np.int32)
    tokens[:, 5:9] = IMAGE_TOKEN_ID
    return tokens, rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)


@pytest.mark.parametrize("change", ["none", "linear", "qwen2 tied", "biases", "siglip"])
def test_transformers_opens_what_is_saved(hf_dir, tmp_path, loaded, change):
    config, _ = loaded
    text = {"none": {}, "linear": {"head_dim": 20}, "qwen2 tied": {"qkv_bias": True, "tie_word_embeddings": True},
            "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True}}.get(change, {})
    vision = config.vision
    if change == "siglip":
        vision = VisionConfig(28, 14, 144, 48, 2, 2, "gelu_pytorch_tanh", 1e-6, False, True, False)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **text),
                                 vision=vision, processor=None,
                                 projector="linear" if change == "linear" else "mlp2x_gelu",
                                 feature_select="cls_patch" if change == "biases" else "patch")
    rng = np.random.default_rng(0)
    parameters = {path: rng.normal(path.endswith("scale"), 0.1, x.shape).astype(np.float32)
                  for path, x in llava.abstract_params(config)[1].items()}
    save_hf(tmp_path / "saved", config, parameters, hf_dir)

    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.text_config.vocab_size == 2048 and model.config.text_config.model_type == (
        "qwen2" if change == "qwen2 tied" else "llama")
    tokens, images = make_batch()
    if change == "biases":
        tokens[:, 9] = IMAGE_TOKEN_ID
    found = torch_logits(model, tokens, images, 2000)[..., :2000]
    expected = our_logits(config, parameters, tokens, images)
    assert np.abs(found - expected).max() <= 1e-5 * expected.std()

    names = {".".join(name.split(".")[:2]) for name in files.list_tensors(tmp_path / "saved")}
    assert names - {"language_model.lm_head"} == {
        "vision_tower.vision_model", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2",
        "language_model.model"}
    again, reread = load_checkpoint(tmp_path / "saved")
    assert dataclasses.replace(again, text=dataclasses.replace(again.text, vocab_size=2000)) == config
    for path, x in parameters.items():
        if path == "decoder/embedding":
            x = np.concatenate([x, np.tile(x.astype(np.float64).mean(0).astype(np.float32), (48, 1))])
        elif path == "decoder/lm_head/kernel":
            x = np.concatenate([x, np.tile(x.astype(np.float64).mean(1).astype(np.float32)[:, None], (1, 48))], axis=1)
        np.testing.assert_array_equal(reread[path], x, err_msg=path)


def test_a_second_linear_that_does_something(hf_dir, tmp_path):
    copy = rewrite(hf_dir, tmp_path / "copy", lambda name: name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "linear"}))
    with pytest.raises(UserError, match="config.json: projector_hidden_act linear .* linear_2 is the identity"):
        load_checkpoint(copy)
    spoil(copy, lambda t: t.update({"multi_modal_projector.linear_2.weight": torch.eye(48),
                                    "multi_modal_projector.linear_2.bias": torch.zeros(48)}))
    config, parameters = load_checkpoint(copy)
    assert config.projector == "linear" and "projector/layers_1/kernel" not in parameters


def test_our_own_layout(hf_dir, tmp_path, loaded):
    config, parameters = loaded
    mixed = {path: x.astype(jnp.bfloat16) if path.startswith("vision") else x for path, x in parameters.items()}
    save_native(tmp_path / "own", config, mixed, hf_dir, shard_bytes=50_000)
    stored = files.list_tensors(tmp_path / "own")
    assert stored.keys() == parameters.keys() and len({tensor.file for tensor in stored.values()}) > 3
    assert stored["vision/patch/kernel"].dtype == ml_dtypes.bfloat16
    again, reread = load_checkpoint(tmp_path / "own")
    assert again == config
    assert_same(reread, {path: x.astype(jnp.float32) for path, x in mixed.items()})
    assert (tmp_path / "own" / "tokenizer.model").read_bytes() == (hf_dir / "tokenizer.model").read_bytes()

    tensors = {path: np.asarray(x) for path, x in parameters.items() if path != "decoder/norm/scale"}
    for file in (tmp_path / "own").glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, tmp_path / "own" / "model.safetensors")
    with pytest.raises(UserError, match="own: the tensors do not match config.json; missing: decoder/norm/scale$"):
        load_checkpoint(tmp_path / "own")


def test_saving_over_something_is_refused(hf_dir, loaded):
    for save in (save_native, save_hf):
        with pytest.raises(UserError, match="exists already"):
            save(hf_dir, *loaded, hf_dir)


def test_nothing_half_written_remains(hf_dir, tmp_path, loaded):
    config, parameters = loaded
    with pytest.raises(UserError, match="no tensor for projector/norm/bias, projector/norm/scale"):
        save_hf(tmp_path / "saved", config, parameters | {
            "projector/norm/scale": jnp.ones(48), "projector/norm/bias": jnp.ones(48)}, hf_dir)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_native, save_hf])
def test_what_is_not_finite_is_not_written(hf_dir, tmp_path, loaded, save):
    config, parameters = loaded
    wrong = {path: np.array(x) for path, x in parameters.items()}
    wrong["decoder/layers/mlp/down_proj/kernel"][1, 3, 4] = 1e5
    save(tmp_path / "wide", config, wrong, hf_dir, dtype="bfloat16")
    with pytest.raises(UserError, match=r"half: not written: .*beyond the range .*enough\): .*mlp.down[^,;]*$"):
        save(tmp_path / "half", config, wrong, hf_dir, dtype="float16")
    wrong["projector/layers_0/bias"][2] = np.nan
    wrong["vision/layers/mlp/up_proj/kernel"][0, 0, 0] = -np.inf
    with pytest.raises(UserError, match=r"nan: not written: .*not finite \(NaN .*: .*(bias|kernel|weight), "):
        save(tmp_path / "nan", config, wrong, hf_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


@pytest.mark.parametrize("name, value, message", [
    ("multi_modal_projector.linear_1.bias", np.nan, "copy: projector/layers_0/bias has values that are not finite"),
    ("language_model.model.layers.1.mlp.down_proj.weight", np.inf,
     "decoder/layers/mlp/down_proj/kernel of layer 1 has"),
])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_not_finite_is_not_opened(hf_dir, tmp_path, name, value, message, dtype):
    copy = rewrite(hf_dir, tmp_path / "copy", lambda name: name)
    spoil(copy, lambda t: t[name].view(-1)[3:4].fill_(value))
    with pytest.raises(UserError, match=message):
        load_checkpoint(copy, dtype=dtype)


def test_a_siglip_is_read_without_text_tower_and_pooling_head(tmp_path):
    vision = dict(image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4)
    text = dict(vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                max_position_embeddings=8)
    siglip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    siglip.save_pretrained(tmp_path / "siglip")
    transformers.SiglipVisionModel(siglip.config.vision_config).save_pretrained(tmp_path / "alone")
    config, parameters = load_checkpoint(tmp_path / "siglip")
    assert config == load_checkpoint(tmp_path / "alone")[0] == VisionConfig(
        28, 14, 32, 48, 2, 4, "gelu_pytorch_tanh", 1e-6, class_token=False, patch_bias=True, pre_norm=False)
    assert parameters.keys() == {f"vision/{path}" for path in llava.to_params(nnx.eval_shape(
        lambda: Vit(config, rngs=nnx.Rngs(0))))[1]}
    np.testing.assert_array_equal(parameters["vision/patch/bias"], siglip.vision_model.embeddings.patch_embedding.bias
                                  .detach().numpy())


@pytest.fixture(scope="module")
def native_dir(hf_dir, tmp_path_factory, loaded):
    directory = tmp_path_factory.mktemp("native") / "model"
    save_native(directory, *loaded, hf_dir)
    return directory


def drop(source, target, pattern):
    """A copy of a checkpoint in one file, without the tensors whose names match."""
    shutil.copytree(source, target)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.fullmatch(pattern, name)}
    safetensors.numpy.save_file(kept, target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_parameters_that_no_checkpoint_has_are_named_by_the_recipe(hf_dir, native_dir, tmp_path, loaded):
    config, parameters = loaded
    for directory, name, pattern in ((hf_dir, "hf", ".*projector.*"), (native_dir, "native", "projector/.*")):
        partial = drop(directory, tmp_path / name, pattern)
        with pytest.raises(UserError, match="missing: .*projector"):
            load_model(Model(llava=partial), config, 3)
        found = load_model(Model(llava=partial, fresh=("projector/.*",)), config, 3)
        assert found.keys() == parameters.keys()
        for path, x in parameters.items():
            if not path.startswith("projector/"):
                np.testing.assert_array_equal(found[path], x)
        # A projector alone is drawn, as if the model had no other part.
        projector = Projector(config.projector, config.vision.hidden_size, config.text.hidden_size,
                              config.vision.grid, rngs=nnx.Rngs(3))
        for path, x in llava.to_params(projector)[1].items():
            np.testing.assert_array_equal(found[f"projector/{path}"], x)


@pytest.mark.parametrize("fresh, message", [
    (("projector/.*",), "left over: .*multi_modal_projector"),  # the checkpoint has them
    (("adapter/.*",), "model.fresh: adapter/.*: matches no parameter"),
])
def test_a_table_of_fresh_parameters_must_match_the_checkpoint(hf_dir, loaded, fresh, message):
    with pytest.raises(UserError, match=message):
        load_model(Model(llava=str(hf_dir), fresh=fresh), loaded[0], 0)


def test_fresh_expressions_are_checked_when_the_recipe_is_made():
    with pytest.raises(UserError, match=r"model.fresh: '\(' is no regular expression"):
        Model(llava="a", fresh=("(",))


def test_names_of_an_earlier_version_are_told_in_one_line(native_dir, tmp_path):
    directory = tmp_path / "old"
    shutil.copytree(native_dir, directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    old = {name.replace("q_proj", "query").replace("lm_head", "head"): x for name, x in tensors.items()}
    safetensors.numpy.save_file(old, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"old: .*names of an earlier version \(.*\); convert the model again") as error:
        load_checkpoint(directory)
    assert "\n" not in str(error.value)
