"""LLaVA-NeXT Llama 3 8B: the recipe llava_next_vicuna_7b with Llama 3 8B Instruct."""

from pathlib import Path

from llava_jax.config import Recipe, load_recipe


def recipe() -> Recipe:
    return load_recipe(str(Path(__file__).with_name("llava_next_vicuna_7b.py")), template="llava_llama_3",
                       language="checkpoints/Meta-Llama-3-8B-Instruct", output="runs/llava_next_llama3_8b")
