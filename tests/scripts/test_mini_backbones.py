"""scripts/train_mini_backbones.py: the losses that it trains with, on one batch."""

import random
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import llava_jax
from llava_jax.images import CLIP_MEAN, CLIP_STD
from llava_jax.models.llava import from_params, to_params


@pytest.fixture(scope="module")
def parts():
    """The modules `vision` and `language`, and an Encoder of the shipped tokenizer."""
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    from mini_backbones import common, language, vision

    yield vision, language, common.Encoder(Path(llava_jax.__file__).parent / "data" / "mini" / "language")
    sys.path.remove(scripts)


def test_the_class_token_has_passed_all_layers(parts):
    vision, _, _ = parts
    clip = vision.Clip(nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
    patches, pooled = clip.features(images)
    normalised = (images.astype(np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    np.testing.assert_allclose(patches, clip.vision(normalised, -2)[:, 1:], atol=1e-5)
    np.testing.assert_allclose(pooled, clip.vision.post_norm(clip.vision(normalised, -1)[:, 0]), atol=1e-5)


def test_every_parameter_of_clip_has_a_gradient_but_the_unused_head(parts):
    vision, _, encode = parts
    graph, parameters = to_params(vision.Clip(nnx.Rngs(0)))
    batch = vision.region_batch(vision.draw(8, "0"), encode, random.Random(0), 4)
    gradient = jax.grad(lambda parameters: from_params(graph, parameters).loss(batch))(parameters)
    silent = {path for path, value in gradient.items() if not np.abs(value).max() > 0}
    assert silent == {"text/lm_head/kernel"} and all(np.isfinite(value).all() for value in gradient.values())


def test_every_language_parameter_has_a_gradient(parts):
    _, language, encode = parts
    graph, parameters = to_params(language.Language(nnx.Rngs(0)))
    rng = random.Random(0)
    batch, _ = language.pack(iter(partial(language.domain_page, encode, rng), None), 2, 184)
    gradient = jax.grad(partial(language.language_loss, graph))(parameters, batch)
    assert all(np.isfinite(value).all() and np.abs(value).max() > 0 for value in gradient.values())
