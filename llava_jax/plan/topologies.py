"""TPU slices by name, with the figures of their chips' data sheets."""

import math
import os
import re
from dataclasses import dataclass

from llava_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Describes a TPU generation. Rates are those of a chip; memory and cycles those of a JAX device."""

    kind: str
    cores: int
    """Number of TensorCores of a chip, which the number in a slice's name counts."""
    devices: int
    """Number of devices of a chip: two TensorCores are one device (v4, v5p) or two (tpu7x)."""
    largest: int
    """Number of chips of the largest slice."""
    dimensions: int
    """Number of dimensions of the torus."""
    memory: int
    """Bytes of HBM that the compiler accepts for a program on one device."""
    flops: float
    """bfloat16 FLOP/s."""
    bandwidth: float
    """HBM bytes/s."""
    ici: float
    """Bytes/s of an all-gather or a reduce-scatter, over one axis of the torus."""
    dcn: float | None
    """Bytes/s that a chip can send to other slices; None if no data sheet gives it."""
    flops_per_cycle: int
    """FLOPs of one device's matrix units in a cycle, 2 for a multiply-add."""

    @property
    def clock(self) -> float:
        """Cycles/s: the peak over the FLOPs of a cycle, because data sheets do not give the clock."""
        return self.flops / self.devices / self.flops_per_cycle


# Peaks and HBM: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x; v5e's and v6e's data-centre figures are of
# a pod of 256). Links: measured in public on v5e and v6e, where they are 93 and 96 % of the links of one axis on the
# data sheet; for the others 93 % of that (100 GB/s on v4, 200 on v5p and tpu7x). Measured all-reduces send twice the
# bytes at twice the rate. Memory: what libtpu 0.0.52 reports as available to a program that needs too much. FLOPs per
# cycle: v4 and v5p have 2 x 4 matrix units of 128 x 128, v5e has 4. For v6e and a TensorCore of tpu7x, four units of
# 256 x 256 are assumed, because the compiler's cycles for large products reach 87 and 85 % of that.
CHIPS = {chip.kind: chip for chip in (
    Chip("v4", 2, 1, 4096, 3, int(30.75 * GIB), 275e12, 1228e9, 93e9, None, 2 * 8 * 128**2),
    Chip("v5e", 1, 1, 256, 2, int(15.75 * GIB), 197e12, 819e9, 93e9, 3.125e9, 2 * 4 * 128**2),
    Chip("v5p", 2, 1, 6144, 3, int(95.73 * GIB), 459e12, 2765e9, 186e9, 6.25e9, 2 * 8 * 128**2),
    Chip("v6e", 1, 1, 256, 2, int(31.24 * GIB), 918e12, 1638e9, 193e9, 12.5e9, 2 * 4 * 256**2),
    Chip("tpu7x", 2, 2, 9216, 3, int(94.74 * GIB), 2307e12, 7380e9, 186e9, None, 2 * 4 * 256**2),
)}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}

# Shapes of slices by dimensions and number of chips. Larger slices of three dimensions are cubes of 4 x 4 x 4 in the
# box that is nearest to a cube.
SMALL = {2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
         3: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}}
CUBE = 64
MAX_SIDE = 256
"""Limit of the number of chips along one side of a torus."""


@dataclass(frozen=True)
class Slice:
    """Describes one slice, or several of the same shape that are connected by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Number of chips of one host along each dimension."""
        return (*self.shape, 1) if self.chip.dimensions == 2 and math.prod(self.shape) <= 8 else (2, 2, 1)

    @property
    def hosts(self) -> int:
        return self.chips // math.prod(self.host_bounds)

    @property
    def name(self) -> str:
        """Name on a command line, such as `v5e-64` or `v5e-256x2`."""
        return f"{self.chip.kind}-{math.prod(self.shape) * self.chip.cores}" + f"x{self.count}" * (self.count > 1)

    @property
    def about(self) -> str:
        """Description of the slice in words."""
        shape = "x".join(map(str, self.shape))
        devices = f", {self.devices:,} devices" if self.devices != self.chips else ""
        slices = f"{self.count} slices of {shape}" if self.count > 1 else shape
        return (f"{self.name}: {slices}, {self.chips:,} chip{'s' * (self.chips > 1)}{devices}, "
                f"{self.hosts:,} host{'s' * (self.hosts > 1)}")

    def jax_devices(self) -> list:
        """Returns devices to compile for, which need not exist. Raises UserError if libtpu is missing."""
        quiet()
        from jax.experimental import topologies
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise UserError("planning needs the TPU compiler: pip install 'llava_jax[plan]'") from None
        options = {"chip_config_name": "megacore"} if self.chip.kind == "v4" else {}
        options |= {"num_slices": self.count} if self.count > 1 else {}
        name = f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name,
                                                 chips_per_host_bounds=self.host_bounds, **options).devices)


def parse(name: str) -> Slice:
    """Parses the name of a slice or of several. Raises UserError, with the names that exist, for any other.

    Examples: v5e-64, v5litepod-64; v4-128, v5p-128 and tpu7x-128 (TensorCores, so 64 chips); several slices as
    v5e-256x2.
    """
    kind = name.lower().split("-")[0]
    chip, found = CHIPS.get(ALIASES.get(kind, kind)), re.fullmatch(r"\w+-(\d+)(?:x([1-9]\d*))?", name)
    if chip is None:
        raise UserError(f"topology {name!r} is not known; write KIND-SIZE, as in v5e-64; kinds are {', '.join(CHIPS)}")
    chips, rest = divmod(int(found[1]), chip.cores) if found else (0, 0)
    if rest or (shape := _shape(chip, chips)) is None:
        known = ", ".join(f"{chip.kind}-{chips * chip.cores}" for chips in SMALL[chip.dimensions])
        if chip.dimensions == 3:
            known += (f", and multiples of {CUBE * chip.cores} from {chip.kind}-{CUBE * chip.cores} to "
                      f"{chip.kind}-{chip.largest * chip.cores} (TensorCores, {chip.cores} to a chip)")
        raise UserError(f"topology {name!r} is no {chip.kind} slice; there are {known}; several slices: v5e-256x2")
    return Slice(chip, shape, int(found[2] or 1))


def quiet() -> None:
    """Makes JAX and libtpu compile on the CPU of this host, without opening, locking or searching a TPU.

    Call it before JAX starts its backends. It also silences libtpu's messages to stderr.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu ends the process at flags that only the compiler for CPUs knows.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if not flag.startswith("--xla_cpu_"))
    os.environ |= {
        # The compiler alone: no search for a machine, or for other processes that use its chips.
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
    }


def _shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """Returns the shape of a slice of so many chips, or None if there is no such slice."""
    if chips in SMALL[chip.dimensions]:
        return SMALL[chip.dimensions][chips]
    cubes, rest = divmod(chips, CUBE)
    if chip.dimensions == 2 or rest or not cubes or chips > chip.largest:
        return None
    boxes = [(a, b, cubes // (a * b)) for a in range(1, cubes + 1) for b in range(a, cubes // a + 1)
             if cubes % (a * b) == 0 and cubes // (a * b) >= b]
    shape = tuple(4 * side for side in min(boxes, key=lambda box: (box[2], sum(box))))
    return shape if shape[-1] < MAX_SIDE else None
