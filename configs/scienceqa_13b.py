"""ScienceQA as in the paper (Visual Instruction Tuning, section 5.2): Vicuna 13B, tuned to reason and then to answer.

The projector is aligned on the 595K pairs of CC3M, then projector and decoder are trained for 12 epochs on ScienceQA
alone, in the format QCM-LEA: lecture, explanation, "The answer is B." The data file of the second stage is made from
ScienceQA's own files, or Hugging Face's, in its folder. Sequences are packed to 2048 tokens. A
batch has about as many conversations as the paper's batches of 128 and 32.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Data, Optimizer, Recipe, Stage, load_recipe


class ScienceQARecipe(Recipe):
    """The recipe with the conversion of its data."""

    def prepare(self) -> None:
        """Writes the training file, if it is missing, from ScienceQA's files in its folder."""
        from llava_jax.evaluate.scienceqa.problems import ScienceQAData

        path = Path(self.stages["scienceqa"].data.path)
        if not path.exists():
            ScienceQAData(str(path.parent), splits=("train",), formats=("QCM-LEA",)).run()


def recipe() -> ScienceQARecipe:
    base = load_recipe(str(Path(__file__).with_name("llava_v1_7b.py")))
    tune = Stage(
        learning_rates=base.stages["instruct"].learning_rates,
        data=Data(path="data/scienceqa/llava_train_QCM-LEA.json", image_root="data/scienceqa/images/train",
                  sequence_length=2048, tiles_per_sequence=4, workers=16),
        optimizer=Optimizer(clip=1.0),
        batch_size=8, epochs=12,
    )
    return ScienceQARecipe(
        model=dataclasses.replace(base.model, language="checkpoints/vicuna-13b-v1.3"), mesh=base.mesh,
        stages={"align": base.stages["align"], "scienceqa": tune}, output="runs/scienceqa_13b",
    )
