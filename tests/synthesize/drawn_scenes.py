"""Scenes as captions and boxes, for the tests of the rules teacher."""

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import Box, Context


def shapes(number, rng):
    size = scenes.SIZE
    boxes = [
        Box(f"{o.colour} {o.shape}", o.box[0] / size, o.box[1] / size, sum(o.box[::2]) / size, sum(o.box[1::2]) / size)
        for o in scenes.sample(rng, scenes.PAIRS)
    ]
    return Context(f"s{number}", "", ("A picture",), tuple(boxes))
