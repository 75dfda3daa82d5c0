"""Gradients of every parameter, on every kind of mesh, beside one device: XLA's partitioner has returned wrong ones.

The loss alone does not show that: it was right where the gradients of like-sharded projector layers were wrong.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_gradients import MODELS

from llava_jax.models.layers import REMAT
from llava_jax.models.llava import abstract_params
from llava_jax.parallel import sharding

SCRIPT = Path(__file__).with_name("sharded_gradients.py")
ALL, ALIGN = ".*", "projector/.*"
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES)) if math.prod(sizes) == 8]
ALONE = [sizes for sizes in MESHES if max(sizes) == 8]
TOLERANCE = 1e-4


def run(*cases: tuple[str, str, str, tuple[int, ...]]) -> list[dict]:
    """The lines of the script."""
    named = [f"{model}:{trained}:{remat}:{','.join(map(str, sizes))}" for model, trained, remat, sizes in cases]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    result = subprocess.run([sys.executable, str(SCRIPT), *named], env=os.environ | {"XLA_FLAGS": flags}, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["case"] for line in lines] == named
    return lines


def differences(*cases: tuple[str, str, str, tuple[int, ...]]) -> dict[str, dict[str, list[float]]]:
    """By case and parameter, the largest gradient and how far the mesh's is from that of one device."""
    return {line["case"]: line["differences"] for line in run(*cases)}


def assert_same(found: dict[str, dict[str, list[float]]]) -> None:
    for case, parameters in found.items():
        largest = max(gradient for path, (gradient, _) in parameters.items() if path != "loss")
        # Some gradients are 0 but for rounding (the biases of keys): they are held against the others.
        wrong = {path: values for path, values in parameters.items()
                 if not values[1] <= TOLERANCE * max(values[0], 1e-3 * largest)}
        assert not wrong, case


def paths_of(model: str) -> list[str]:
    return list(abstract_params(MODELS[model])[1])


def test_every_row_of_the_sharding_table_is_compared():
    """A new row, or a new kind of layer, needs a model in MODELS that has it."""
    paths = {path for model in MODELS for path in paths_of(model)}
    unseen = [row for row, _ in sharding.TABLE if not any(re.fullmatch(row, path) for path in paths)]
    assert not unseen


def test_gradients_on_each_axis_alone_and_on_all():
    found = differences(*(("biases", ALL, "full", sizes) for sizes in (*ALONE, (2, 2, 2))))
    assert_same(found)
    # Where nothing reaches a parameter, its gradient compares nothing.
    gradients = next(iter(found.values()))
    unseen = [row for row, _ in sharding.TABLE if not any(
        re.fullmatch(row, path) and gradient > 0 for path, (gradient, _) in gradients.items())]
    assert not unseen


def test_no_device_has_the_complete_kernel_of_a_large_vocabulary():
    """Beside one device, which has the loss and the lookup of a small vocabulary."""
    (line,) = run(("large_tied", ALL, "none", (2, 2, 2)))
    assert_same({line["case"]: line["differences"]})
    one_device, mesh = line["kernels"]
    assert one_device > 0 and mesh == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_every_model_on_every_mesh(model):
    trained = [trained for trained in (ALL, ALIGN, "(projector|decoder)/.*")
               if any(re.fullmatch(trained, path) for path in paths_of(model))]
    assert_same(differences(*((model, ALL, "none", sizes) for sizes in MESHES),
                            *((model, part, "full", (2, 2, 2)) for part in trained)))


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
def test_gradients_of_every_remat_policy(remat):
    assert_same(differences(*(("mlp2x_gelu", ALL, remat, sizes) for sizes in ((2, 2, 2), (1, 4, 2), (2, 1, 4)))))
