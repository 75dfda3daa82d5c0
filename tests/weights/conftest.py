import shutil
from pathlib import Path

import pytest
import torch
import transformers
from original_models import original_name

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def hf_model():
    """A small LlavaForConditionalGeneration with random weights, its vocabulary that of the golden tokenizer."""
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


@pytest.fixture(scope="session")
def weights(hf_model) -> dict[str, torch.Tensor]:
    """The weights of the model of `hf_dir` under their original names."""
    return {original_name(name): tensor.clone() for name, tensor in hf_model.state_dict().items()}


@pytest.fixture(scope="session")
def tower(hf_model, tmp_path_factory) -> Path:
    """The vision tower alone, as a folder of transformers."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    tower = transformers.CLIPVisionModel(hf_model.config.vision_config)
    tower.load_state_dict({name.replace("vision_model.", ""): x for name, x in
                           hf_model.model.vision_tower.state_dict().items()}
                          if not any("vision_model" in name for name in tower.state_dict()) else
                          hf_model.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28,
                                       image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder
