"""Chooses XLA's compiler options by TPU generation, and leaves out those that the installed libtpu does not know."""

import functools
import re
import sys

import jax
from jax.sharding import PartitionSpec as P

Options = dict[str, bool | int]
"""Values of compiler options by name, as `jax.jit(compiler_options=...)` expects them."""

# Windowed einsums, which gather weights piece by piece, are several times slower on a v6e.
_ALL = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}

# Collectives on the SparseCores overlap with the TensorCore, which otherwise waits for most of them.
_SPARSE_CORE = {
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
} | {option: on for collective in ("all_gather", "reduce_scatter", "all_reduce") for option, on in (
    (f"xla_tpu_enable_async_collective_fusion_fuse_{collective}", False),
    (f"xla_tpu_enable_sparse_core_collective_offload_{collective}", True))}

# A v5e has no SparseCores. Its all-reduces of gradients overlap if they are asynchronous and not combined.
_ASYNC_ALL_REDUCE = {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 1_000_000,
    "xla_tpu_arf_combiner_threshold_in_bytes": 1_000_000,
    "xla_tpu_ars_combiner_threshold_in_bytes": 1_000_000,
}

OPTIONS = {
    "TPU v4": _ALL,
    "TPU v5 lite": _ALL | _ASYNC_ALL_REDUCE,
    "TPU v5": _ALL | _SPARSE_CORE,
    "TPU v6 lite": _ALL | _SPARSE_CORE,
    "TPU7x": _ALL | _SPARSE_CORE,
}
"""Options by `device_kind`. llava_jax/plan/README.md has what they are worth by the compiler's figures (libtpu
0.0.52)."""


def compiler_options(mesh: jax.sharding.Mesh) -> Options | None:
    """Returns the options for a program that runs on `mesh`; None if its devices are not TPUs.

    Options that the compiler does not know are left out, and a line on stderr names them.
    """
    devices = mesh.devices.flat
    if devices[0].platform != "tpu":
        return None
    local = (device for device in devices if device.process_index == jax.process_index())
    return dict(_known(tuple(OPTIONS.get(devices[0].device_kind, _ALL).items()), next(local, devices[0])))


@functools.cache
def _known(options: tuple[tuple[str, bool | int], ...], device: jax.Device) -> tuple[tuple[str, bool | int], ...]:
    """Returns those `options` with which a trivial program compiles for `device`."""
    known, unknown = dict(options), []
    with jax.set_mesh(jax.sharding.Mesh([device], ("x",))):
        lowered = jax.jit(lambda: jax.numpy.ones((8, 128)), out_shardings=P()).lower()
    while True:
        try:
            lowered.compile(compiler_options=known)
            break
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"No such compile option: '(\w+)'", str(error))
            if found is None or found[1] not in known:
                raise
            del known[found[1]]
            unknown.append(found[1])
    if unknown:
        print("compiler options that this libtpu does not know are left out:", ", ".join(sorted(unknown)),
              file=sys.stderr, flush=True)
    return tuple(known.items())
