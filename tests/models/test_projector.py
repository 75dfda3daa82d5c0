"""A projector that joins 2 x 2 patches, against torch: values, gradients, answers, and towers that it does not suit."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from llava_jax import IMAGE_TOKEN_ID, convert, load
from llava_jax.errors import UserError
from llava_jax.models import llava
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import Projector
from llava_jax.models.vit import VisionConfig

GRID, INPUTS, OUTPUTS = 6, 5, 7


@pytest.mark.parametrize("kind, depth", [("merge2x2_linear", 1), ("merge2x2_mlp2x_gelu", 2)])
def test_values_and_gradients_against_torch(kind, depth):
    graph, parameters = llava.to_params(Projector(kind, INPUTS, OUTPUTS, GRID, rngs=nnx.Rngs(0)))
    features = np.random.default_rng(0).normal(size=(2, 3, GRID, GRID, INPUTS)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(2, 3 * GRID**2 // 4, OUTPUTS)).astype(np.float32)

    theirs = torch.tensor(features, requires_grad=True)
    linears = [torch.nn.Linear(OUTPUTS if i else 4 * INPUTS, OUTPUTS) for i in range(depth)]
    for i, linear in enumerate(linears):
        linear.weight.data = torch.tensor(np.asarray(parameters[f"layers_{i}/kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.asarray(parameters[f"layers_{i}/bias"]))
    rows = []
    for row in range(2):
        for tile in range(3):
            for y in range(0, GRID, 2):
                for x in range(0, GRID, 2):
                    square = [theirs[row, tile, y + down, x + right] for down in (0, 1) for right in (0, 1)]
                    token = linears[0](torch.cat(square))
                    rows.append(linears[1](torch.nn.functional.gelu(token)) if depth == 2 else token)
    expected = torch.stack(rows).reshape(weight.shape)
    (expected * torch.tensor(weight)).sum().backward()

    def weighted_sum(parameters, x):
        found = llava.from_params(graph, parameters)(x)
        return (found * weight).sum(), found

    flat = features.reshape(2, 3 * GRID**2, INPUTS)
    (of_parameters, of_features), found = jax.grad(weighted_sum, argnums=(0, 1), has_aux=True)(parameters, flat)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(of_features.reshape(features.shape), theirs.grad, atol=1e-5)
    for i, linear in enumerate(linears):
        np.testing.assert_allclose(of_parameters[f"layers_{i}/kernel"], linear.weight.grad.T, atol=1e-4)
        np.testing.assert_allclose(of_parameters[f"layers_{i}/bias"], linear.bias.grad, atol=1e-4)


def test_a_saved_model_answers_with_a_quarter_of_the_visual_tokens(parts, tmp_path):
    convert.main(["--vision", str(parts[0]), "--language", str(parts[1]), "--to", "native", str(tmp_path / "model"),
                  "--projector", "merge2x2_mlp2x_gelu"])
    model = load(tmp_path / "model")
    images = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    answer = model.generate("<image> Or <image>?", images, max_new_tokens=8)
    assert answer.prompt_tokens.count(IMAGE_TOKEN_ID) == 2  # the tower has 2 x 2 patches
    inputs = model.encode("<image> Or <image>?", images)
    inputs["tokens"] = np.array([[*answer.prompt_tokens, *answer.tokens]])
    inputs["visual_index"] = np.pad(inputs["visual_index"], ((0, 0), (0, len(answer.tokens))), constant_values=-1)
    logits = np.asarray(model.model(**inputs))[0, len(answer.prompt_tokens) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("vision, select, message", [
    (VisionConfig(384, 14), "patch", "the vision tower has 27 x 27 and feature_select is patch; an even number"),
    (VisionConfig(336, 14), "cls_patch", "has 24 x 24 and feature_select is cls_patch"),
])
def test_towers_that_do_not_suit(vision, select, message):
    with pytest.raises(UserError, match=message):
        LlavaConfig(vision=vision, projector="merge2x2_mlp2x_gelu", feature_select=select)


def test_a_processor_with_a_token_for_each_patch_is_refused():
    with pytest.raises(UserError, match="processor.patches is 24, but 12 suits vision, projector and feature_select"):
        dataclasses.replace(LlavaConfig(), projector="merge2x2_mlp2x_gelu")
