"""LLaVA-1.5 7B: CLIP ViT-L/14 at 336 pixels, Vicuna 7B v1.5, a two-layer projector; 558K pairs, then the 665K mix.

A batch of packed sequences has about as many conversations as the published batches of 256 and 128. As in the
original, stage 1 crops its images to a square and stage 2 pads them.
"""

from llava_jax.config import Data, Mesh, Model, Recipe, Stage


def recipe(language: str = "checkpoints/vicuna-7b-v1.5", output: str = "runs/llava_1_5_7b") -> Recipe:
    return Recipe(
        model=Model(vision="checkpoints/clip-vit-large-patch14-336", language=language,
                    projector="mlp2x_gelu", image_mode="pad", template="vicuna_v1"),
        mesh=Mesh(fsdp=-1),
        stages={
            "align": Stage(
                learning_rates=(("projector/.*", 1e-3), ("(vision|decoder)/.*", None)),
                data=Data(path="data/blip_laion_cc_sbu_558k.json", image_root="data/blip_laion_cc_sbu_558k",
                          template="plain", image_mode="crop",
                          sequence_length=2560, tiles_per_sequence=4, workers=16),
                # A frozen decoder needs no optimizer state, so memory remains for activations.
                batch_size=64, remat="save_qkv",
            ),
            "instruct": Stage(
                learning_rates=(("(projector|decoder)/.*", 2e-5), ("vision/.*", None)),
                data=Data(path="data/llava_v1_5_mix665k.json", image_root="data",
                          sequence_length=2560, tiles_per_sequence=3, bad_rows="skip", workers=16),
                batch_size=64,
            ),
        },
        output=output,
    )
