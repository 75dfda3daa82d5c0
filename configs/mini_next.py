"""The miniature on larger pictures: tiles as in LLaVA-1.6 (anyres), for small objects and signs.

Stage 1 is that of `mini`. Stage 2 trains on pictures of 120 x 120, 180 x 60 and 60 x 180 pixels. The vision tower reads
60 x 60, so one tile shows small objects with a few pixels. Further tiles show them as they were drawn.
`scripts/ablate_next.py` compares both after the same steps.
"""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import llava_jax
from llava_jax.config import Data, Optimizer, Recipe, Stage, load_recipe

if TYPE_CHECKING:
    from llava_jax.evaluate.tasks.base import Scores

MINI = load_recipe(str(Path(__file__).with_name("mini.py")))
PICTURES = ((120, 120), (180, 60), (60, 180))
"""Sizes (width, height) of pictures, which are the pinpoints too."""
SIGNS = 0.6
"""Fraction of the pictures that have a sign."""
TRAIN, VALIDATION, TEST = 6_000, 100, 400
"""Number of pictures of each set. VALIDATION is for the loss."""
GROUPS = {"all": ".*", "large objects": "colour|shape|position|relation", "small objects": "small .*",
          "small shape": "small shape", "small colour": "small colour", "small position": "small position",
          "three objects": "between|order", "sign": "sign", "count": "count", "existence": "existence"}
"""Regular expressions for kinds of questions, by the name of a column."""


class MiniNextRecipe(Recipe):
    """The miniature on larger pictures, with its data and its evaluation."""

    @property
    def data(self) -> Path:
        return Path(self.stages["instruct"].data.path).parent

    def prepare(self) -> None:
        """Draws the pictures and writes the data of both stages if they are missing. Every seed has the same."""
        from llava_jax.annotations import drawn_scenes as scenes
        from llava_jax.synthesize import rules

        MINI.prepare()
        folder, last = self.data, self.data / "questions.jsonl"
        if last.exists():
            return
        print(f"drawing {TRAIN:,} larger pictures and writing their instructions to {folder}", flush=True)
        scenes.write(folder, train=TRAIN, test=TEST + VALIDATION, pictures=PICTURES, signs=SIGNS)
        rules.write_instructions(folder, "train", folder / "instructions.json", long=0)
        validation = folder / "instructions_validation.json"
        rules.write_instructions(folder, "test", validation, long=0)
        validation.write_text(json.dumps(json.loads(validation.read_text())[TEST:]))
        rules.write_questions(folder, "test", last, per_image=7, mark_small=True)

    def finish(self, model: Path) -> None:
        """Asks the model the held-out questions, with their pictures and with others, and writes report.json."""
        from llava_jax.evaluate.runner.baselines import images_of
        from llava_jax.evaluate.runner.generation import ask
        from llava_jax.evaluate.tasks.scenes import Scenes
        from llava_jax.image_files import open_image
        from llava_jax.train.metrics import read_lines

        start = time.perf_counter()
        llava, task = llava_jax.load(model), Scenes()
        questions = [q for q in task.load(str(self.data)) if int(Path(q.row["image"]).stem) <= TEST]
        accuracy = {}
        for name, baseline in (("trained", "none"), ("blind", "blind")):
            print(f"asking {len(questions):,} questions: {name}", flush=True)
            answers = ask(llava, task, questions, 64, images_of(baseline, questions, llava.config))
            accuracy[name] = accuracies(task.score("", questions, answers))
        sizes = [open_image(question.images[0]).size for question in questions]
        tokens = sum(len(llava.processor.layout(*size).index) for size in sizes) / len(sizes)
        training = sum(line.get("seconds", 0) for line in read_lines(Path(self.output) / "metrics.jsonl"))
        report = {"accuracy": accuracy, "questions": len(questions), "visual_tokens": round(tokens, 1),
                  "seconds": {"training": round(training, 1), "evaluation": round(time.perf_counter() - start, 1)}}
        (Path(self.output) / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{'right answers, %':<16}" + "".join(f"{name:>10}" for name in accuracy))
        for group in GROUPS:
            print(f"{group:<16}" + "".join(f"{100 * shares[group]:10.1f}" for shares in accuracy.values()))
        print(f"\n{tokens:.0f} visual tokens an image; training {training:.0f} s\nmodel   {model}\n"
              f"chat    python -m llava_jax.generate --model {model} --image {questions[0].images[0]}")


def accuracies(scores: "Scores") -> dict[str, float]:
    """Returns shares of right answers, 0..1, by group of questions."""
    shares = {}
    for group, kinds in GROUPS.items():
        right = [item.score for item in scores.items if re.fullmatch(kinds, item.category)]
        shares[group] = round(sum(right) / len(right), 4)
    return shares


def recipe() -> MiniNextRecipe:
    data = "runs/mini_next/data"
    align = dataclasses.replace(
        MINI.stages["align"], data=dataclasses.replace(MINI.stages["align"].data, image_mode="crop"),
        learning_rates=(("projector/.*", 5e-3), ("(vision|decoder)/.*|image_newline", None)))
    instruct = Stage(
        learning_rates=(("projector/.*|image_newline", 1e-3), ("decoder/.*", 8e-4), ("vision/.*", None)),
        data=Data(path=f"{data}/instructions.json", validation=f"{data}/instructions_validation.json",
                  # 192 visual tokens and 5 tiles at most, and one conversation.
                  sequence_length=352, tiles_per_sequence=5),
        optimizer=Optimizer(b2=0.98, clip=1.0), batch_size=8, steps=600, remat="none")
    model = dataclasses.replace(MINI.model, image_mode="anyres",
                                pinpoints=",".join(f"({width}x{height})" for width, height in PICTURES))
    return MiniNextRecipe(model=model, stages={"align": align, "instruct": instruct}, output="runs/mini_next",
                          log_every=10, validate_every=100, sample_every=150, checkpoint_every=100)
