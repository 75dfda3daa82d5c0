"""What a model's directory says about its data."""

import shutil

import pytest
from conftest import GOLDEN

from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.prepare.settings import Settings

TOKENIZER = GOLDEN / "tokenizer.model"


def test_settings_of_a_whole_llava(tmp_path):
    import transformers

    transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, hidden_size=48),
        text_config=transformers.LlamaConfig(vocab_size=2000, hidden_size=48, num_attention_heads=4),
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer here"):
        Settings.load(str(tmp_path))
    shutil.copy(TOKENIZER, tmp_path)
    settings = Settings.load(str(tmp_path))
    assert settings.processor == ImageProcessor(28, "crop", patches=2)
    assert settings.template.name == "vicuna_v1" and settings.tokenizer.vocab_size == 2000
    assert Settings.load(str(tmp_path), "plain").template.name == "plain"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = Settings.load(str(tmp_path))
    assert settings.processor == ImageProcessor(336, "pad", patches=24)
    assert settings.tokenizer.vocab_size == 2000
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(UserError, match="model_type 'llava_next' is not supported"):
        Settings.load(str(tmp_path))


def test_without_a_whole_llava(tmp_path):
    assert Settings.load() == Settings() and Settings().tokenizer is None
    assert Settings.load(str(TOKENIZER), "mpt").template.name == "mpt"
    with pytest.raises(UserError, match="none: no such model or tokenizer"):
        Settings.load("none")
    with pytest.raises(UserError, match="unknown template 'mtp'; did you mean 'mpt'"):
        Settings.load("", "mtp")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        Settings.load(str(tmp_path))
