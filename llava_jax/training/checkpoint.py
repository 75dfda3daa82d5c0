"""Checkpoints of a stage, by Orbax: trainable parameters, optimizer state, and `meta`: the data's position, the
counters.

Frozen parameters are not in them: `meta` names where they came from, with a fingerprint that a restart compares.
"""

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.errors import UserError
from llava_jax.models.llava import Parameters
from llava_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one stage in one directory, named by their step. Saving goes on while training does."""

    def __init__(self, directory: Path, every: int, keep: int):
        self.directory, self.every, self.keep = directory, every, keep

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        # Made when it is needed: it makes its directory, which a run that fails at its start should not leave.
        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep)
        return ocp.CheckpointManager(self.directory.resolve(), options=options)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; a checkpoint whose writing was cut off does not count."""
        return self.manager.latest_step() if self.directory.exists() else None

    def due(self, step: int) -> bool:
        """Whether `step` is one of those that are saved regularly."""
        return step % self.every == 0

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Starts to write the checkpoint of `step`; `meta` is anything JSON can hold."""
        self.manager.save(step, force=True, args=ocp.args.Composite(
            trainable=ocp.args.StandardSave(state.trainable),
            optimizer=ocp.args.StandardSave(state.optimizer),
            meta=ocp.args.JsonSave(meta),
        ))

    def meta(self, step: int) -> dict:
        """What was saved as `meta`; UserError naming the directory if it cannot be read."""
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def trainable(self, step: int, like: Parameters) -> Parameters:
        """The trainable parameters alone, with the shardings of `like` (arrays or ShapeDtypeStructs)."""
        return self._restore(step, trainable=ocp.args.StandardRestore(like))["trainable"]

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state at `step`, shaped and sharded as `state`."""
        items = self._restore(
            step,
            trainable=ocp.args.StandardRestore(state.trainable),
            optimizer=ocp.args.StandardRestore(state.optimizer),
        )
        count = jax.device_put(jnp.int32(step), state.step.sharding)
        return replace(state, step=count, trainable=items["trainable"], optimizer=items["optimizer"])

    def _restore(self, step: int, **items) -> ocp.args.Composite:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            first = " ".join(str(error).split())[:300]
            raise UserError(f"{self.directory / str(step)}: this checkpoint cannot be read ({first}); "
                             "remove it to go on from the one before") from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        if "manager" in self.__dict__:
            self.manager.wait_until_finished()
            self.manager.close()


def fingerprint(parameters: Parameters) -> str:
    """A hash of the parameters' bits, names and shapes, computed where they lie; the same for every sharding."""
    if not parameters:
        return "none"

    @jax.jit
    def sums(parameters):
        def one(x):
            bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
            # Weighted by position, so that a permutation is seen; uint32 sums wrap and have no order.
            weights = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(2654435761 + 40503 * axis)
                          for axis in range(x.ndim))
            return jnp.sum(bits * (jnp.uint32(2) * weights + jnp.uint32(1)))
        return {path: one(x) for path, x in parameters.items()}

    digest = hashlib.sha256()
    for path, total in sorted(sums(parameters).items()):
        x = parameters[path]
        digest.update(f"{path} {x.shape} {x.dtype} {int(np.asarray(total))}\n".encode())
    return digest.hexdigest()[:16]
