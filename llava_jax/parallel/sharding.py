"""Builds the mesh of devices, and maps parameter paths to shardings by one table."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
"""Sharding of a batch: the devices of the axes data and fsdp split it."""

LARGE_VOCABULARY = 65_536
"""Number of ids above which no device stores the complete embedding or output kernel, or their gradients, in
training."""

# Hidden dimensions are sharded, never the vocabulary, because 32,000 and 32,064 do not divide by 256.
# A leading None is the layer axis of the stacked parameters.
TABLE = (
    (r"vision/patch/kernel", P(None, None, None, "fsdp")),
    (r"vision/patch/bias", P()),
    (r"vision/(class|position)_embedding", P()),
    (r"(vision|decoder)/layers/attention/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor", None)),
    (r"(vision|decoder)/layers/attention/(q|k|v)_proj/bias", P(None, "tensor", None)),
    (r"(vision|decoder)/layers/attention/o_proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"(vision|decoder)/layers/mlp/(gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r"(vision|decoder)/layers/mlp/(gate|up)_proj/bias", P(None, "tensor")),
    (r"(vision|decoder)/layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),
    (r"(vision|decoder)/layers/(attention/o_proj|mlp/down_proj)/bias", P()),
    (r"(vision|decoder)/.*norm/(scale|bias)", P()),
    (r"(vision|decoder)/layers/.*/adapter/lora_a", P(None, ("tensor", "fsdp"), None)),
    (r"(vision|decoder)/layers/.*/adapter/lora_b", P(None, None, ("tensor", "fsdp"))),
    (r"projector/layers_\d+/adapter/lora_[ab]", P()),
    # Alternating, because the columns of one kernel are the rows of the next. With one layout for all of them and three
    # axes in use, XLA's partitioner returns wrong gradients of the first kernel (jaxlib 0.10.2, on CPU).
    (r"projector/layers_\d*[02468]/kernel", P("fsdp", "tensor")),
    (r"projector/layers_\d*[13579]/kernel", P("tensor", "fsdp")),
    (r"projector/layers_\d+/bias", P()),
    (r"image_newline", P()),
    (r"decoder/embedding", P(None, ("fsdp", "tensor"))),
    (r"decoder/lm_head/kernel", P(("fsdp", "tensor"), None)),
)


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges the devices (all by default) on a recipe's axes. Raises UserError if their numbers do not match."""
    devices = jax.devices() if devices is None else devices
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    requested = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        size, remainder = divmod(len(devices), math.prod(size for size in sizes if size != -1))
        if remainder or not size:
            raise UserError(f"mesh: {requested} does not divide {len(devices)} devices")
        sizes[sizes.index(-1)] = size
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh: {requested} needs {math.prod(sizes)} devices, and there are {len(devices)}; "
                        "set one axis to -1 to use all of them")
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(sizes)
    else:
        from jax.experimental import mesh_utils
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if sizes[0] % slices:
            raise UserError(f"mesh.data: {sizes[0]} on {slices} slices: only copies of the model are on different "
                            f"slices, which then exchange only gradients; set mesh.data {slices}")
        within = [sizes[0] // slices, *sizes[1:]]
        make = mesh_utils.create_device_mesh
        if slices > 1:
            make = functools.partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=[slices, 1, 1])
        try:
            grid = make(within, devices=devices)
        except NotImplementedError:  # an axis is shorter than an axis of the torus
            grid = make(within, devices=devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_shardings(shapes: dict[str, tuple[int, ...]], mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """Returns shardings by path. Raises UserError that names parameter, dimension and axis if one does not divide."""
    specs = config.match_rules(TABLE, list(shapes), "sharding", allow_unused=True)
    for path, spec in specs.items():
        for size, axes in zip(shapes[path], spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise UserError(f"mesh: {path} {list(shapes[path])}: dimension {size} does not divide by "
                                 f"{' x '.join(axes)} = {parts}")
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def check_rows(mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if devices of two processes share sequences, because every process reads its own sequences."""
    for group in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        if len({device.process_index for device in group}) > 1:
            raise UserError(f"mesh.tensor: {len(group)} devices that share sequences are on several hosts; choose a "
                            "smaller number, so that one host has them")


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Constrains the sharding of `x` to `spec` if a mesh is set (`jax.set_mesh`).

    A batch that the axes do not divide is unchanged, because sample answers in training are small batches.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or spec == ROWS and row_axes(x.shape[0]) is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def row_axes(count: int) -> tuple[str, ...] | None:
    """Returns the mesh axes that split a batch of `count`; None if they do not divide it, so that it is replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if count % (mesh.shape["data"] * mesh.shape["fsdp"]) else ("data", "fsdp")


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns `table[ids]`, [B, T, D], for a table whose columns the axes fsdp and tensor split (TABLE).

    A small table is replicated. A large one has more elements than the result, so each device looks up the ids of all
    sequences in its own columns. It sends every sequence's columns to the device that has the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(table) <= LARGE_VOCABULARY or row_axes(len(ids)) is None:
        # Replicated, because XLA would gather a lookup in shards of the columns again for every token.
        return constrain(constrain(table, P())[ids], ROWS)

    def local(columns, ids):
        x = columns[jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)]
        x = jax.lax.all_to_all(x[..., None, :], "fsdp", split_axis=0, concat_axis=2, tiled=True)  # [b, T, fsdp, d]
        x = jax.lax.all_gather(x, "tensor", axis=3)  # [b, T, fsdp, tensor, d]
        return x.reshape(*ids.shape, -1)

    specs = P(None, ("fsdp", "tensor")), ROWS
    return jax.shard_map(local, in_specs=specs, out_specs=ROWS, check_vma=False)(table, ids)
