"""LoRA on the finished LLaVA-1.5 7B, for a task of your own: give --stages.task.data.path and --output.

The settings are those of LLaVA's scripts/v1_5/finetune_task_lora.sh.
"""

from llava_jax.config import Data, Lora, Mesh, Model, Recipe, Stage


def recipe() -> Recipe:
    return Recipe(
        model=Model(llava="checkpoints/llava-1.5-7b-hf", lora=Lora(rank=128, alpha=256.0, dropout=0.05)),
        mesh=Mesh(fsdp=-1),
        stages={
            "task": Stage(
                learning_rates=(
                    (".*/lora_.*", 2e-4), ("projector/.*", 2e-5), ("(vision|decoder)/(?!.*/lora_).*", None)),
                data=Data(path="data/task.json", sequence_length=2560, tiles_per_sequence=3, workers=16),
                batch_size=64,
            ),
        },
        output="runs/llava_1_5_7b_task_lora",
    )
