import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def hf_model():
    """A small LlavaForConditionalGeneration with random weights, its vocabulary that of the golden tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=28, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4),
        text_config=transformers.LlamaConfig(
            vocab_size=2000, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def hf_dir(hf_model, tmp_path_factory):
    """The model's directory as transformers writes it, with the tokenizer."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    hf_model.save_pretrained(directory)
    shutil.copy(GOLDEN / "tokenizer.model", directory)
    return directory
