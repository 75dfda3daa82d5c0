"""Two small models: a random one in Hugging Face's layout, and one that recites a given text."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import encode_conversation, encode_prompt
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer.model"  # 2000 pieces, with byte fallback


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(TOKENIZER)


@pytest.fixture(scope="session")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + 7 * i, 40, 3), np.uint8)) for i in range(4)]


@pytest.fixture(scope="session")
def hf_model():
    """A random LlavaForConditionalGeneration, scaled so that its choices are sharp and its answers varied."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    text = LlamaConfig(
        vocab_size=2064, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2000)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 if "embed_tokens" in name else 2 / weight[0].numel() ** 0.5)
        model.lm_head.weight[2] *= 1.5  # so that some answers end early
    return model


@pytest.fixture(scope="session")
def model_dir(hf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(directory)
    shutil.copy(TOKENIZER, directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    return directory


@pytest.fixture(scope="session")
def llava(model_dir):
    return llava_jax.load(model_dir, dtype="float32")


RECITED = "é漢🙂 a b c d e f g h i j k l m n o p"


def make_reciter(tokenizer, config, opening, tokens):
    """A model that answers with `tokens` after the last token of `opening`: its layers add nothing, its head knows
    what follows a token."""
    chain = [opening[-1], *tokens]
    assert len(set(chain)) == len(chain) <= config.text.hidden_size, "each token can have one successor only"
    _, shapes = abstract_params(config)
    parameters = {path: np.zeros(shape.shape, np.float32) for path, shape in shapes.items()}
    for path in parameters:
        if path.endswith("norm/scale"):
            parameters[path] += 1
    for i, (token, following) in enumerate(itertools.pairwise(chain)):
        parameters["decoder/embedding"][token, i] = 1
        parameters["decoder/lm_head/kernel"][i, following] = 10
    return llava_jax.Llava(config, parameters, tokenizer)


@pytest.fixture(scope="session")
def reciting(tokenizer):
    """A model that answers every prompt with RECITED."""
    return make_reciter(tokenizer, CONFIG, tokenizer.encode("ASSISTANT:"),
                        [*tokenizer.encode(RECITED), tokenizer.eos_id])


@pytest.fixture(scope="session")
def reciter(tokenizer):
    """reciter(template, text) -> a model that answers as one trained on `text` in that format, and the text."""

    def make(template, text):
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]
        prompt = encode_prompt(messages[:1], template, tokenizer)
        labels = encode_conversation(turns, template, tokenizer).labels[len(prompt) :]
        answer = labels[: -1 if template == "llava_v0" else None].tolist()  # without the last sign's blank
        return make_reciter(tokenizer, dataclasses.replace(CONFIG, template=template), prompt, answer), text

    return make


CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=14, patch_size=7, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1),
    text=LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64,
        max_length=256
    ),
    feature_layer=-1,
)
