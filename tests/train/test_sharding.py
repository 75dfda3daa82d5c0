"""The same steps on one device, on eight fake ones in three meshes, and in several processes give the same model."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.parallel import sharding

SCRIPT = Path(__file__).with_name("sharded_steps.py")


def start(out: Path, sizes: list[int], devices: int, kind: str = "full", **env: str) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | env
    return subprocess.Popen([sys.executable, str(SCRIPT), str(out), kind, *map(str, sizes)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("one") / "run"
    finish(start(out, [1, 1, 1], devices=1))
    return dict(np.load(f"{out}_1_1_1.npz"))


def assert_same(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert result.keys() == expected.keys()
    assert expected["loss_0"] != expected["loss_2"]
    for name, value in expected.items():
        # Adam divides by the gradient's root mean square: rounding of tiny gradients is worth up to a few 1e-3 steps.
        np.testing.assert_allclose(result[name], value, rtol=2e-5, atol=3e-5, err_msg=name)


def test_meshes_of_eight_devices_train_as_one_device(one_device, tmp_path):
    meshes = [(1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)]
    output = finish(start(tmp_path / "run", [size for mesh in meshes for size in mesh], devices=8))
    for mesh in meshes:
        assert_same(dict(np.load(tmp_path / "run_{}_{}_{}.npz".format(*mesh))), one_device)
    assert "Involuntary full rematerialization" not in output


def test_meshes_train_the_same_adapters(tmp_path):
    """With dropout, and frozen kernels in 4 bits whose scales are replicated where they do not divide."""
    finish(start(tmp_path / "run", [1, 1, 1, 2, 2, 2], devices=8, kind="qlora"))
    one, eight = (dict(np.load(tmp_path / f"run_{mesh}.npz")) for mesh in ("1_1_1", "2_2_2"))
    assert_same(eight, one)


@pytest.mark.parametrize("count, mesh", [(2, [1, 8, 1]), (4, [2, 2, 2])])
def test_several_processes_train_as_one_device(one_device, tmp_path, count, mesh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(tmp_path / "run", mesh, devices=8 // count, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                       JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i), JAX_ENABLE_COMPILATION_CACHE="false")
                 for i in range(count)]  # process 0 alone would hit the cache, and Gloo waits only 30 s for the others
    for process in processes:
        finish(process)
    assert_same(dict(np.load(tmp_path / "run_{}_{}_{}.npz".format(*mesh))), one_device)


def test_a_mesh_that_does_not_match_the_devices_says_both_numbers():
    devices = jax.devices()[:1]
    with pytest.raises(UserError, match=r"fsdp 3 .* needs 3 devices, and there are 1"):
        sharding.make_mesh(config.Mesh(fsdp=3), devices)
    with pytest.raises(UserError, match=r"tensor 2 does not divide 1 devices"):
        sharding.make_mesh(config.Mesh(tensor=2), devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a v5e slice of 4 x 4 chips, as JAX describes it; a host has 2 x 2 of them."""

    slice_index: int
    place: int
    platform = "tpu"
    device_kind = "TPU v5 lite"
    core_on_chip = 0

    @property
    def id(self) -> int:
        return 100 * self.slice_index + self.place

    @property
    def coords(self) -> list[int]:
        return [self.place % 4, self.place // 4, 0]

    @property
    def process_index(self) -> int:
        x, y, _ = self.coords
        return 4 * self.slice_index + 2 * (y // 2) + x // 2


def chips(slices: int) -> list[Chip]:
    return [Chip(i, place) for i in range(slices) for place in range(16)]


def test_only_replicas_lie_on_different_slices():
    for mesh, shape in ((config.Mesh(data=2), (2, 16, 1)), (config.Mesh(data=4), (4, 8, 1)),
                        (config.Mesh(data=-1, fsdp=8, tensor=2), (2, 8, 2))):
        devices = sharding.make_mesh(mesh, chips(2)).devices
        assert devices.shape == shape
        assert len(set(devices.flat)) == 32
        of_replicas = [{chip.slice_index for chip in replica.flat} for replica in devices]
        assert of_replicas == [{i * 2 // shape[0]} for i in range(shape[0])]


def test_a_replica_that_does_not_fit_the_slices_says_what_to_set():
    for replica in (1, -1):
        with pytest.raises(UserError, match=r"mesh.data: 1 on 2 slices: .* set mesh.data 2$"):
            sharding.make_mesh(config.Mesh(data=replica, fsdp=32), chips(2))


def test_rows_that_hosts_would_share_are_refused():
    sharding.check_rows(sharding.make_mesh(config.Mesh(tensor=2), chips(1)))
    with pytest.raises(UserError, match="mesh.tensor: 4 devices that share sequences are on several hosts"):
        sharding.check_rows(sharding.make_mesh(config.Mesh(tensor=4), chips(1)))


def test_a_dimension_that_does_not_divide_names_parameter_dimension_and_axis():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    with pytest.raises(UserError, match=r"decoder/layers/mlp/up_proj/kernel \[2, 6, 8\]: dimension 6 .* fsdp = 4"):
        sharding.parameter_shardings({"decoder/layers/mlp/up_proj/kernel": (2, 6, 8)}, mesh)
    with pytest.raises(UserError, match="decoder/oops matches no row"):
        sharding.parameter_shardings({"decoder/oops": (4,)}, mesh)
