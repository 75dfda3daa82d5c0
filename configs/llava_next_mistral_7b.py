"""LLaVA-1.6 (NeXT) Mistral 7B: the recipe llava_next_vicuna_7b with Mistral 7B Instruct v0.2."""

from pathlib import Path

from llava_jax.config import Recipe, load_recipe


def recipe() -> Recipe:
    return load_recipe(str(Path(__file__).with_name("llava_next_vicuna_7b.py")), template="mistral_instruct",
                       language="checkpoints/Mistral-7B-Instruct-v0.2", output="runs/llava_next_mistral_7b")
