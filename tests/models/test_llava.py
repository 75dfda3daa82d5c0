"""What training relies on: gradients, remat policies, packed rows, images as bytes, visual tokens by index."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.models import llava
from llava_jax.models.layers import REMAT
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import IMAGE_TOKEN_ID

CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4),
    text=LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=16),
)
IMAGE = 199


def conversation(rng, images, texts=6):
    """Tokens of a conversation with some images, each after a text; and the images."""
    pieces = [rng.integers(3, IMAGE, texts)]
    for _ in range(images):
        pieces += [np.full(CONFIG.processor.features_per_tile, IMAGE_TOKEN_ID), rng.integers(3, IMAGE, texts)]
    return np.concatenate(pieces).astype(np.int32), rng.normal(size=(images, 28, 28, 3)).astype(np.float32)


def loss(model, tokens, images):
    """Mean cross-entropy of the next token where that is text."""
    scores = jax.nn.log_softmax(model(tokens, images)[:, :-1])
    labels = tokens[:, 1:]
    scores = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(scores * (labels >= 0)) / jnp.sum(labels >= 0)


def value_and_grad(graph, parameters, *batch):
    return jax.jit(jax.value_and_grad(lambda p: loss(llava.from_params(graph, p), *batch)))(parameters)


def test_gradients(randomise, load, assert_close):
    model = randomise(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4),
        text_config=transformers.Qwen2Config(
            vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256),
        image_token_index=IMAGE)))
    tokens, images = conversation(np.random.default_rng(0), images=2)
    theirs = torch.tensor(np.where(tokens < 0, IMAGE, tokens)[None]).long()
    logits = model(input_ids=theirs, pixel_values=torch.tensor(images).permute(0, 3, 1, 2)).logits
    labels = torch.where(theirs == IMAGE, -100, theirs)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    expected.backward()

    graph, parameters = load(model)
    found, gradients = value_and_grad(graph, parameters, tokens[None], images[None])
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    gradients = jax.tree.map(np.asarray, gradients)

    def close(path, weight, layer=None):
        gradient = gradients[path] if layer is None else gradients[path][layer]
        expected = weight.grad.numpy()
        assert np.abs(expected).max() > 0
        # One of ours has its inputs first and may keep heads apart; the other has its outputs first.
        expected = expected.T.reshape(gradient.shape)
        assert np.abs(gradient - expected).max() <= 1e-3 * np.abs(expected).max()

    projector = model.model.multi_modal_projector
    for i, linear in enumerate([projector.linear_1, projector.linear_2]):
        close(f"projector/layers_{i}/kernel", linear.weight)
        close(f"projector/layers_{i}/bias", linear.bias)
    layer = model.model.language_model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    for path, weight in {
        "attention_norm/scale": layer.input_layernorm.weight,
        "attention/q_proj/kernel": attention.q_proj.weight, "attention/q_proj/bias": attention.q_proj.bias,
        "attention/k_proj/kernel": attention.k_proj.weight, "attention/k_proj/bias": attention.k_proj.bias,
        "attention/v_proj/kernel": attention.v_proj.weight, "attention/v_proj/bias": attention.v_proj.bias,
        "attention/o_proj/kernel": attention.o_proj.weight,
        "mlp_norm/scale": layer.post_attention_layernorm.weight,
        "mlp/gate_proj/kernel": mlp.gate_proj.weight, "mlp/up_proj/kernel": mlp.up_proj.weight,
        "mlp/down_proj/kernel": mlp.down_proj.weight,
    }.items():
        close(f"decoder/layers/{path}", weight, layer=1)


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(0)
    return {path: rng.normal(path.endswith("scale"), 0.1, x.shape).astype(np.float32)
            for path, x in llava.abstract_params(CONFIG)[1].items()}


def test_remat_policies_agree(parameters):
    tokens, images = conversation(np.random.default_rng(0), images=1)
    results = {remat: value_and_grad(llava.abstract_params(CONFIG, remat=remat)[0], parameters, tokens[None],
                                     images[None])
               for remat in REMAT}
    expected, expected_gradients = results["none"]
    assert len(REMAT) == 6
    scales = {path: float(np.abs(gradient).max()) for path, gradient in expected_gradients.items()}
    for value, gradients in results.values():
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for path, gradient in gradients.items():
            # Some are nothing but rounding: softmax does not see the bias of the vision tower's keys.
            atol = 1e-4 * max(scales[path], 1e-3 * max(scales.values()))
            np.testing.assert_allclose(gradient, expected_gradients[path], atol=atol, rtol=0, err_msg=path)


def test_an_unknown_remat_policy(parameters, call):
    tokens, images = conversation(np.random.default_rng(0), images=1)
    graph = llava.abstract_params(CONFIG, remat="some")[0]
    with pytest.raises(UserError, match="unknown policy 'some'.*save_dots"):
        call(graph, parameters, lambda m, *batch: m(*batch), tokens[None], images[None])


def test_packed_conversations_do_not_see_each_other(parameters, call, assert_close):
    rng = np.random.default_rng(0)
    first, second = conversation(rng, images=1), conversation(rng, images=2)
    graph = llava.abstract_params(CONFIG)[0]
    alone = [call(graph, parameters, lambda m, *batch: m(*batch), tokens[None], images[None])[0]
             for tokens, images in (first, second)]

    lengths = [len(first[0]), len(second[0])]
    row = np.pad(np.concatenate([first[0], second[0]]), (0, 3))[None]
    segments = np.repeat([1, 2, 0], [*lengths, 3])[None].astype(np.int32)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(3)])[None].astype(np.int32)
    images = np.concatenate([first[1], second[1], np.zeros((1, 28, 28, 3), np.float32)])[None]
    packed = call(graph, parameters, lambda m, *batch: m(*batch), row, images, positions, segments)
    assert_close(packed[0, : lengths[0]], alone[0], 1e-4)
    assert_close(packed[0, lengths[0] : sum(lengths)], alone[1], 1e-4)


def test_images_as_bytes(parameters, call, assert_close):
    rng = np.random.default_rng(0)
    tokens, _ = conversation(rng, images=1)
    tiles = rng.integers(0, 256, (1, 1, 28, 28, 3), np.uint8)
    graph = llava.abstract_params(CONFIG)[0]
    outputs = [call(graph, parameters, lambda m, *batch: m(*batch), tokens[None], images)
               for images in (tiles, ImageProcessor().normalise(tiles))]
    assert_close(*outputs, 1e-4)


@pytest.mark.parametrize("layer, select, message", [
    (-5, "patch", "feature_layer -5.*3 layers"), (4, "patch", "feature_layer 4"), (-2, "cls", "feature_select 'cls'")])
def test_features_that_do_not_exist(layer, select, message):
    with pytest.raises(UserError, match=message):
        LlavaConfig(vision=CONFIG.vision, text=CONFIG.text, feature_layer=layer, feature_select=select)


@pytest.mark.parametrize("projector, side", [("mlp2x_gelu", 4), ("merge2x2_mlp2x_gelu", 2)])
def test_visual_tokens_by_index_against_a_plain_loop(projector, side):
    """Two packed images of other sizes behind an empty tile: every visual token takes its feature or the newline."""
    processor = ImageProcessor(28, "anyres", side, pinpoints=((56, 28), (28, 84)))
    config = dataclasses.replace(CONFIG, projector=projector, processor=processor)
    model = llava.LlavaModel(config, rngs=nnx.Rngs(3))
    rng, num_tiles = np.random.default_rng(0), 8
    layouts = [processor.layout(50, 24), processor.layout(20, 60)]
    assert sum(layout.tiles for layout in layouts) == 7
    counts = [len(layout.index) for layout in layouts]
    tokens = np.concatenate([[5], [IMAGE_TOKEN_ID] * counts[0], [6, 7], [IMAGE_TOKEN_ID] * counts[1], [8]])
    index = np.full(len(tokens), -1)
    index[tokens == IMAGE_TOKEN_ID] = processor.visual_tokens(layouts, 1, num_tiles)["visual_index"]
    tiles = rng.integers(0, 256, (1, num_tiles, 28, 28, 3), np.uint8)
    found = np.asarray(model.embed(tokens[None], tiles, index[None]))[0]

    features = [np.asarray(model.projector(model.features(tiles[:, tile : tile + 1])))[0] for tile in range(num_tiles)]
    position, first_tile = 0, 1
    for before, layout in zip(([5], [6, 7]), layouts, strict=True):
        position += len(before)
        for feature in layout.index.tolist():
            tile, patch = divmod(feature, side**2)
            newline = tile == layout.tiles
            expected = model.image_newline.get_value() if newline else features[first_tile + tile][patch]
            np.testing.assert_allclose(found[position], expected, rtol=1e-4, atol=1e-6)
            position += 1
        first_tile += layout.tiles
    text = np.asarray(model.decoder.embed(np.array([[5, 6, 7, 8]]), jnp.float32))[0]
    np.testing.assert_array_equal(found[tokens != IMAGE_TOKEN_ID], text)


@pytest.mark.bits
def test_one_tile_an_image_needs_no_index(parameters):
    """The k-th visual token is the k-th feature: the index of the batch changes no bit."""
    model = llava.from_params(llava.abstract_params(CONFIG)[0], parameters)
    tokens, images = conversation(np.random.default_rng(0), images=2)
    index = np.full(len(tokens), -1)
    visual = CONFIG.processor.visual_tokens([CONFIG.processor.layout()] * 2, 0, 2)
    index[tokens == IMAGE_TOKEN_ID] = visual["visual_index"]
    plain, indexed = (model.embed(tokens[None], images[None], *extra) for extra in ((), (index[None],)))
    np.testing.assert_array_equal(plain, indexed)


def test_weighted_visual_tokens_are_sums_of_four(parameters):
    model = llava.from_params(llava.abstract_params(CONFIG)[0], parameters)
    rng = np.random.default_rng(1)
    tokens, images = conversation(rng, images=1)
    index, weight = rng.integers(0, 16, (len(tokens), 4)), rng.random((len(tokens), 4)).astype(np.float32)
    found = np.asarray(model.embed(tokens[None], images[None], index[None], weight[None]))[0]
    visual = np.asarray(model.projector(model.features(images[None])))[0]
    for position in np.flatnonzero(tokens == IMAGE_TOKEN_ID):
        expected = sum(w * visual[i] for w, i in zip(weight[position], index[position], strict=True))
        np.testing.assert_allclose(found[position], expected, rtol=1e-4, atol=1e-6)


def test_a_processor_that_does_not_suit_the_tower_is_refused():
    with pytest.raises(UserError, match="processor.size is 336, but 28 suits"):
        dataclasses.replace(CONFIG, processor=ImageProcessor())
    with pytest.raises(UserError, match="processor.class_token is False, but True suits"):
        dataclasses.replace(CONFIG, feature_select="cls_patch")


def test_fresh_parameters_have_the_paths_and_shapes_of_the_model():
    processor = ImageProcessor(28, "anyres", CONFIG.vision.grid, pinpoints=((28, 56),))
    config = dataclasses.replace(CONFIG, processor=processor)
    expected = {path: x.shape for path, x in llava.abstract_params(config)[1].items()}
    found = {path: x.shape for path, x in jax.eval_shape(lambda: llava.fresh_params(config, expected, 3)).items()}
    assert found == expected and "image_newline" in expected
    assert llava.fresh_params(config, {"image_newline"}, 3).keys() == {"image_newline"}
