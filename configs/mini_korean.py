"""The miniature with a quarter of its instructions in Korean, in the same number of steps.

Only the data differ: `synthesize`'s rules write a share of the conversations in Korean. The pictures and stage 1 are
those of `mini`. `--korean 0.1` is another share. `scripts/ablate_mini.py korean` compares shares.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Recipe, load_recipe

MINI = load_recipe(str(Path(__file__).with_name("mini.py")))


def recipe() -> Recipe:
    return dataclasses.replace(MINI, korean=0.25, output="runs/mini_korean")
