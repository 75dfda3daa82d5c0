"""The models here against transformers', on the same random weights in float32, by way of the files."""

import numpy as np
import pytest
import torch
import transformers

from llava_jax.text.encode import IMAGE_TOKEN_ID

IMAGE = 199
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# The proportions of so400m: 72 numbers a head, an image that patches do not fill.
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 31, "hidden_size": 144, "intermediate_size": 200,
          "num_attention_heads": 2}

# (vision, text, LLaVA) fields that differ from the defaults of `make_llava`.
CONFIGURATIONS = {
    "multi-head, quick_gelu": ({}, {}, {}),
    "grouped queries, wide heads": ({}, {"num_key_value_heads": 2, "head_dim": 24}, {}),
    "one kv head, last layer, class token": (
        {"num_attention_heads": 2}, {"num_key_value_heads": 1},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "gelu, layer 1, theta 5e5": ({"hidden_act": "gelu"}, {"rope_theta": 5e5}, {"vision_feature_layer": 1}),
    "patches leave a rest": ({"image_size": 31, "num_hidden_layers": 4}, {"hidden_size": 48}, {}),
    "rope linear, narrow heads": (
        {"patch_size": 14}, {"head_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    "rope llama3": ({}, {"rope_theta": 1e4, "rope_scaling": LLAMA3, "num_key_value_heads": 2}, {}),
    "tied head, input of layer 0": ({}, {"tie_word_embeddings": True}, {"vision_feature_layer": -4}),
    "Qwen2": ({"layer_norm_eps": 1e-3}, {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6}, {}),
    "Mistral": ({}, {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, {}),
    "all biases, eps": ({}, {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}, {}),
    "SigLIP, heads of 72": (SIGLIP, {}, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "linear projector": ({"num_hidden_layers": 2}, {}, {"projector_hidden_act": "linear"}),
}


def text_config(**fields):
    return transformers.AutoConfig.for_model(**{
        "model_type": "llama", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, **fields})


def vision_config(**fields):
    return transformers.AutoConfig.for_model(**{
        "model_type": "clip_vision_model",
        "image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, **fields})


def make_llava(vision, text, llava, randomise):
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision_config(**vision), text_config=text_config(**text), image_token_index=IMAGE, **llava))
    randomise(model)
    if model.config.projector_hidden_act == "linear":
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(model.config.text_config.hidden_size))
            model.model.multi_modal_projector.linear_2.bias.zero_()
    return model


def make_batch(model, counts=(0, 1, 3), seed=0):
    """Rows with these numbers of images between texts, padded on the right; images in the slots of their row."""
    rng = np.random.default_rng(seed)
    config = model.config
    grid = config.vision_config.image_size // config.vision_config.patch_size
    has_class = config.vision_config.model_type == "clip_vision_model"
    per_image = grid**2 + (has_class and config.vision_feature_select_strategy == "full")
    rows = []
    for i, count in enumerate(counts):
        pieces = [rng.integers(3, IMAGE, 5 + 4 * i)]
        for _ in range(count):
            pieces += [np.full(per_image, IMAGE), rng.integers(3, IMAGE, 3)]
        rows.append(np.concatenate(pieces))
    length = max(map(len, rows)) + 2
    mask = np.stack([np.arange(length) < len(row) for row in rows])
    tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    size = config.vision_config.image_size
    images = rng.normal(size=(len(rows), max(1, *counts), size, size, 3)).astype(np.float32)
    used = np.arange(images.shape[1]) < np.array(counts)[:, None]
    return tokens, mask, images * used[:, :, None, None, None], used


def torch_logits(model, tokens, mask, images, used):
    pixels = torch.tensor(images[used]).permute(0, 3, 1, 2) if used.any() else None
    return model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), pixel_values=pixels).logits


def ours(tokens):
    return np.where(tokens == IMAGE, IMAGE_TOKEN_ID, tokens).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_llava(name, randomise, load, call, assert_close):
    model = make_llava(*CONFIGURATIONS[name], randomise)
    tokens, mask, images, used = make_batch(model)
    with torch.no_grad():
        expected = torch_logits(model, tokens, mask, images, used).numpy()
    graph, parameters = load(model)
    found = call(graph, parameters, lambda llava, *batch: llava(*batch), ours(tokens), images)
    assert found.dtype == np.float32
    assert_close(np.asarray(found)[mask], expected[mask], 1e-4)


def test_text_alone(randomise, load, call, assert_close):
    model = make_llava({}, {}, {}, randomise)
    tokens, mask, images, used = make_batch(model, counts=(0, 0))
    with torch.no_grad():
        expected = torch_logits(model, tokens, mask, images, used).numpy()
    graph, parameters = load(model)
    found = call(graph, parameters, lambda llava, tokens: llava(tokens, None), ours(tokens))
    assert_close(np.asarray(found)[mask], expected[mask], 1e-4)


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu", "image_size": 33, "num_attention_heads": 2}, SIGLIP])
def test_vision_tower_alone(fields, randomise, load, call, assert_close):
    model = randomise(transformers.AutoModel.from_config(vision_config(**fields)))
    size = model.config.image_size
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        states = model(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    graph, parameters = load(model)
    for layer in range(len(states)) if fields else range(-len(states), 0):
        found = call(graph, parameters, lambda vit, images, layer=layer: vit(images, layer), images)
        assert_close(found, states[layer], 1e-4)


@pytest.mark.parametrize("fields", [
    {}, {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"model_type": "mistral", "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None},
])
def test_decoder_alone(fields, randomise, load, call, assert_close):
    model = randomise(transformers.AutoModelForCausalLM.from_config(text_config(**fields)))
    tokens = np.random.default_rng(0).integers(0, 200, (2, 50))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits
    graph, parameters = load(model)

    def logits(llama, tokens):
        positions = np.broadcast_to(np.arange(50), tokens.shape)
        return llama.logits(llama(llama.embed(tokens, np.float32), positions))

    assert_close(call(graph, parameters, logits, tokens), expected, 1e-4)
