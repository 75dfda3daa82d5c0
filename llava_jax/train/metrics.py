"""What is measured while training, and where it is written: JSON lines always, TensorBoard and W&B where asked."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.files import json_type, parse_json, read_json, read_text
from llava_jax.models import vit
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import depth as projector_depth
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
"""Dense bfloat16 FLOP/s of one JAX device by the start of its kind, from the makers' data sheets."""


def peak_flops(device: jax.Device) -> float | None:
    """The device's peak, or None where it is not known."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def model_flops(model: LlavaConfig, trained: set[str], positions: np.ndarray, segment_ids: np.ndarray,
                images: int) -> float:
    """FLOPs that a step on these rows needs by formula (a multiply-add counts 2), whatever is computed beyond that.

    Padding, empty image slots and recomputation count nothing; attention counts the visible pairs only. A product
    with weights costs once forward, once for its input's gradient where anything below it is trained, and once for
    its weights' gradient where those are trained. `trained` names parts: vision, projector, decoder.
    """
    text, vision = model.text, model.vision
    real = segment_ids > 0
    tokens, pairs = int(real.sum()), int((positions[real].astype(np.int64) + 1).sum())
    layer = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    layer += 3 * text.hidden_size * text.intermediate_size
    weights = 2 * tokens * (text.num_layers * layer + text.hidden_size * text.vocab_size)
    attention = 4 * pairs * text.num_layers * text.num_heads * text.head_dim
    # Attention multiplies two activations, so its backward pass is always twice its forward pass.
    total = weights * (2 + ("decoder" in trained)) + attention * 3
    patches = images * (vision.num_tokens)
    blocks = vit.depth(vision, model.feature_layer)
    tower = 2 * patches * blocks * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    tower += 4 * patches * (vision.num_tokens) * blocks * vision.hidden_size
    total += tower * (3 if "vision" in trained else 1)
    embedding = 2 * images * vision.patches * 3 * vision.patch_size**2 * vision.hidden_size
    total += embedding * (2 if "vision" in trained else 1)
    width = vision.hidden_size
    for layer in range(projector_depth(model.projector)):
        product = 2 * images * model.processor.features_per_tile * width * text.hidden_size
        below = "vision" in trained or layer > 0 and "projector" in trained
        total += product * (1 + below + ("projector" in trained))
        width = text.hidden_size
    return float(total)


LINE_TYPES = {"stage": str, "step": int, "loss": int | float, "validation_loss": int | float, "seconds": int | float}
"""Types of what is read from a line of `metrics.jsonl` again."""


class Log:
    """The run's log: `metrics.jsonl` and its optional copies, written by the first process only."""

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
        """Whether `key` of a step has been written; False where this process does not write."""
        return self.active and any((line["stage"], line["step"]) == (stage, step) and key in line
                                   for line in read_lines(self.path))

    def rewind(self, stage: str, step: int) -> None:
        """Drops what was written after `step` of `stage`: a restart writes it again.

        A stage that is done again, since its checkpoint was damaged, has all its lines if a later one has started.
        """
        self.complete = {stage} if output.has_later_started(self.recipe, stage) else set()
        if not self.active or not self.path.exists() or self.complete:
            return
        order = {name: i for i, name in enumerate(self.recipe.stages)}
        last = order[stage], step
        kept = [line for line in read_lines(self.path) if (order.get(line["stage"], -1), line["step"]) <= last]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if not isinstance(self.path, Path):  # an object of a bucket is replaced whole
            self.path.write_text(text)
            return
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self.path)

    def write(self, line: dict) -> None:
        """One line; `line` has `stage` and `step`."""
        if not self.active or line["stage"] in self.complete:
            return
        text = json.dumps(line, allow_nan=False) + "\n"
        if isinstance(self.path, Path):
            with self.path.open("a") as file:
                file.write(text)
        else:  # nothing can be appended to an object of a bucket
            self.path.write_text((self.path.read_text() if self.path.exists() else "") + text)
        numbers = {f"{line['stage']}/{key}": value for key, value in line.items()
                   if isinstance(value, int | float) and key != "step"}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.wandb:
            self.wandb.log(numbers | {f"{line['stage']}/step": line["step"]})

    def close(self) -> None:
        for copy in (self.tensorboard, self.wandb):
            if copy:
                getattr(copy, "close", getattr(copy, "finish", None))()


def read_lines(path: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, none if it is missing. UserError that names file and line if one is damaged.

    What follows the last newline was cut off while it was written, and is left out.
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
            if not isinstance(value, kinds) or isinstance(value, bool) or kinds is not str and not abs(value) < 1e300 \
                    or key == "step" and value < 1:
                raise UserError(f"{where}: {key} is {json_type(value)}; the file is damaged: remove this line")
        lines.append(line)
    return lines


def _resume_wandb(wandb: Any, directory: Path, project: str) -> Any:
    """The W&B run of this output directory, whose id is kept in it: a continuation goes on in the same run."""
    path = directory / "wandb.json"
    stored = read_json(path) if path.exists() else {}
    known = stored.get("id") if stored.get("project") == project else None
    if known is not None and not isinstance(known, str):
        raise UserError(f"{path}: id must be a text; remove the file to report to a new W&B run")
    # W&B writes its files on this machine only.
    run = wandb.init(project=project, id=known, dir=str(directory) if isinstance(directory, Path) else None,
                     resume="allow")
    output.write_json(path, {"project": project, "id": run.id})
    return run


class Progress:
    """A bar with the time that is left on a terminal, and plain lines everywhere else."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total = name, total
        self.active = jax.process_index() == 0
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True) if terminal else None

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, text: str, eta: float) -> None:
        """The newest figures; `eta` in seconds."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.active:
            print(f"{self.name} {step}/{self.total}  {text}  {eta / 60:.1f} min left", flush=True)

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.active:
            (self.bar.write if self.bar is not None else lambda text: print(text, flush=True))(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


