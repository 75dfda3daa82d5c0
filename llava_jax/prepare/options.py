"""Options that several commands share, and the checks of their values."""

import dataclasses
import os
from typing import Annotated, Any

import tyro

from llava_jax.cli import Flag
from llava_jax.config import Data
from llava_jax.errors import UserError

DataArgument = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
OutArgument = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Names the data that a command reads."""

    data: DataArgument
    """Data file or folder of any format, or a mixture file."""
    image_root: str = ""
    """Folder of the images, to which paths in the data are relative; default: the data file's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Says how images are opened, as a recipe does."""

    exif: Flag = False
    """Whether images are rotated by their EXIF orientation (data.exif of a recipe)."""
    max_pixels: int = Data.max_pixels
    """Maximum number of pixels of an image (data.max_pixels of a recipe). A row with a larger one is unusable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Says how many processes work."""

    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Number of worker processes; default: one per core. 0 uses this process alone."""


def require_at_least(least: int, options: Any, *names: str) -> None:
    """Raises UserError if one of the named options is smaller than `least`. None is not checked."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
