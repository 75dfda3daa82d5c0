"""A template, a tokenizer and a model that do not suit each other are told in one line."""

import json
import shutil

import pytest

from llava_jax.errors import UserError
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def say_again():
    agreement.say.cache_clear()


def special(golden, tmp_path, eos="</s>", **added):
    """The golden tokenizer of 2,000 pieces with further special tokens."""
    shutil.copy(golden / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return Tokenizer.load(tmp_path)


def byte_level(raw, tmp_path, ends, eos):
    """A tokenizer without </s>, as Qwen2's and Llama 3's."""
    spec = json.loads(raw["bytes"].to_str())
    names = {token["content"]: token["content"] for token in spec["added_tokens"]}
    dropped = {"</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"} - set(ends)
    for number, name in enumerate(dropped):
        names[name] = f"<unused{number}>"
    spec["added_tokens"] = [token | {"content": names[token["content"]]} for token in spec["added_tokens"]]
    spec["model"]["vocab"] = {names.get(text, text): i for text, i in spec["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("ends, eos, expected", [
    (["<|im_end|>"], "<|im_end|>", "qwen_1_5"),  # Qwen2 Instruct
    (["<|im_end|>"], "<|endoftext|>", "qwen_1_5"),  # Qwen2, whose EOS is another
    (["<|eot_id|>"], "<|endoftext|>", "llava_llama_3"),
    (["</s>"], "</s>", "vicuna_v1"),
    (["</s>", "<|im_end|>"], "<|im_end|>", "qwen_1_5"),  # a Mistral that was tuned to ChatML
    (["</s>", "<|im_end|>"], "</s>", "vicuna_v1"),
])
def test_a_decoders_tokenizer_chooses_the_template(raw, tmp_path, capsys, ends, eos, expected):
    tokenizer = byte_level(raw, tmp_path, ends, eos)
    assert agreement.template_for_decoder(tokenizer, "DIR") == expected
    end = templates.get(expected).end
    assert tokenizer.special_id(end) is not None
    assert capsys.readouterr().err == f"template {expected}: its end {end} is a token of DIR\n"
    agreement.check(expected, tokenizer, 1000, "DIR")
    agreement.template_for_decoder(tokenizer, "DIR")
    assert capsys.readouterr().err == ""  # told once


def test_a_tokenizer_without_any_end_asks_for_a_template(raw, tmp_path):
    with pytest.raises(UserError, match="DIR: no template.s end .*--template"):
        agreement.template_for_decoder(byte_level(raw, tmp_path, [], "<|endoftext|>"), "DIR")


def test_an_end_that_is_no_token(raw, tmp_path, capsys):
    tokenizer = byte_level(raw, tmp_path, ["<|im_end|>"], "<|endoftext|>")
    line = "template vicuna_v1 ends answers with </s>, which is no token of the tokenizer; template qwen_1_5 ends with"
    with pytest.raises(UserError, match=f"DIR: {line}"):
        agreement.check("vicuna_v1", tokenizer, 1000, "DIR")
    assert capsys.readouterr().err == ""
    agreement.check("vicuna_v1", tokenizer, 1000, "DIR", trained=True)  # a model that has learned it
    assert line in capsys.readouterr().err
    for name in ("plain", "llava_v0"):  # end with a text that is not meant to be a token
        agreement.check(name, tokenizer, 1000, "DIR")


def test_ids_beyond_the_embedding(golden, tmp_path):
    tokenizer = special(golden, tmp_path, **{"<seg>": 2001, "<box>": 2000, "<image>": 2002})
    agreement.check("vicuna_v1", tokenizer, 2002, "DIR")
    agreement.check("vicuna_v1", tokenizer, 2064, "DIR")  # rows without a token are padding
    with pytest.raises(UserError, match="DIR: .* ids up to 2001, the embedding has 2000 rows.*'<box>' = 2000, '<seg>'"):
        agreement.check("vicuna_v1", tokenizer, 2000, "DIR")
    with pytest.raises(UserError, match="the embedding has 1990 rows.*, [.][.][.]$"):
        agreement.check("vicuna_v1", tokenizer, 1990, "DIR")


def test_a_padding_token_needs_no_row(golden, tmp_path):
    shutil.copy(golden / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 2000}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    agreement.check("vicuna_v1", Tokenizer.load(tmp_path), 2000, "DIR")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "eos_token": "[PAD]"}))
    with pytest.raises(UserError, match=r"'\[PAD\]' = 2000"):
        agreement.check("vicuna_v1", Tokenizer.load(tmp_path), 2000, "DIR")


def test_every_token_of_every_kind_is_listed(kinds):
    for name, tokenizer in kinds.items():
        listed = tokenizer.tokens_from(0)
        assert [i for _, i in listed] == sorted(i for _, i in listed), name
        assert {i for _, i in listed} == set(range(tokenizer.vocab_size)), name


def test_an_image_must_fit_into_the_context(golden, tmp_path):
    tokenizer = special(golden, tmp_path)
    agreement.check("vicuna_v1", tokenizer, 2000, "DIR", visual_tokens=576, context=577)
    with pytest.raises(UserError, match="DIR: an image takes 576 tokens, and the model's context is 576"):
        agreement.check("vicuna_v1", tokenizer, 2000, "DIR", visual_tokens=576, context=576)


def test_lengths_beyond_the_context(capsys):
    assert agreement.check_length(512, 512, "data.sequence_length") == 512 and capsys.readouterr().err == ""
    assert agreement.check_length(1024, 512, "data.sequence_length") == 512
    assert capsys.readouterr().err.startswith("data.sequence_length is 1,024, the model's context 512 tokens")
