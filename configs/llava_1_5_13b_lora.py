"""LLaVA-1.5 13B with LoRA: the recipe llava_1_5_7b_lora with Vicuna 13B v1.5."""

from pathlib import Path

from llava_jax.config import Recipe, load_recipe


def recipe() -> Recipe:
    return load_recipe(str(Path(__file__).with_name("llava_1_5_7b_lora.py")), language="checkpoints/vicuna-13b-v1.5",
                       output="runs/llava_1_5_13b_lora")
