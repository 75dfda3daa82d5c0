"""Saves and restores checkpoints of a stage with Orbax: trainable parameters, optimizer state and a `StageRecord`.

Frozen parameters are not stored: the record has their fingerprint. The file of the record also stores a digest of every
array, which is compared when the checkpoint is restored.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.errors import UserError
from llava_jax.models.llava import Parameters
from llava_jax.parallel.processes import allgather_object
from llava_jax.train.digests import check_finite, digests
from llava_jax.train.step import TrainState

READ_BYTES = 2**24
"""Number of bytes that are read at once to check a file."""

DIVERGED = ("set lower learning rates, or optimizer.clip (and another --output, if this stage has checkpoints, whose "
            "recipe cannot change)")
"""Advice for values that are not finite."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """Data that a checkpoint stores besides arrays."""

    total_steps: int
    """Number of steps of the stage."""
    frozen: str
    """Fingerprint of the frozen parameters."""
    skipped: dict[str, int]
    """Number of rows skipped so far, by reason."""
    data: dict[str, int]
    """Position in the data: state of the iterator of `Batches`."""
    lengths_hash: int = 0
    """Hash of the lengths of the records around that position. Records of earlier versions have none."""


class DamagedCheckpoint(UserError):
    """Raised on all processes together if a checkpoint differs from what was saved."""

    def __init__(self, checkpoints: "Checkpoints", step: int, problem: str):
        super().__init__(f"{checkpoints.directory / str(step)}: this checkpoint is damaged ({problem}); remove it to "
                         "go on from the one before")
        self.checkpoints, self.step, self.problem = checkpoints, step, problem


class Checkpoints:
    """Checkpoints of one stage in one directory, named by their step. They are written while training continues.

    Args:
      every: number of steps between checkpoints.
      keep: number of newest checkpoints that are kept.
    """

    def __init__(self, directory: Path, every: int, keep: int):
        self.directory, self.every, self.keep = directory, every, keep
        self.saving, self.error = False, None

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager of the directory."""
        # Created on first use, because it creates its directory, which a run that fails at its start should not leave.
        # Directories are created before `save` returns, because in the background Orbax waits 300 s if it cannot.
        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False,
            barrier_sync_fn=self._barrier if jax.process_count() > 1 else None))
        return ocp.CheckpointManager(self.directory.resolve(), options=options)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits at Orbax's barrier, unless this thread handles an error: Orbax would wait for 20 minutes.

        `check` raises the error instead.
        """
        error = sys.exc_info()[1]
        if error is not None and threading.current_thread() is not threading.main_thread():
            self.error = error
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint."""
        return self.manager.latest_step() if self.directory.exists() else None

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in their order."""
        return sorted(self.manager.all_steps()) if self.directory.exists() else []

    def due(self, step: int) -> bool:
        """Returns whether `step` is one of those that are saved regularly."""
        return step % self.every == 0

    def save(self, step: int, state: TrainState, record: StageRecord) -> None:
        """Starts to write the checkpoint of `step`.

        Raises UserError, and saves nothing, if parameters or optimizer state are not finite.
        """
        items = {"trainable": state.trainable, "optimizer": state.optimizer}
        digests_by_item = {name: digests(tree) for name, tree in items.items()}
        check_finite({f"{name} {path}": pair
                      for name, paths in digests_by_item.items() for path, pair in paths.items()},
                     f"stages.{self.directory.name}, after step {step}",
                     f"this state was not saved; {DIVERGED}")
        content = dataclasses.asdict(record) | {"stage": self.directory.name, "step": step, "digests": {
            name: {path: digest for path, (digest, _) in paths.items()}
            for name, paths in digests_by_item.items()}}
        self.wait()
        with self._record_errors():
            self.manager.save(step, force=True, args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(state.optimizer),
                meta=ocp.args.JsonSave({"content": content, "sha256": _sha256(content)}),
            ))
        self.saving = True

    def check(self) -> None:
        """Raises the error of a save that failed in the background, before the next save does."""
        if self.error is not None:
            raise self.error
        if self.saving and not self.manager.is_saving_in_progress():
            self.saving = False
            with self._record_errors():
                self.manager.wait_until_finished()

    def wait(self) -> None:
        """Waits until everything is on disk. Raises the error of a save that failed."""
        while self.saving:
            self.check()
            time.sleep(0.005)

    def record(self, step: int) -> StageRecord:
        """Reads the record of the checkpoint of `step`."""
        def read() -> StageRecord:
            content = self._read_meta(step)
            names = {field.name for field in dataclasses.fields(StageRecord)}
            return StageRecord(**{name: value for name, value in content.items() if name in names})

        return self._read(step, ["meta"], read)

    def trainable(self, step: int, like: Parameters) -> Parameters:
        """Reads the trainable parameters alone, with the shardings of `like` (arrays or ShapeDtypeStructs)."""
        return self._restore(step, {"trainable": like})["trainable"]

    def parameter(self, step: int, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one trainable parameter, with the sharding of `like`."""
        return self._restore(step, {"trainable": {path: like}}, partial=True)["trainable"][path]

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Reads the state at `step`, shaped and sharded as `state`."""
        items = self._restore(step, {"trainable": state.trainable, "optimizer": state.optimizer})
        count = jax.device_put(jnp.int32(step), state.step.sharding)
        return dataclasses.replace(state, step=count, trainable=items["trainable"], optimizer=items["optimizer"])

    def set_aside(self, step: int, problem: str) -> None:
        """Moves a damaged checkpoint away, so that the run continues from the one before. All processes call it.

        Raises DamagedCheckpoint if there is none before, because the stage would be lost.
        """
        earlier = [other for other in self.manager.all_steps() if other < step]
        self.close()
        if not earlier:
            raise DamagedCheckpoint(self, step, problem)
        if jax.process_index() == 0:
            aside = self.directory.with_name(f"{self.directory.name}.damaged")
            aside.mkdir(parents=True, exist_ok=True)
            target, number = aside / str(step), 1
            while target.exists():
                target, number = aside / f"{step}.{number}", number + 1
            (self.directory / str(step)).rename(target)
            print(f"{self.directory / str(step)}: this checkpoint is damaged ({problem}) and is now {target}; going "
                  f"on from the one before, of step {max(earlier)}", flush=True)
        allgather_object(f"the damaged checkpoint of step {step} is out of the way", None)

    def close(self) -> None:
        """Waits until everything is on disk, unless a save failed: its threads may wait for each other."""
        if "manager" in self.__dict__ and self.error is None:
            self.wait()
            self.manager.close()
            del self.__dict__["manager"]

    @contextlib.contextmanager
    def _record_errors(self) -> Iterator[None]:
        """Records an error of the block, so that `close` does not wait."""
        try:
            yield
        except BaseException as error:
            self.error = error
            raise

    def _folder(self, step: int) -> epath.Path:
        return epath.Path(self.directory.resolve()) / str(step)

    def _read_meta(self, step: int) -> dict[str, Any]:
        """Reads the record and the digests. Raises ValueError if they are damaged or of another checkpoint."""
        stored = ocp.JsonCheckpointHandler().restore(self._folder(step) / "meta")
        if not isinstance(stored, dict) or stored.keys() != {"content", "sha256"}:
            raise ValueError("meta: without a checksum: damaged, or saved by an earlier version")
        content = stored["content"]
        if stored["sha256"] != _sha256(content):
            raise ValueError("meta: its checksum is that of another content")
        if (content["stage"], content["step"]) != (self.directory.name, step):
            raise ValueError(f"it is that of step {content['step']} of stage {content['stage']}")
        return content

    def _restore(self, step: int, likes: dict[str, Any], partial: bool = False) -> dict[str, Any]:
        """Reads items of a checkpoint, or those arrays of them that `likes` has, and compares them with their digests.

        The digests were saved with them.
        """
        expected = self._read(step, ["meta"], lambda: self._read_meta(step)["digests"])
        # Uses the handler, because the manager waits for other processes, which may have failed.
        handler = ocp.PyTreeCheckpointHandler()
        items = self._read(step, [*likes], lambda: {
            name: handler.restore(self._folder(step) / name, args=ocp.args.PyTreeRestore(
                like, ocp.checkpoint_utils.construct_restore_args(like), partial_restore=partial))
            for name, like in likes.items()})
        for name, item in items.items():
            actual = {path: digest for path, (digest, _) in digests(item).items()}
            stored = {path: expected[name].get(path) for path in actual} if partial else expected[name]
            changed = [path for path in actual | stored if actual.get(path) != stored.get(path)]
            if changed:
                more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
                raise DamagedCheckpoint(self, step, f"{name}: {', '.join(changed[:2])}{more} "
                                                    f"{'is' if len(changed) == 1 else 'are'} not what was saved")
        return items

    def _read(self, step: int, names: list[str], read: Callable[[], Any]) -> Any:
        """Returns `read()`, which reads the items `names`. All processes call it.

        Raises DamagedCheckpoint on all of them if it fails on one, unless the disk or the network fails.
        """
        result = problem = None
        try:
            result = read()
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            for name in names:
                _read_through(self._folder(step) / name)
            while error.__cause__ is not None:  # Orbax's error wraps TensorStore's, which says more
                error = error.__cause__
            problem = " ".join(str(error).split())[:200] or type(error).__name__
        if problem:
            _collect_quietly()
        if problems := [problem for problem in allgather_object(f"checkpoint of step {step}", problem) if problem]:
            raise DamagedCheckpoint(self, step, problems[0])
        return result


def _collect_quietly() -> None:
    """Frees Orbax's readers of other arrays, which print their errors when they are collected."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_through(folder: epath.Path) -> None:
    """Reads every file to its end, to raise the error of one that cannot be read. Ignores missing files."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.is_dir():
                _read_through(path)
            else:
                with path.open("rb") as file:
                    while file.read(READ_BYTES):
                        pass
