"""Computes the fingerprint by which an adapter recognises its base model, and compares it."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llava_jax.errors import UserError
from llava_jax.files import matches_schema, show_json
from llava_jax.weights.source import ParameterSource

SAMPLES = 32
"""Number of values of a kernel in a fingerprint."""
TOLERANCE = 2.0**-7
"""Relative difference of two values that rounding to bfloat16, once or twice, may cause."""


def compute(parameters: ParameterSource, trained: Collection[str] = ()) -> dict[str, list[float]]:
    """Returns values of some kernels of a base model, by path and layer, to recognise it by.

    They are SAMPLES evenly spaced values, rounded to bfloat16, of the q_proj and down_proj kernels of the first and the
    last layer of the decoder and the vision tower. So they do not depend on the layout, and by TOLERANCE not on the
    dtype. A vocabulary may be padded. `trained`: paths that an adapter replaces, which are left out.
    """
    samples = {}
    for part in ("decoder", "vision"):
        for kernel in ("attention/q_proj", "mlp/down_proj"):
            path = f"{part}/layers/{kernel}/kernel"
            if path not in parameters.shapes or path in trained:
                continue
            for layer in sorted({0, parameters.shapes[path][0] - 1}):
                values = _samples(parameters, path, layer)
                samples[f"{path}/{layer}"] = values.astype(ml_dtypes.bfloat16).astype(float).tolist()
    return samples


def _samples(parameters: ParameterSource, path: str, layer: int) -> np.ndarray:
    """Returns evenly spaced values of a layer, for which it reads only their rows of a tensor in a file."""
    shape = parameters.shapes[path][1:]
    positions = np.linspace(0, math.prod(shape) - 1, SAMPLES).astype(int)
    stored = parameters.tensor(path, layer)
    if stored is None:
        return parameters.read(path, layer).reshape(-1)[positions]
    tensor, transform = stored
    index = np.unravel_index(positions, transform.merge(shape))
    cells = zip(*(index[axis] for axis in transform.order), strict=True)
    return np.array([tensor.read(slice(row, row + 1))[0, *rest] for row, *rest in cells])


def check(directory: Path, note: Mapping[str, Any], base: ParameterSource, trained: set[str],
          name: str | Path) -> None:
    """Raises UserError if the base is not the one whose fingerprint the note in an adapter's folder has.

    `trained`: parameters that the adapter replaces, which are not compared. Folders of other programs have none.
    """
    stored = note.get("fingerprint")
    if stored is None:
        return
    actual = compute(base)
    same = all(
        key.rpartition("/")[0] in trained or matches_schema(values, [float]) and
        len(actual.get(key, [])) == len(values) and
        all(math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=1e-6) for x, y in zip(values, actual[key], strict=True))
        for key, values in stored.items())
    if not same:
        raise UserError(f"{directory}: trained on another model than {name} (their kernels differ); name its "
                        f"base, which was {show_json(note.get('base'))}")
