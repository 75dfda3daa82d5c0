"""What a model's directory says about its data."""

import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN

import llava_jax
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.prepare.settings import ModelOptions, Settings

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
    (tmp_path / "config.json").write_text('{"model_type": "llava_next_video"}')
    with pytest.raises(UserError, match="model_type 'llava_next_video' is not supported"):
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


def test_a_stage_may_have_another_image_mode_and_tower():
    tower = Path(llava_jax.__file__).parent / "data" / "mini" / "vision"
    options = ModelOptions(data="data.json", vision=str(tower), image_mode="anyres_max_4", pinpoints="(1x1),...,(2x2)")
    processor = options.load_settings().processor
    assert (processor.size, processor.patches, processor.mode_name) == (60, 6, "anyres_max_4")
    assert processor.pinpoints == ((60, 60), (60, 120), (120, 60), (120, 120))
    with pytest.raises(UserError, match="--pinpoints are read with --image-mode anyres"):
        ModelOptions(data="data.json", pinpoints="(336x672)").load_settings()
    with pytest.raises(UserError, match="language is no vision tower"):
        ModelOptions(data="data.json", vision=str(tower.parent / "language")).load_settings()
