"""LLaVA-1.5 7B with QLoRA: as llava_1_5_7b_lora, with the decoder's frozen kernels in 4 bits, for one to four chips.

Rank, alpha and rates are those of LLaVA's scripts/finetune_qlora.sh.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Lora, Recipe, load_recipe


def recipe() -> Recipe:
    lora = load_recipe(str(Path(__file__).with_name("llava_1_5_7b_lora.py")))
    stages = {name: dataclasses.replace(stage, gradient_accumulation=16, remat="full")
              for name, stage in lora.stages.items()}
    stages["instruct"] = dataclasses.replace(stages["instruct"], learning_rates=(
        ("projector/.*|.*/lora_.*", 2e-5), ("(vision|decoder)/(?!.*/lora_).*", None)))
    return dataclasses.replace(
        lora, model=dataclasses.replace(lora.model, lora=Lora(rank=64, alpha=16.0, dropout=0.05), quantize="nf4"),
        stages=stages, output="runs/llava_1_5_7b_qlora")
