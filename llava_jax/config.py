"""Defines everything that a recipe can set, as frozen dataclasses that are checked on construction.

A recipe is a Python file, `configs/NAME.py`, whose `recipe()` returns a `Recipe`. Every field can be set on the command
line by its dotted name, for example `--stages.align.optimizer.warmup-ratio 0.1`.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llava_jax.errors import UserError
from llava_jax.image_files import LARGEST_LIMIT, MAX_PIXELS
from llava_jax.images import parse_mode, parse_pinpoints
from llava_jax.video import VideoSampling

T = TypeVar("T")

Table = tuple[tuple[str, float | None], ...]
"""Rows of (regular expression, value). Every parameter path must match exactly one row, from start to end."""


def _check_table(name: str, table: Table) -> None:
    for pattern, _ in table:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{name}: {pattern!r} is no regular expression ({error})") from None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv:2106.09685): a trained `scale * lora_a @ lora_b` beside frozen kernels."""

    rank: int = 128
    """Number of columns of `lora_a`."""
    alpha: float = 256.0
    """Factor of the update; `scale` divides it."""
    dropout: float = 0.05
    """Fraction of an adapter's inputs that a training step sets to zero."""
    targets: tuple[str, ...] = ("decoder/layers/(attention/(q|k|v|o)_proj|mlp/(gate|up|down)_proj)",)
    """Regular expressions for the paths of the linear maps that get an adapter."""
    rslora: bool = False
    """Whether `scale` is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}: it must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}: it must be at least 0 and less than 1")
        if not self.targets:
            raise UserError("lora.targets is empty: give regular expressions for paths, or leave lora out")
        _check_table("lora.targets", tuple((pattern, None) for pattern in self.targets))

    @property
    def scale(self) -> float:
        """Factor of `lora_a @ lora_b`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Model:
    """Checkpoints that a run starts from, and how they are joined."""

    vision: str = ""
    """Directory of the vision tower in Hugging Face layout. Beside `llava`: the tower that an original LLaVA names but
    does not contain."""
    language: str = ""
    """Directory of the decoder and its tokenizer in Hugging Face layout."""
    llava: str = ""
    """Directory of a LLaVA to continue from, in any supported layout, instead of vision and language."""
    projector: str | None = None
    """Type of the projector: linear (the paper), mlpNx_gelu (LLaVA-1.5: mlp2x_gelu, the default) or identity.
    merge2x2_linear and merge2x2_mlpNx_gelu read 2 x 2 patches as one visual token."""
    feature_layer: int | None = None
    """Index of the vision tower's hidden state that is read, as in transformers; default -2."""
    feature_select: Literal["patch", "cls_patch"] | None = None
    """Features that are read: of the patches alone (the default), or of the class token and the patches."""
    image_mode: str | None = None
    """Image mode: crop the centre (the paper), pad to a square (LLaVA-1.5, the default), resize to one (SigLIP), anyres
    (LLaVA-1.6) or anyres_max_N, shrunk to N tiles (OneVision: anyres_max_9)."""
    pinpoints: str = ""
    """Canvas sizes that anyres chooses from: pixels such as (336x672),(672x336), or tiles such as (1x1),...,(6x6)."""
    fresh: tuple[str, ...] | None = None
    """Regular expressions for the paths of parameters that no checkpoint has, initialised from the seed. By default the
    projector, and the newline of anyres, if `vision` and `language` are joined, otherwise none."""
    projector_weights: str = ""
    """File of a projector that LLaVA's first stage trained (mm_projector.bin), or its folder, beside `vision` and
    `language`; default: a new projector."""
    adapter: str = ""
    """Directory of adapters to continue from, of PEFT or of the original LLaVA, beside `llava`; default: none. Adapters
    with a projector may also be beside `vision` and `language`."""
    lora: Lora | None = None
    """Low-rank adapters that are added to the model, in training beside it and in the finished model merged."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Storage of the frozen kernels of the decoder's layers in training (QLoRA): 8 bits with a scale for each output,
    or 4 bits with a scale for each 64 inputs. The finished model has the kernels of the checkpoint."""
    template: str | None = None
    """Conversation template of the finished model; default: the last stage's, or the checkpoint's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Implementation of attention (models/attention.py); auto is splash on TPU, cudnn on GPU, xla on CPU."""

    def __post_init__(self):
        if self.llava and self.language or not (self.llava or self.vision or self.language):
            raise UserError("model: give either llava, or both vision and language")
        if not self.llava and not (self.vision and self.language):
            missing = "language" if self.vision else "vision"
            raise UserError(f"model.{missing} is empty: both parts are needed, or model.llava")
        fixed = ("projector", "projector_weights", "feature_layer", "feature_select", "image_mode", "pinpoints")
        for name in ("lora", "fresh", *fixed):
            if self.adapter and getattr(self, name) not in (None, ""):
                raise UserError(f"model.{name} is fixed by model.adapter; leave it out")
        for name in fixed:
            if self.llava and getattr(self, name) not in (None, ""):
                raise UserError(f"model.{name} is fixed by the checkpoint model.llava; leave it out")
        is_anyres = parse_mode(self.image_mode or "pad", "model.image_mode")[0] == "anyres"
        if self.pinpoints and not is_anyres:
            raise UserError("model.pinpoints are read with model.image_mode anyres or anyres_max_N alone")
        if is_anyres:
            parse_pinpoints(self.pinpoints, 1)
        _check_table("model.fresh", tuple((pattern, None) for pattern in self.fresh or ()))


@dataclass(frozen=True)
class Mesh:
    """Number of devices along each axis. One axis may be -1, for the remaining devices."""

    data: int = 1
    """Number of copies of the model, for example one per slice."""
    fsdp: int = -1
    """Number of devices that share the parameters and split the batch."""
    tensor: int = 1
    """Number of devices that share each matmul."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{axis} is {size}: give a positive number, or -1 for the remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis can be -1, not {', '.join(a for a, s in sizes.items() if s == -1)}")


@dataclass(frozen=True)
class Data:
    """Training data of a stage, and how its conversations are packed into sequences."""

    path: str
    """Path of the data, in any format of data/README.md, or of a mixture file."""
    image_root: str = ""
    """Folder of the images, to which paths in the data are relative; default: the data file's folder."""
    template: str = ""
    """Conversation template of this stage; default: the model's."""
    image_mode: str | None = None
    """Image mode of this stage; default: the model's. anyres has the pinpoints of the model."""
    validation: str = ""
    """Path of validation data, whose loss is reported; default: none."""
    sequence_length: int = 2048
    """Number of tokens of a packed sequence, including visual tokens."""
    tiles_per_sequence: int = 2
    """Number of image tiles of a packed sequence."""
    exif: bool = False
    """Whether images are rotated as their EXIF orientation says, which LLaVA did not."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image or a frame. A row with a larger one is bad."""
    video: VideoSampling = VideoSampling()
    """Frames that are sampled of a video. Each takes a tile of `tiles_per_sequence`."""
    bad_rows: Literal["error", "skip"] = "error"
    """Treatment of rows that cannot be used: stop with an error, or skip and count them."""
    workers: int = 0
    """Number of processes that read, decode and tokenise; 0 uses a thread of the training process."""

    def __post_init__(self):
        if self.max_pixels > LARGEST_LIMIT:
            raise UserError(f"data.max_pixels is {self.max_pixels}: it must be at most {LARGEST_LIMIT}")
        for name in ("sequence_length", "tiles_per_sequence", "max_pixels"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}: it must be at least 1")
        parse_mode(self.image_mode or "pad", "data.image_mode")
        if self.workers < 0:
            raise UserError(f"data.workers is {self.workers}: it must be 0 or more")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up from 0 and cosine decay to 0."""

    warmup_ratio: float = 0.03
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: Table = ((".*", 0.0),)
    """Weight decay by parameter path, for what the stage trains."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment."""
    offload: bool = False
    """Whether the moments stay in host memory and move to the devices for each update."""
    clip: float | None = None
    """Maximum global gradient norm; default: no clipping, as in LLaVA-1.5."""

    def __post_init__(self):
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"optimizer.warmup_ratio is {self.warmup_ratio}: it must be in 0..1")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"optimizer.clip is {self.clip}: it must be positive, or None for no clipping")
        _check_table("optimizer.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class Stage:
    """One stage of training: which parameters, on which data, for how long."""

    learning_rates: Table
    """Peak learning rate by parameter path; None keeps a parameter frozen."""
    data: Data
    optimizer: Optimizer = Optimizer()
    batch_size: int = 128
    """Number of packed sequences per step, over all devices and micro-batches."""
    gradient_accumulation: int = 1
    """Number of micro-batches of a step; more need less memory."""
    remat: Literal["none", "save_dots", "save_attention", "save_qkv", "full", "offload"] = "full"
    """Rematerialisation: what the backward pass recomputes instead of reading it from memory (models/layers.py)."""
    epochs: float = 1.0
    """Number of passes over the data. Ignored if `steps` is set."""
    steps: int | None = None
    """Number of steps, instead of epochs."""

    def __post_init__(self):
        _check_table("learning_rates", self.learning_rates)
        if all(rate is None for _, rate in self.learning_rates):
            raise UserError("learning_rates: every row is None, so the stage would train nothing")
        for name in ("batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size % self.gradient_accumulation:
            raise UserError(f"batch_size {self.batch_size} is not divisible by gradient_accumulation "
                            f"{self.gradient_accumulation}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}: it must be at least 1, or None to count epochs")
        if self.epochs <= 0:
            raise UserError(f"epochs is {self.epochs}: it must be positive")


@dataclass(frozen=True)
class Recipe:
    """A run: the model, the devices, and the stages in their order.

    A recipe file may subclass it to override `prepare` and `finish`.
    """

    model: Model
    stages: dict[str, Stage]
    output: str
    """Directory for checkpoints, metrics and the finished model."""
    mesh: Mesh = Mesh()
    seed: int = 0
    """Random seed for projector initialisation and data order."""
    log_every: int = 10
    """Number of steps between lines of metrics."""
    validate_every: int = 500
    """Number of steps between validations of a stage with validation data; its last step has one too."""
    sample_every: int = 0
    """Number of steps between sample answers to the first rows of the validation data; 0 for none."""
    checkpoint_every: int = 500
    """Number of steps between checkpoints; the last step of a stage has one too."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints of a stage that are kept."""
    tensorboard: bool = False
    """Whether TensorBoard events are written too (pip install 'llava_jax[tensorboard]')."""
    wandb: str = ""
    """Weights & Biases project to report to (pip install 'llava_jax[wandb]'); default: none."""

    def __post_init__(self):
        if not self.stages:
            raise UserError("stages: the recipe has none")
        if not self.output:
            raise UserError("output: give a directory")
        for name in ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if infinite := [name for name, value in _floats(dataclasses.asdict(self)) if not math.isfinite(value)]:
            raise UserError(f"{infinite[0]}: it must be finite")

    def prepare(self) -> None:
        """Creates the data of the recipe. Called by one process before training, also when a run continues."""

    def finish(self, model: Path) -> None:
        """Uses the finished model, for example to score it. Called by one process with the model's directory."""


def _floats(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in a tree of dicts and tuples, with their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _floats(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple):
        for inner in value:
            yield from _floats(inner, name)
    elif isinstance(value, float):
        yield name, value


def match_rules(table: Sequence[tuple[str, T]], paths: Sequence[str], name: str,
                allow_unused: bool = False) -> dict[str, T]:
    """Returns the value of every path by a table's rows, whose regular expressions match from start to end.

    Raises UserError if a path matches no row or several, or, without `allow_unused`, if a row matches no path.
    """
    rows = [(pattern, re.compile(pattern), value) for pattern, value in table]
    values, problems, used = {}, [], set()
    for path in paths:
        hits = [(pattern, value) for pattern, regex, value in rows if regex.fullmatch(path)]
        used.update(pattern for pattern, _ in hits)
        if len(hits) == 1:
            values[path] = hits[0][1]
        else:
            problems.append(f"{path} matches {' and '.join(p for p, _ in hits) or 'no row'}")
    if not allow_unused:
        problems += [f"{pattern} matches no parameter" for pattern, _, _ in rows if pattern not in used]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{name}: {'; '.join(problems[:8])}{more}")
    return values


def load_recipe(name: str, **arguments: Any) -> Recipe:
    """Returns the recipe of a file, or of the name of one in ./configs or in this package. Calls its `recipe`."""
    folders = [Path("configs"), Path(__file__).parent / "configs"]
    candidates = [Path(name)] if name.endswith(".py") else [folder / f"{name}.py" for folder in folders]
    for path in candidates:
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f"llava_jax_recipe_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # for subclasses of Recipe, which are dataclasses
            spec.loader.exec_module(module)
            if not hasattr(module, "recipe"):
                raise UserError(f"{path}: a recipe file defines recipe(), and this one does not")
            return module.recipe(**arguments)
    names = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"recipe {name!r}: no such recipe; {hint}there are {', '.join(names) or 'none'}")
