"""A tiny CLIP: regions and whole pictures against captions that fit them."""

import copy
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.images import CLIP_MEAN, CLIP_STD
from llava_jax.models.attention import bidirectional_attention
from llava_jax.models.layers import mean_and_variance, scan
from llava_jax.models.llama import Llama, LlamaConfig
from llava_jax.models.llava import from_params, to_params
from llava_jax.models.vit import FusedAttention, Vit
from llava_jax.weights import configs
from mini_backbones.common import VISION, save, start, train, write_json

REGIONS, REGION_TOKENS, SCENE_TOKENS = 5, 12, 40
SHARES = (0.25, 0.5, 0.6, 0.45)
"""How often a region's caption names the size, the colour, the shape and the place."""
RECOLOURED = 0.3
"""Share of the pictures whose colours are mixed at random, and whose captions name none: so a shape is known by its
outline, whatever its colour."""
ATTRIBUTES = {
    word: i + 1
    for i, word in enumerate((*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES, "background", *scenes.POSITIONS))
}
WORDS = (*ATTRIBUTES, "a", "an", "and", "at", "the", "of", "picture", "object", "objects", *scenes.NUMBERS)
"""Words of the captions. As in CLIP, the text tower has a vocabulary of its own, which is not the decoder's."""


class Clip(nnx.Module):
    """The tower and what is thrown away after training: a small text tower and the maps into the common space."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64):
        self.vision = Vit(VISION, rngs=rngs)
        self.text = Llama(
            LlamaConfig(
                vocab_size=len(WORDS) + 1,
                hidden_size=width,
                intermediate_size=2 * width,
                num_layers=2,
                num_heads=2,
                num_kv_heads=2,
                head_dim=width // 2,
            ),
            rngs=rngs,
        )

        def matrix(inputs):
            return nnx.Param(jax.random.normal(rngs.params(), (inputs, width)) * inputs**-0.5)

        self.region, self.scene = matrix(VISION.hidden_size), matrix(VISION.hidden_size)
        self.region_text, self.scene_text = matrix(width), matrix(width)
        self.log_scale = nnx.Param(jnp.full(2, 2.3))

    def features(self, images):
        """The patches of the layer that LLaVA reads [B, P, D], and the class token after the last layer [B, D]."""
        x = self.vision((images.astype(jnp.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD), -2)
        layers = copy.copy(self.vision.layers)
        layers.attention = FusedAttention(layers.attention)
        attend = bidirectional_attention(self.vision.attention, VISION.num_heads)
        (last, _), _ = scan(jax.tree.map(lambda p: p[-1:], layers), (x, mean_and_variance(x)),
                            call=lambda block, state: (block(state, attend), None))
        return x[:, 1:], self.vision.post_norm(last[:, 0])

    def embed_text(self, tokens, to_common):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.text(self.text.embed(tokens, jnp.float32), positions)
        there = (tokens > 0)[..., None]
        return unit((x * there).sum(1) / jnp.maximum(there.sum(1), 1) @ to_common[...])

    def loss(self, batch: dict):
        patches, pooled = self.features(batch["images"])
        regions = jnp.einsum("BRP,BPD->BRD", batch["weights"], patches).reshape(-1, VISION.hidden_size)
        regions = unit(standardise(regions) @ self.region[...])
        shown, said = batch["shown"].reshape(-1, 4), batch["said"].reshape(-1, 4)
        there = shown[:, 2] > 0
        fits = ((said[:, None] == 0) | (said[:, None] == shown)).all(-1) & there[:, None] & there
        texts = self.embed_text(batch["texts"].reshape(-1, REGION_TOKENS), self.region_text)
        scores = jnp.exp(self.log_scale[0]) * texts @ regions.T
        by_text, by_region = multi_positive(scores, fits, there), multi_positive(scores.T, fits.T, there)
        same = (batch["captions"][:, None] == batch["captions"]).all(-1)
        whole = (
            jnp.exp(self.log_scale[1])
            * self.embed_text(batch["captions"], self.scene_text)
            @ unit(pooled @ self.scene[...]).T
        )
        all_there = batch["captions"][:, 0] > 0
        by_scene = multi_positive(whole, same, all_there) + multi_positive(whole.T, same, all_there)
        return by_text + 0.5 * by_region + 0.1 * by_scene


def word_ids(text: str) -> list[int]:
    """Text to ids from 1 on; 0 fills up a row."""
    return [1 + WORDS.index(word) for word in re.findall("[a-z-]+", text.lower())]


def unit(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def standardise(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def multi_positive(scores, fits, there):
    """Cross-entropy of each row's scores against an even share for all columns that fit; over rows and columns
    that are there.
    """
    logs = jax.nn.log_softmax(jnp.where(there, scores, -1e9), axis=-1)
    losses = -(jnp.where(fits, logs, 0).sum(-1) / jnp.maximum(fits.sum(-1), 1))
    return (losses * there).sum() / there.sum()


def covered(thing: scenes.Object) -> np.ndarray:
    """The patches, of the 36, of which the object's box covers more than 2 pixels in both directions."""
    x, y, w, h = thing.box
    edges = np.arange(0, scenes.SIZE, VISION.patch_size)
    across = np.minimum(x + w, edges + VISION.patch_size) - np.maximum(x, edges) > 2
    down = np.minimum(y + h, edges + VISION.patch_size) - np.maximum(y, edges) > 2
    return np.flatnonzero(down[:, None] & across)


def cell_patches(cell: int) -> list[int]:
    row, column = divmod(cell, 3)
    return [(2 * row + down) * 6 + 2 * column + across for down in (0, 1) for across in (0, 1)]


def region_batch(pictures: tuple, rng: random.Random, size: int) -> dict[str, np.ndarray]:
    """Pictures, the patches of their regions (objects and one empty cell), and a caption of each that names
    some attributes. Recoloured pictures have no caption of the whole.
    """
    scenes_, images = pictures
    weights = np.zeros((size, REGIONS, VISION.patches), np.float32)
    shown, said = (np.zeros((size, REGIONS, 4), np.int32) for _ in range(2))
    texts, captions = (
        np.zeros((size, REGIONS, REGION_TOKENS), np.int32),
        np.zeros((size, SCENE_TOKENS), np.int32),
    )
    chosen = [rng.randrange(len(images)) for _ in range(size)]
    recoloured = np.array([rng.random() < RECOLOURED for _ in range(size)])
    for b, objects in enumerate(scenes_[i] for i in chosen):
        empty = rng.choice(sorted(set(range(9)) - {thing.cell for thing in objects}))
        regions = [((o.size, "" if recoloured[b] else o.colour, o.shape, o.position), list(covered(o)))
                   for o in objects]
        regions.append((("", "", "background", scenes.POSITIONS[empty]), cell_patches(empty)))
        for r, (words, patches) in enumerate(regions):
            # A part of the patches, so that each of them comes to tell of the whole object.
            some = rng.sample(patches, rng.randint(1, len(patches)))
            weights[b, r, some] = 1 / len(some)
            named = [bool(word) and rng.random() < share for word, share in zip(words, SHARES, strict=True)]
            if words[2] == "background":
                named[2] = True
            elif not any(named):
                named[rng.choice([i for i in (1, 2, 3) if words[i]])] = True
            shown[b, r] = [ATTRIBUTES.get(word, 0) for word in words]
            said[b, r] = shown[b, r] * named
            ids = word_ids(region_caption(words, named))
            texts[b, r, : len(ids)] = ids
        ids = word_ids(rng.choice(scenes.captions(objects)))[:SCENE_TOKENS]
        captions[b, : len(ids)] = 0 if recoloured[b] else ids
    pixels = images[chosen]
    for b in np.flatnonzero(recoloured):
        mix = np.array([[rng.random() ** 2 for _ in range(3)] for _ in range(3)])
        pixels[b] = pixels[b] @ (mix / mix.sum(0))
    return {
        "images": pixels,
        "weights": weights,
        "shown": shown,
        "said": said,
        "texts": texts,
        "captions": captions,
    }


def region_caption(words: tuple, named: list[bool]) -> str:
    """ "a red object at the top": the words of (size, colour, shape, place) that are named."""
    size, colour, shape, place = (word if name else "" for word, name in zip(words, named, strict=True))
    noun = (
        shape
        if shape == "background"
        else " ".join(("a", size, colour, shape or "object")).replace("  ", " ").replace("  ", " ")
    )
    return f"{noun} at the {place}" if place else noun


def draw(count: int, seed: str) -> tuple[list, np.ndarray]:
    rng = random.Random(seed)
    noise = np.random.default_rng(rng.getrandbits(64))
    objects = [scenes.sample(rng) for _ in range(count)]
    return objects, np.stack([np.asarray(scenes.render(thing, rng, noise)) for thing in objects])


def probe(features, pictures: tuple) -> dict[str, float]:
    """How well ridge regression reads each attribute off single patches that an object covers; a third of the
    pictures is held out.
    """
    objects, images = pictures
    hidden = np.concatenate([features(images[i : i + 250]) for i in range(0, len(images), 250)])
    kinds = {
        "colour": tuple(scenes.COLOURS),
        "shape": scenes.SHAPES,
        "position": scenes.POSITIONS,
        "size": scenes.SIZES,
    }
    rows = [(i, thing, patch) for i, scene in enumerate(objects) for thing in scene for patch in covered(thing)]
    x = np.stack([hidden[i, patch] for i, _, patch in rows]).astype(np.float64)
    x = np.concatenate([(x - x.mean(0)) / x.std(0).mean(), np.ones((len(x), 1))], axis=1)
    fit = np.array([i < len(images) * 2 // 3 for i, _, _ in rows])
    gram, scores = x[fit].T @ x[fit] + 3 * np.eye(x.shape[1]), {}
    for kind, names in kinds.items():
        y = np.array([names.index(getattr(thing, kind)) for _, thing, _ in rows])
        weights = np.linalg.solve(gram, x[fit].T @ np.eye(len(names))[y[fit]])
        scores[kind] = round(float((np.argmax(x[~fit] @ weights, 1) == y[~fit]).mean()), 4)
    return scores


def make_vision(out: Path, seed: int, steps: int, size: int = 64, peak: float = 1.5e-3) -> dict:
    pictures, held_out = draw(20_000, f"{seed} vision"), draw(1500, f"{seed} probe")
    graph, parameters = to_params(Clip(nnx.Rngs(seed)))
    parameters = start(parameters, {r"vision/position_embedding": 10, r".*/kernel": 3})
    rng = random.Random(f"{seed} regions")
    loss = lambda parameters, batch: from_params(graph, parameters).loss(batch)  # noqa: E731
    parameters = train(
        "vision", loss, parameters, lambda _: region_batch(pictures, rng, size), steps, peak
    )
    features = jax.jit(lambda images: from_params(graph, parameters).features(images)[0])
    scores = probe(features, held_out)
    print("vision", scores, flush=True)
    save(
        out / "vision",
        {k: v for k, v in parameters.items() if k.startswith("vision/")},
        configs.hf_vision(VISION),
    )
    write_json(
        out / "vision" / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": 3,
            "size": {"shortest_edge": scenes.SIZE},
            "do_center_crop": True,
            "crop_size": {"height": scenes.SIZE, "width": scenes.SIZE},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(map(float, CLIP_MEAN)),
            "image_std": list(map(float, CLIP_STD)),
        },
    )
    return scores
