"""Measures training and logs the metrics to `metrics.jsonl`, and optionally to TensorBoard and W&B."""

import functools
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llava_jax import config
from llava_jax.data.records import REASONS
from llava_jax.errors import UserError
from llava_jax.files import json_type, parse_json, read_json, read_text
from llava_jax.models import lora, projector, vit
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.parallel.processes import allreduce_sum
from llava_jax.train import output

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Peak dense bfloat16 FLOP/s of a JAX device, by prefix of `device_kind`, from the vendors' data sheets."""


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's peak FLOP/s, or None if PEAK_FLOPS does not list it."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def trained_parts(paths: Iterable[str]) -> set[str]:
    """Returns the parts of trainable parameters: `decoder` for example, or `decoder/adapter` for its adapters."""
    return {path.split("/")[0] + ("/adapter" if lora.is_adapter(path) else "") for path in paths}


def model_flops(model: LlavaConfig, trained: set[str], positions: np.ndarray, segment_ids: np.ndarray,
                tiles: int) -> float:
    """Returns the model FLOPs of a step on these sequences. A multiply-add counts 2.

    Padding, empty image slots and recomputation count nothing. Attention counts the visible pairs only. A matmul with
    weights costs one forward pass, one for its input's gradient if anything below it is trained, and one for its
    weights' gradient if these are trained. `trained` is `trained_parts`. Adapters count as if they were trained.
    """
    text, vision = model.text, model.vision
    is_token = segment_ids > 0
    tokens, pairs = int(is_token.sum()), int((positions[is_token].astype(np.int64) + 1).sum())
    layer_weights = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    layer_weights += 3 * text.hidden_size * text.intermediate_size
    decoder = 2 * tokens * (text.num_layers * layer_weights + text.hidden_size * text.vocab_size)
    attention = 4 * pairs * text.num_layers * text.num_heads * text.head_dim
    # Attention multiplies two activations, so its backward pass is always twice its forward pass.
    total = decoder * (2 + ("decoder" in trained)) + attention * 3
    adapters = _adapter_sizes(model)
    total += 6 * tokens * adapters["decoder"]
    vision_tokens = tiles * vision.num_tokens
    blocks = vit.depth(vision, model.feature_layer)
    tower = 2 * vision_tokens * blocks * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    tower_attention = 4 * vision_tokens * vision.num_tokens * blocks * vision.hidden_size
    has_gradient = "vision" in trained or "vision/adapter" in trained
    total += tower * (1 + has_gradient + ("vision" in trained)) + tower_attention * (3 if has_gradient else 1)
    total += 6 * vision_tokens * adapters["vision"] * blocks / vision.num_layers
    embedding = 2 * tiles * vision.patches * 3 * vision.patch_size**2 * vision.hidden_size
    total += embedding * (2 if "vision" in trained else 1)
    input_size = vision.hidden_size * projector.merge_size(model.projector) ** 2
    for layer in range(projector.depth(model.projector)):
        matmul = 2 * tiles * model.processor.features_per_tile * input_size * text.hidden_size
        below = has_gradient or layer > 0 and bool({"projector", "projector/adapter"} & trained)
        total += matmul * (1 + below + ("projector" in trained))
        input_size = text.hidden_size
    total += 6 * tiles * model.processor.features_per_tile * adapters["projector"]
    return float(total)


@functools.cache
def _adapter_sizes(model: LlavaConfig) -> Counter[str]:
    """Returns the number of adapter parameters of each part: vision, projector, decoder."""
    sizes: Counter[str] = Counter()
    for path, x in abstract_params(model)[1].items() if model.lora else ():
        sizes[path.split("/")[0]] += x.size if lora.is_adapter(path) else 0
    return sizes


def skipped_rows(batch: dict[str, np.ndarray]) -> Counter[str]:
    """Returns the number of rows, by reason, that this process skipped on the way to a batch."""
    return Counter(dict(zip(REASONS, batch["skipped"].tolist(), strict=True)))


def total_skipped(skipped: Counter[str]) -> Counter[str]:
    """Returns the number of rows, by reason, that all processes skipped."""
    counts = allreduce_sum("skipped rows", [skipped[reason] for reason in REASONS])
    return +Counter({reason: int(count) for reason, count in zip(REASONS, counts, strict=True)})


class MetricsWindow:
    """Metrics of the steps since the last line of `metrics.jsonl`."""

    def __init__(self, model: LlavaConfig, mesh: jax.sharding.Mesh, trained: set[str]):
        self.model, self.trained, self.skipped = model, trained, Counter()
        peak = peak_flops(mesh.devices.flat[0])
        self.peak = peak * mesh.size if peak else None
        self._reset()

    def _reset(self) -> None:
        self.steps: list[dict[str, jax.Array]] = []
        self.counts = dict.fromkeys(("tokens", "images", "tiles", "flops", "positions", "slots"), 0)
        self.start = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
        """Adds a step: its batch, and the device's metrics, for which it does not wait."""
        tiles = int((batch["tile_segment_ids"] > 0).sum())
        self.steps.append(metrics)
        self.skipped += skipped_rows(batch)
        counts = {"tokens": int((batch["segment_ids"] > 0).sum()), "images": int(batch["images"].sum()),
                  "tiles": tiles,
                  "flops": model_flops(self.model, self.trained, batch["positions"], batch["segment_ids"], tiles),
                  "positions": batch["tokens"].size, "slots": batch["tile_segment_ids"].size}
        for name, count in counts.items():
            self.counts[name] += count

    def pop_skipped(self) -> Counter:
        """Returns the number of rows, by reason, that all processes skipped since the last call."""
        skipped, self.skipped = self.skipped, Counter()
        return total_skipped(skipped)

    def close(self) -> dict[str, float]:
        """Returns the line of metrics and starts a new window. Losses are weighted by supervised tokens."""
        steps = jax.device_get(self.steps)
        seconds = time.perf_counter() - self.start
        supervised = np.array([int(step["supervised_tokens"]) for step in steps])
        losses = np.array([float(step["loss"]) for step in steps])
        counts = dict(zip(self.counts, allreduce_sum("metrics", self.counts.values()), strict=True))
        flops = counts["flops"] / seconds
        line = {
            "loss": float((losses * supervised).sum() / max(supervised.sum(), 1)),
            "grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
            "steps": len(steps),
            "seconds": round(seconds, 4),
            "tokens": int(counts["tokens"]),
            "supervised_tokens": int(supervised.sum()),
            "images": int(counts["images"]),
            "row_fill": round(counts["tokens"] / counts["positions"], 4),
            "slot_fill": round(counts["tiles"] / counts["slots"], 4),
            "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "model_flops_per_second": flops,
            "mfu": round(flops / self.peak, 4) if self.peak else None,
        }
        self._reset()
        return line


LINE_TYPES = {"stage": str, "step": int, "loss": int | float, "validation_loss": int | float, "seconds": int | float}
"""Types of the fields of `metrics.jsonl` that are read again."""


class Log:
    """Log of the run: `metrics.jsonl` and its optional copies. Only the first process writes."""

    def __init__(self, directory: Path, recipe: config.Recipe):
        self.active, self.recipe = jax.process_index() == 0, recipe
        self.path = directory / "metrics.jsonl"
        self.complete: set[str] = set()
        self.tensorboard = self.wandb = None
        if not self.active:
            return
        if recipe.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("tensorboard: pip install 'llava_jax[tensorboard]' first") from None
            self.tensorboard = SummaryWriter(str(directory / "tensorboard"))
        if recipe.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("wandb: pip install 'llava_jax[wandb]' first") from None
            self.wandb = _resume_wandb(wandb, directory, recipe.wandb)

    def has(self, stage: str, step: int, key: str) -> bool:
        """Returns whether `key` of a step is in the log; False on a process that does not write."""
        return self.active and any((line["stage"], line["step"]) == (stage, step) and key in line
                                   for line in read_lines(self.path))

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines after `step` of `stage`, because a restart writes them again.

        A stage that is repeated because its checkpoint was damaged keeps its lines if a later one has started.
        """
        self.complete = {stage} if output.has_later_started(self.recipe, stage) else set()
        if not self.active or not self.path.exists() or self.complete:
            return
        order = {name: i for i, name in enumerate(self.recipe.stages)}
        last = order[stage], step
        kept = [line for line in read_lines(self.path) if (order.get(line["stage"], -1), line["step"]) <= last]
        output.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict) -> None:
        """Writes a line, which has `stage` and `step`."""
        if not self.active or line["stage"] in self.complete:
            return
        text = json.dumps(line, allow_nan=False) + "\n"
        if isinstance(self.path, Path):
            with self.path.open("a") as file:
                file.write(text)
        else:  # objects of a bucket cannot grow
            self.path.write_text((self.path.read_text() if self.path.exists() else "") + text)
        numbers = {f"{line['stage']}/{key}": value for key, value in line.items()
                   if isinstance(value, int | float) and key != "step"}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.wandb:
            self.wandb.log(numbers | {f"{line['stage']}/step": line["step"]})

    def close(self) -> None:
        """Closes TensorBoard and W&B."""
        for copy in (self.tensorboard, self.wandb):
            if copy:
                getattr(copy, "close", getattr(copy, "finish", None))()


def read_lines(path: Path) -> list[dict]:
    """Reads the lines of `metrics.jsonl`, except an incomplete last line. A missing file has none.

    Raises UserError that names the file and the damaged line.
    """
    text = read_text(path) if path.exists() else ""
    lines = []
    for number, content in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        where = f"{path}, line {number}"
        line = parse_json(content, where)
        for key, kinds in LINE_TYPES.items():
            if key not in line and key not in ("stage", "step"):
                continue
            value = line.get(key)
            valid = isinstance(value, kinds) and not isinstance(value, bool)
            if valid and kinds is not str:
                valid = abs(value) < 1e300 and (key != "step" or value >= 1)
            if not valid:
                raise UserError(f"{where}: {key} is {json_type(value)}; the file is damaged: remove this line")
        lines.append(line)
    return lines


def _resume_wandb(wandb: Any, directory: Path, project: str) -> Any:
    """Opens the W&B run of this output directory, whose id is stored in it, so that a restart continues it."""
    path = directory / "wandb.json"
    stored = read_json(path) if path.exists() else {}
    run_id = stored.get("id") if stored.get("project") == project else None
    if run_id is not None and not isinstance(run_id, str):
        raise UserError(f"{path}: id must be a text; remove the file to report to a new W&B run")
    # W&B writes its files on this machine only.
    run = wandb.init(project=project, id=run_id, dir=str(directory) if isinstance(directory, Path) else None,
                     resume="allow")
    output.write_json(path, {"project": project, "id": run.id})
    return run
