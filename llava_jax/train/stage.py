"""Trains one stage: opens its data and state, runs steps, reports and saves them."""

import contextlib
import functools
import math
from collections import Counter

import jax

from llava_jax.data.pipeline import Batches
from llava_jax.errors import UserError
from llava_jax.parallel.processes import allgather_object, assert_equal_across_processes
from llava_jax.progress import Progress
from llava_jax.train import batches, output
from llava_jax.train.checkpoint import DIVERGED, StageRecord
from llava_jax.train.inputs import check_inputs, hash_inputs, write_inputs
from llava_jax.train.metrics import Log, MetricsWindow, trained_parts
from llava_jax.train.optimizer import make_optimizer, schedule, trainable_paths
from llava_jax.train.parameters import split_parameters
from llava_jax.train.setup import TrainContext
from llava_jax.train.step import init_state, make_loss, make_train_step
from llava_jax.train.validation import Evaluations

MAX_STEPS_IN_FLIGHT = 2
"""Number of steps dispatched but not finished. The host never runs further ahead; on a stop it waits for them."""


class StageTrainer:
    """Trains one stage, from its newest checkpoint if there is one. All processes call the methods, in the same order.

    Attributes:
      start: number of steps that the newest checkpoint has.
      total_steps: number of steps of the stage.
      data: iterator over this process's share of the batches.
    """

    def __init__(self, context: TrainContext, name: str, log: Log):
        self.context, self.name, self.log = context, name, log
        self.recipe, self.stage = context.recipe, context.recipe.stages[name]
        self._stack = contextlib.ExitStack()
        self.checkpoints = self._close_later(context.checkpoints(name))
        self.start = self.checkpoints.latest() or 0
        self._record = self.checkpoints.record(self.start) if self.start else None
        self.total_steps = (self._record.total_steps if self._record else
                            self.stage.steps or batches.count_steps(self.stage, self.training))
        self.evaluations = self._close_later(Evaluations(context, name, self.total_steps, log))
        self._missing = self.evaluations.missing(self.start)

    @functools.cached_property
    def training(self) -> Batches:
        """Training data of the stage, opened once: counting steps measures records that training then knows."""
        return batches.open_batches(self.context, self.stage, self.stage.data.path)

    def is_finished(self) -> bool:
        """Returns whether all steps are trained and all evaluations are in the log."""
        return self.start == self.total_steps and not self._missing

    def open(self) -> None:
        """Loads the state, opens the data and compiles nothing yet. Then runs evaluations that a stopped run missed.

        Raises UserError if the parameters or the inputs of the stage are not those of its checkpoint.
        """
        context, stage, record = self.context, self.stage, self._record
        if stage.data.validation:
            self.evaluations.batches = batches.open_validation(context, stage, keep=True)
        rates = trainable_paths(stage, list(context.shardings))
        trainable, self.frozen, fingerprint = split_parameters(context, self.name, rates)
        if record and record.frozen != fingerprint:
            raise UserError(f"{self.checkpoints.directory}: made with other frozen parameters than the recipe's "
                            "checkpoints hold now; give another --output, or bring those checkpoints back")
        optimizer = make_optimizer(stage, rates, self.total_steps)
        self.state = init_state(optimizer, trainable, stage.optimizer.offload)
        del trainable
        self._inputs = hash_inputs(context, self.training)
        assert_equal_across_processes(f"stages.{self.name}", {
            "steps": self.total_steps, "checkpoint": self.start, **self._inputs})
        self.data = self._close_later(iter(self.training))
        if record:
            check_inputs(context, self.name, self._inputs)
            self.state = self.checkpoints.restore(self.start, self.state)
            self.data.set_state(record.data, record.lengths_hash)
        self.skipped = Counter(record.skipped if record else {})
        self._frozen_fingerprint = fingerprint
        self.log.rewind(self.name, self.start)
        graph = context.graphs[self.name]
        self._train_step = make_train_step(graph, optimizer, self.state, self.recipe.seed)
        self._loss = make_loss(graph)
        self._rate_factor = schedule(self.total_steps, stage.optimizer.warmup_ratio)
        self._peak_rate = max(rates.values())
        self._progress = self._close_later(Progress(self.total_steps, self.start, "steps", self.name,
                                                    lambda: self._figures, enabled=jax.process_index() == 0))
        self._figures = ""
        self._window = MetricsWindow(context.model, context.mesh, trained_parts(rates))
        self._evaluate(self._missing, self.start)

    def train_step(self, step: int, batch: dict) -> None:
        """Dispatches a step and waits until at most MAX_STEPS_IN_FLIGHT steps are unfinished."""
        if step == self.start + 1:
            output.write_recipe(self.recipe)
            write_inputs(self.context, self.name, self._inputs)
        self._sharded = batches.shard_batch(self.context.mesh, batch, self.stage.gradient_accumulation)
        self.state, metrics = self._train_step(self.state, self.frozen, self._sharded)
        self._window.add(metrics, batch)
        jax.block_until_ready(self._window.steps[:-MAX_STEPS_IN_FLIGHT][-1:])
        self._progress.update()
        self.checkpoints.check()

    def report(self, step: int) -> None:
        """Logs the metrics if they are due. Raises UserError if a loss is not finite."""
        if step % self.recipe.log_every == 0 or step == self.total_steps:
            self.skipped += self._window.pop_skipped()
            line = self._window.close() | {"learning_rate": self._peak_rate * float(self._rate_factor(step - 1)),
                                           "skipped": dict(self.skipped)}
            self._figures = f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
            self._progress.show()
            for figure in ("loss", "grad_norm"):
                self._require_finite(figure, line[figure], f"at step {step}")
            self.log.write({"stage": self.name, "step": step} | line)
        if step == self.total_steps:  # a step's loss is that before its update
            loss = self._loss(self.state.trainable, self.frozen, jax.tree.map(lambda x: x[0], self._sharded))[0]
            self._require_finite("loss", float(loss), f"after the last step, {step}")

    def save(self, step: int, stopping: int) -> None:
        """Starts to write a checkpoint if it is due or the run stops."""
        if self.checkpoints.due(step) or step == self.total_steps or stopping:
            self.skipped += self._window.pop_skipped()
            allgather_object(f"stages.{self.name}, checkpoint of step {step}", None)
            self.checkpoints.save(step, self.state, StageRecord(
                self.total_steps, self._frozen_fingerprint, dict(self.skipped), self.data.get_state(),
                self.data.lengths_hash))

    def evaluate(self, step: int) -> None:
        """Logs the validation loss and sample answers that are due."""
        self._evaluate(self.evaluations.due(step), step)

    def close(self) -> None:
        """Closes data, checkpoints, evaluations and the progress bar."""
        self._stack.close()

    def _evaluate(self, kinds: list[str], step: int) -> None:
        self.evaluations.write(kinds, step, self._loss, self.state.trainable, self.frozen, self._progress)

    def _close_later(self, closable):
        self._stack.callback(closable.close)
        return closable

    def _require_finite(self, figure: str, value: float, when: str) -> None:
        if not math.isfinite(value):
            raise UserError(f"stages.{self.name}: the {figure} is {value} {when}; {DIVERGED}")
