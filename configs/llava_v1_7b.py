"""LLaVA as in the paper (Visual Instruction Tuning, section 5): CLIP ViT-L/14, Vicuna 7B, a linear projector.

595K filtered CC3M pairs for one epoch, then 158K instructions for three. Sequences are packed to
2048 tokens. A batch has about as many conversations as the paper's batches of 128 and 32.
"""

from llava_jax.config import Data, Mesh, Model, Recipe, Stage


def recipe() -> Recipe:
    return Recipe(
        model=Model(vision="checkpoints/clip-vit-large-patch14", language="checkpoints/vicuna-7b-v1.3",
                    projector="linear", image_mode="crop", template="vicuna_v1"),
        mesh=Mesh(fsdp=-1),
        stages={
            "align": Stage(
                learning_rates=(("projector/.*", 2e-3), ("(vision|decoder)/.*", None)),
                data=Data(path="data/cc3m_595k/chat.json", image_root="data/cc3m_595k/images", template="plain",
                          sequence_length=2048, tiles_per_sequence=7, workers=16),
                # A frozen decoder needs no optimizer state, so memory remains for activations.
                batch_size=16, remat="save_qkv",
            ),
            "instruct": Stage(
                learning_rates=(("(projector|decoder)/.*", 2e-5), ("vision/.*", None)),
                data=Data(path="data/llava_instruct_150k.json", image_root="data/coco/train2017",
                          sequence_length=2048, tiles_per_sequence=4, workers=16),
                batch_size=8, epochs=3,
            ),
        },
        output="runs/llava_v1_7b",
    )
