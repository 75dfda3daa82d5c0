"""Evaluates a stage in training: the loss over validation data, and sample answers."""

import math
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np

from llava_jax.data.pipeline import Batches
from llava_jax.errors import UserError
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import allgather_object
from llava_jax.progress import Progress
from llava_jax.train import batches, output
from llava_jax.train.checkpoint import DIVERGED
from llava_jax.train.metrics import Log, skipped_rows, total_skipped
from llava_jax.train.samples import Samples
from llava_jax.train.setup import TrainContext


class Evaluations:
    """Validations and sample answers of one stage. All processes call the methods.

    Attributes:
      batches: Validation data, set before the first `write` if the stage has some. The first pass tokenises them.
    """

    def __init__(self, context: TrainContext, name: str, total_steps: int, log: Log):
        self.context, self.name, self.total_steps, self.log = context, name, total_steps, log
        self.stage = context.recipe.stages[name]
        self.batches: Batches | None = None
        self.samples: Samples | None = None

    def due(self, step: int) -> list[str]:
        """Returns what is due after a step: "validation_loss", "samples"."""
        recipe, last = self.context.recipe, step == self.total_steps
        kinds = {"validation_loss": recipe.validate_every if self.stage.data.validation else 0,
                 "samples": recipe.sample_every}
        return [kind for kind, every in kinds.items() if step and every and (last or step % every == 0)]

    def missing(self, step: int) -> list[str]:
        """Returns what was due after a step but is not in the log, because the run was stopped before.

        Nothing is missing if a later stage has started.
        """
        kinds = [] if output.has_later_started(self.context.recipe, self.name) else self.due(step)
        missing = [kind for kind in kinds if not self.log.has(self.name, step, kind)]
        return allgather_object("what is missing in the log", missing)[0]

    def write(self, kinds: list[str], step: int, loss: Callable, trainable: Parameters, frozen: Parameters,
              progress: Progress) -> None:
        """Evaluates and logs what `kinds` names. Raises UserError for a validation loss that is not finite."""
        if "validation_loss" in kinds:
            mean, skipped = self._validate(loss, trainable, frozen)
            if not math.isfinite(mean):
                raise UserError(f"stages.{self.name}: the validation loss is {mean} after step {step}; {DIVERGED}")
            line = {"stage": self.name, "step": step, "validation_loss": mean}
            self.log.write(line | ({"validation_skipped": skipped} if skipped else {}))
            note = f", {sum(skipped.values()):,} rows skipped" if skipped else ""
            progress.print(f"{self.name} {step}/{self.total_steps}  validation loss {mean:.3f}{note}")
        if "samples" in kinds:
            self.samples = self.samples or Samples(self.context, self.stage)
            answers = self.samples.answer(trainable | frozen)
            self.log.write({"stage": self.name, "step": step, "samples": answers})
            progress.print("\n".join(f"  {a['question']!r} -> {a['answer']!r} ({a['expected']!r})" for a in answers))

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()

    def _validate(self, loss: Callable, trainable: Parameters, frozen: Parameters) -> tuple[float, dict[str, int]]:
        """Returns the mean loss over all supervised tokens, and the number of skipped rows by reason."""
        sums, skipped = np.zeros(2), Counter()
        for batch in self.batches:
            rows = jax.tree.map(lambda x: x[0], batches.shard_batch(self.context.mesh, batch, 1))
            sums += [float(value) for value in loss(trainable, frozen, rows)]
            skipped += skipped_rows(batch)
        return float(sums[0] / max(sums[1], 1)), total_skipped(skipped)
