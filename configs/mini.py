"""The whole paper in miniature, on a CPU: pictures of coloured shapes, a tiny CLIP, a tiny LLaMA, both stages.

It is the same code and the same schedule as a 7B run. `prepare` draws the data set and lets the rule-based teacher
write the instructions; `finish` scores the model on held-out pictures and writes report.html and report.json.
"""

import json
import time
from pathlib import Path

import llava_jax
from llava_jax.config import Data, Model, Optimizer, Recipe, Stage

START = time.perf_counter()
BACKBONES = Path(llava_jax.__file__).parent / "data" / "mini"
TEST_IMAGES = 600


def recipe() -> Recipe:
    data = "runs/mini/data"
    return Recipe(
        model=Model(vision=str(BACKBONES / "vision"), language=str(BACKBONES / "language"),
                    image_mode="square", template="mistral_instruct", remat="none"),
        stages={
            "align": Stage(
                learning_rates=(("projector/.*", 5e-3), ("(vision|decoder)/.*", None)),
                data=Data(path=f"{data}/captions.json", image_root=data, template="plain",
                          validation=f"{data}/captions_test.json", row_length=256, images_per_row=4),
                rows=16, steps=200,
            ),
            "instruct": Stage(
                learning_rates=(("(projector|decoder)/.*", 2e-3), ("vision/.*", None)),
                data=Data(path=f"{data}/instructions.json", image_root=data,
                          validation=f"{data}/instructions_test.json", row_length=384, images_per_row=4),
                optimizer=Optimizer(clip=1.0),
                rows=16, steps=1000,
            ),
        },
        output="runs/mini",
        log_every=20, validate_every=250, sample_every=250, checkpoint_every=250,
    )
