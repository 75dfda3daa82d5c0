"""Scenes as captions and boxes, for the tests of the rules teacher."""

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import Context


def shapes(number, rng):
    boxes = tuple(thing.to_box() for thing in scenes.sample(rng, scenes.PAIRS))
    return Context(f"s{number}", "", ("A picture",), boxes)
