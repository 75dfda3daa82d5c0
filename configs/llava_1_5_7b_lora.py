"""LLaVA-1.5 7B with LoRA: stage 1 as in llava_1_5_7b; stage 2 trains adapters of the decoder, and the whole projector.

The settings are those of LLaVA's scripts/v1_5/finetune_lora.sh.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Lora, Recipe, load_recipe


def recipe(language: str = "checkpoints/vicuna-7b-v1.5", output: str = "runs/llava_1_5_7b_lora") -> Recipe:
    full = load_recipe(str(Path(__file__).with_name("llava_1_5_7b.py")), language=language, output=output)
    instruct = dataclasses.replace(full.stages["instruct"], learning_rates=(
        (".*/lora_.*", 2e-4), ("projector/.*", 2e-5), ("(vision|decoder)/(?!.*/lora_).*", None)))
    return dataclasses.replace(
        full, model=dataclasses.replace(full.model, lora=Lora(rank=128, alpha=256.0, dropout=0.05)),
        stages=full.stages | {"instruct": instruct})
