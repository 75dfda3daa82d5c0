"""LLaVA-OneVision 0.5B: the recipe llava_onevision_qwen2_7b with Qwen2 0.5B Instruct."""

from pathlib import Path

from llava_jax.config import Recipe, load_recipe


def recipe() -> Recipe:
    return load_recipe(str(Path(__file__).with_name("llava_onevision_qwen2_7b.py")),
                       language="checkpoints/Qwen2-0.5B-Instruct", output="runs/llava_onevision_qwen2_0_5b")
