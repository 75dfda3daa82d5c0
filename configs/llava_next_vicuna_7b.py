"""LLaVA-1.6 (NeXT) 7B: CLIP ViT-L/14 at 336 pixels, Vicuna 7B v1.5; tiles of large images, and a tower that is trained.

Stage 1 is that of LLaVA-1.5. Stage 2 trains all parts on the 779K rows of LLaVA-NeXT-Data. A photo is 5 tiles and
2,340 tokens, so that 10,240 tokens have about 4 conversations, and a batch of 32 sequences about 134.
Rates are those of LLaVA-NeXT's direct_finetune_clip.sh. The tower's rate is also in the published config.json. Base
rate and batch size of the published checkpoint are not known: archived scripts have 5e-6 and 2e-5. Conversations longer
than the decoder's context (Vicuna: 4,096 tokens) are skipped, where the original cuts them.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Data, Mesh, Model, Recipe, Stage, load_recipe


def recipe(language: str = "checkpoints/vicuna-7b-v1.5", template: str = "vicuna_v1",
           output: str = "runs/llava_next_vicuna_7b") -> Recipe:
    align = load_recipe(str(Path(__file__).with_name("llava_1_5_7b.py"))).stages["align"]
    return Recipe(
        model=Model(vision="checkpoints/clip-vit-large-patch14-336", language=language, projector="mlp2x_gelu",
                    image_mode="anyres", pinpoints="(336x672),(672x336),(672x672),(1008x336),(336x1008)",
                    template=template),
        mesh=Mesh(fsdp=-1),
        stages={
            # The newline is trained with the decoder, as in the original.
            "align": dataclasses.replace(align, learning_rates=(
                ("projector/.*", 1e-3), ("(vision|decoder)/.*|image_newline", None))),
            "instruct": Stage(
                learning_rates=(("(projector|decoder)/.*|image_newline", 1e-5), ("vision/.*", 2e-6)),
                data=Data(path="data/LLaVA-NeXT-Data", sequence_length=10_240, tiles_per_sequence=20, bad_rows="skip",
                          workers=16),
                batch_size=32,
            ),
        },
        output=output,
    )
