"""Deltas and projector files: what LLaVA's first releases were published as."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from original_models import SIZES, config_json, without_tower, write

from llava_jax import convert
from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.text import templates
from llava_jax.train.setup import model_config
from llava_jax.weights import load_checkpoint, load_model, projector_files, read_config

ADDED = {"<im_patch>": 2000, "<im_start>": 2001, "<im_end>": 2002}


def told(match, action, *arguments) -> None:
    with pytest.raises(UserError, match=match) as error:
        action(*arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaMA 1 of 2000 tokens, of which LLaVA v0 is a delta with three more. Old transformers wrote torch files."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("base") / "llama"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).half()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def delta(base, weights, tower, tmp_path):
    """A delta of LLaVA v0: the decoder's differences in float16, the projector, rows of new tokens."""
    torch.manual_seed(3)
    old = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float16).state_dict()
    tensors = {name: (0.1 * torch.randn(x.shape)).half() for name, x in old.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(3, 48).half()])
    tensors |= {"model.mm_projector.weight": torch.randn(48, 32).half(),
                "model.mm_projector.bias": torch.randn(48).half()}
    config = config_json(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=2003,
                         mm_use_im_start_end=True, mm_vision_tower=str(tower), bos_token_id=0, eos_token_id=1,
                         pad_token_id=-1)
    del config["mm_projector_type"], config["image_aspect_ratio"]
    folder = write(tmp_path / "delta", tensors, config, "shards")
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}')
    return folder, tensors, old


def test_a_delta_is_added_in_float16(base, delta, tmp_path):
    folder, tensors, old = delta
    convert.main([str(folder), str(tmp_path / "sum"), "--to", "original", "--base", str(base), "--dtype", "keep",
                  "--tower", "out"])
    found = safetensors.torch.load_file(tmp_path / "sum" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        total = x.clone()
        if name in old:  # as LLaVA's apply_delta: in place, in float16, in the block that the base has
            total[tuple(map(slice, old[name].shape))] += old[name]
        assert found[name].dtype == torch.float16 and torch.equal(found[name], total), name
    config = read_config(tmp_path / "sum")
    assert (config.template, config.processor.mode, config.projector) == ("v0_start_end", "crop", "linear")
    assert config == read_config(folder)
    ids = json.loads((tmp_path / "sum" / "generation_config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)  # of the tokenizer, not of LLaMA 1's early conversions


def test_the_prompt_of_v0_has_its_start_and_end_tokens(base, delta, tmp_path):
    from llava_jax import load

    convert.main([str(delta[0]), str(tmp_path / "sum"), "--to", "native", "--base", str(base)])
    llava = load(tmp_path / "sum")
    tokens = llava.encode("What is it?", [np_image()])["tokens"][0].tolist()
    at = tokens.index(2001)
    assert tokens[at : at + 6] == [2001, -200, -200, -200, -200, 2002] and tokens.count(2001) == 1
    asked = [("user", "<image>\nWhat?")]  # as LLaVA's benchmark scripts write it
    assert "<im_start><image><im_end>\nWhat?" in "".join(
        span.text for span in templates.spans(asked, templates.get(llava.template), verbatim=True))
    assert read_config(tmp_path / "sum", "vicuna_v1").template == "vicuna_v1"  # native: as it is named


def np_image():
    from PIL import Image

    return Image.fromarray(np.zeros((40, 30, 3), np.uint8))


def test_deltas_are_told(base, parts, delta, tmp_path, capsys):
    folder = delta[0]
    told("lacks .*, which the delta .* changes|has shape .* in the delta", convert.main,
         [str(folder), str(tmp_path / "x"), "--to", "hf", "--base", str(parts[1])])
    told("lacks .*, which the delta .* changes", convert.main,
         [str(folder), str(tmp_path / "x"), "--to", "hf", "--base", str(parts[0])])
    told("no such directory", convert.main, [str(folder), str(tmp_path / "x"), "--to", "hf", "--base", "nowhere"])
    told("template 'mpt' has no form with <im_start> and <im_end>; vicuna_v1 and llava_v0 have",
         read_config, folder, "mpt")
    assert read_config(folder, "vicuna_v1").template == "v1_start_end"
    (folder / "added_tokens.json").unlink()
    told("mm_use_im_start_end: the tokenizer has no <im_start> and no <im_end>", read_config, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


# Projector files.

def stage_1(folder, weights, rows=None, prefix="model.") -> tuple:
    folder.mkdir()
    kept = {name.replace("model.", prefix, 1): x for name, x in weights.items() if "mm_projector" in name}
    if rows is not None:
        kept[f"{prefix}embed_tokens.weight"] = rows
    torch.save(kept, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(config_json()))
    return folder, {re.sub(".*mm_projector", "mm_projector", name): x.numpy() for name, x in kept.items()}


@pytest.mark.parametrize("prefix, as_file", [("model.", True), ("base_model.model.model.", False)])
def test_a_projector_file_is_the_projector_of_a_join(base, tower, weights, tmp_path, prefix, as_file):
    folder, tensors = stage_1(tmp_path / "checkpoint-100", weights, prefix=prefix)
    path = folder / "mm_projector.bin" if as_file else folder
    (base / "tokenizer.model").write_bytes((write(tmp_path / "x", {}, {}) / "tokenizer.model").read_bytes())
    sources = Model(vision=str(tower), language=str(base), projector_weights=str(path))
    config = model_config(sources)
    assert config.projector == "mlp2x_gelu"
    parameters = load_model(sources, config, 0)
    convert.main(["--vision", str(tower), "--language", str(base), str(tmp_path / "joined"), "--to", "native",
                  "--projector-weights", str(path), "--dtype", "keep"])
    for found in (parameters, load_checkpoint(tmp_path / "joined")[1]):
        for i, name in enumerate(("mm_projector.0", "mm_projector.2")):
            np.testing.assert_array_equal(found[f"projector/layers_{i}/kernel"], tensors[f"{name}.weight"].T)
            np.testing.assert_array_equal(found[f"projector/layers_{i}/bias"], tensors[f"{name}.bias"])


@pytest.mark.parametrize("alone", [True, False])
def test_trained_rows_of_start_and_end_are_put_into_the_embedding(base, tower, weights, tmp_path, alone):
    torch.manual_seed(4)
    rows = torch.randn(2 if alone else 2003, 48)
    folder, _ = stage_1(tmp_path / "stage1", weights, rows)
    language = tmp_path / "language"
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(2003)
    model.save_pretrained(language)
    (language / "tokenizer.model").write_bytes((write(tmp_path / "x", {}, {}) / "tokenizer.model").read_bytes())
    arguments = ["--vision", str(tower), "--language", str(language), str(tmp_path / "new"), "--to", "native",
                 "--projector-weights", str(folder), "--dtype", "keep"]
    told("trained with the tokens <im_start> and <im_end>, which the decoder does not have", convert.main, arguments)
    (language / "added_tokens.json").write_text(json.dumps(ADDED))
    told("which template vicuna_v1 does not write; name v0_start_end or v1_start_end", convert.main, arguments)
    convert.main([*arguments, "--template", "v1_start_end"])
    embedding = np.asarray(load_checkpoint(tmp_path / "new")[1]["decoder/embedding"])
    expected = model.get_input_embeddings().weight.detach().numpy().copy()
    expected[2001:] = rows[-2:]
    np.testing.assert_array_equal(embedding, expected)
    assert templates.get("v1_start_end").image == "<im_start><image><im_end>"


def test_other_files_are_told(tower, base, weights, tmp_path):
    torch.save(without_tower(weights), tmp_path / "all.bin")
    told("all.bin: not a projector alone: it has model.layers.0", projector_files.kind, tmp_path / "all.bin")
    torch.save({"model.embed_tokens.weight": torch.ones(2, 48)}, tmp_path / "rows.bin")
    told("rows.bin: it has no projector", projector_files.kind, tmp_path / "rows.bin")
    told("mm_projector.bin: no such file", projector_files.kind, tmp_path)
    told("model.projector_weights is fixed by the checkpoint model.llava", lambda: Model(
        llava="x", projector_weights="y"))
    torch.save({"mm_projector.weight": torch.ones(8, 3), "mm_projector.bias": torch.ones(8)}, tmp_path / "linear.bin")
    assert projector_files.kind(tmp_path / "linear.bin") == "linear"
    told("linear.bin: a projector of type linear, but mlp2x_gelu is named", projector_files.open_projector,
         tmp_path / "linear.bin", LlavaConfig())
