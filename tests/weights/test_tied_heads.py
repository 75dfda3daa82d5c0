"""Which head a checkpoint has, beside transformers: what its files hold counts more than what its flags say."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from llava_jax import convert
from llava_jax.errors import UserError
from llava_jax.models import llava
from llava_jax.weights import load_checkpoint, read_config

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
TOKENS = np.array([[1, 5, 60, 7, 800]], np.int32)


def write(source, directory, top, text, stored):
    """A copy with these two flags (None: left out) and a head that is equal to the embedding, different, or absent."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    for part, flag in ((config, top), (config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if flag is not None:
            part["tie_word_embeddings"] = flag
    (directory / "config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    if stored == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif stored == "absent":
        del tensors[HEAD]
    elif stored == "alone":
        del tensors[EMBEDDING]
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def our_logits(directory):
    config, parameters = load_checkpoint(directory)
    return np.asarray(llava.from_params(llava.abstract_params(config)[0], parameters)(TOKENS, None))


def their_logits(directory):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    if info["missing_keys"]:
        return None
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize("stored", ["equal", "different", "absent", "alone"])
@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("top", [True, False, None])
def test_the_head_is_transformers(hf_dir, tmp_path, top, text, stored):
    directory = write(hf_dir, tmp_path / "model", top, text, stored)
    expected = their_logits(directory)
    if expected is None:  # it initialises what is missing
        with pytest.raises(UserError, match="missing: language_model"):
            load_checkpoint(directory)
        return
    assert np.abs(our_logits(directory) - expected).max() <= 1e-5 * expected.std()
    assert read_config(directory).text.tie_word_embeddings == (stored != "different" and bool(top or text))


@pytest.mark.parametrize("stored", ["equal", "different"])
def test_it_stays_so_in_every_layout(hf_dir, tmp_path, stored):
    directory = write(hf_dir, tmp_path / "model", None, True, stored)
    expected = their_logits(directory)
    convert.main([str(directory), str(tmp_path / "own"), "--to", "native", "--dtype", "keep"])
    convert.main([str(tmp_path / "own"), str(tmp_path / "hf"), "--to", "hf", "--dtype", "keep"])
    rows = expected.shape[-1]
    for found in (our_logits(tmp_path / "own"), our_logits(tmp_path / "hf"), their_logits(tmp_path / "hf")):
        assert np.abs(found[..., :rows] - expected).max() <= 1e-5 * expected.std()


def test_a_decoder_alone(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path).tie_word_embeddings
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config, parameters = load_checkpoint(tmp_path)
    assert not config.tie_word_embeddings and read_config(tmp_path) == config
    np.testing.assert_array_equal(parameters["decoder/lm_head/kernel"], tensors["lm_head.weight"].T)


def test_a_head_of_another_shape_is_told(hf_dir, tmp_path):
    directory = write(hf_dir, tmp_path / "model", True, True, "different")
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors[HEAD] = tensors[HEAD][:-1].clone()
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"of another shape: language_model.lm_head.weight \[1999, 48\]"):
        load_checkpoint(directory)
