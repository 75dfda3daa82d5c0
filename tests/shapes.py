"""The type checker of the tests: arrays of the core must have the annotated shapes and dtypes."""

import functools
import operator
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np

MODULES = ("models", "inference", "train.loss", "train.step", "images", "text.encode")
ARRAYS = jax.Array | np.ndarray | jax.ShapeDtypeStruct
NAME = re.compile(r"[#*]?[^\W\d]\w*|\d+|\.\.\.")
"""A size or the name of one. Expressions such as "H/2" match any size: jaxtyping allows them in results alone."""


def install() -> None:
    """Checks every call of functions in MODULES. Modules that are imported already stay unchecked."""
    jaxtyping.install_import_hook([f"llava_jax.{name}" for name in MODULES], "shapes.check_arrays")


def check_arrays(function: Callable) -> Callable:
    """Applies beartype to array annotations alone, because tests pass other values of a wrong type on purpose.

    NumPy's and abstract arrays may replace JAX's.
    """
    function.__annotations__ = {name: _relaxed(kind) for name, kind in function.__annotations__.items()}
    return beartype.beartype(function)


def _relaxed(kind: Any) -> Any:
    """The annotation with any kind of array, and without types of other values."""
    if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractArray):
        dims = " ".join(dim if NAME.fullmatch(dim) else "_" for dim in kind.dim_str.split())
        return kind.dtype[ARRAYS if kind.array_type is jax.Array else kind.array_type, dims]
    parts, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, [part if part is type(None) else _relaxed(part) for part in parts])
    if origin is tuple:
        return tuple[*(part if part is ... else _relaxed(part) for part in parts)]
    return Any
