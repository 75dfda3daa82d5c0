"""TPU slices by the names that users know, with what the makers' data sheets say of their chips."""

import difflib
import math
import os
import re
from dataclasses import dataclass

from llava_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU generation. Rates are of one chip; memory and cycles of one device, as JAX counts devices."""

    kind: str
    device_kind: str
    """how JAX names its devices"""
    cores: int
    """TensorCores of a chip"""
    devices: int
    """devices of a chip: two TensorCores may be one device (v4, v5p) or two (tpu7x)"""
    counts_cores: bool
    """whether the number in a slice's name counts TensorCores; else it counts chips"""
    largest: int
    """chips of the largest slice"""
    dimensions: int
    """of the torus"""
    memory: int
    """bytes of HBM that the compiler lets a program have on one device"""
    flops: float
    """bfloat16 FLOP/s"""
    bandwidth: float
    """HBM bytes/s"""
    ici: float
    """bytes/s that a chip can send to its neighbours, all links together"""
    dcn: float | None
    """bytes/s that a chip can send to other slices; None where no data sheet says"""
    flops_per_cycle: int
    """of one device's matrix units, 2 for a multiply-add"""

    @property
    def clock(self) -> float:
        """Cycles/s: the peak over what the matrix units do in a cycle, since no data sheet names it."""
        return self.flops / self.devices / self.flops_per_cycle


# Peaks, HBM and links: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x; the links' figure there is for both
# directions, or in Gbit/s for one; v5e's and v6e's data-centre figures are of a pod of 256). Memory: what libtpu 0.0.52
# says is available to a program that needs too much. Operations per cycle: v4 and v5p have 2 x 4 matrix units of
# 128 x 128, v5e 4; for v6e and for a TensorCore of tpu7x four of 256 x 256 are what the compiler's cycles for large
# products come near to (87 and 85 % of it).
CHIPS = {chip.kind: chip for chip in (
    Chip("v4", "TPU v4", 2, 1, True, 4096, 3, int(30.75 * GIB), 275e12, 1228e9, 300e9, None, 2 * 8 * 128**2),
    Chip("v5e", "TPU v5 lite", 1, 1, False, 256, 2, int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, 2 * 4 * 128**2),
    Chip("v5p", "TPU v5", 2, 1, True, 6144, 3, int(95.73 * GIB), 459e12, 2765e9, 600e9, 6.25e9, 2 * 8 * 128**2),
    Chip("v6e", "TPU v6 lite", 1, 1, False, 256, 2, int(31.24 * GIB), 918e12, 1638e9, 400e9, 12.5e9, 2 * 4 * 256**2),
    Chip("tpu7x", "TPU7x", 2, 2, True, 9216, 3, int(94.74 * GIB), 2307e12, 7380e9, 600e9, None, 2 * 4 * 256**2),
)}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}

# Chips of a slice -> its shape. Slices of three dimensions beyond these are cubes of 4 x 4 x 4 in the squarest box.
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
CUBE = 64
LONGEST = 256
"""chips along one side of a torus, at most"""


@dataclass(frozen=True)
class Slice:
    """One slice, or several of the same shape that the data-centre network joins."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """The chips of one host along each dimension."""
        if self.chip.dimensions == 2 and math.prod(self.shape) <= 8:
            return (*self.shape, 1)
        return (2, 2, 1)

    @property
    def hosts(self) -> int:
        return self.chips // math.prod(self.host_bounds)

    @property
    def name(self) -> str:
        """As in a command line, for example `v5e-64` or `v5e-256x2`."""
        chips = math.prod(self.shape)
        size = f"{self.chip.kind}-{chips * (self.chip.cores if self.chip.counts_cores else 1)}"
        if self.shape != _shape(self.chip, chips):
            size = f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"
        return size if self.count == 1 else f"{self.count}x{size}" if ":" in size else f"{size}x{self.count}"

    @property
    def about(self) -> str:
        """The slice in words."""
        shape = "x".join(map(str, self.shape))
        devices = f", {self.devices:,} devices" if self.devices != self.chips else ""
        slices = f"{self.count} slices of {shape}" if self.count > 1 else shape
        return (f"{self.name}: {slices}, {self.chips:,} chip{'s' * (self.chips > 1)}{devices}, "
                f"{self.hosts:,} host{'s' * (self.hosts > 1)}")

    def jax_devices(self) -> list:
        """Devices to compile for; none of them exists. UserError if libtpu is missing."""
        quiet()
        from jax.experimental import topologies
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise UserError("planning needs the TPU compiler: pip install 'llava_jax[plan]'") from None
        options = {"chips_per_host_bounds": self.host_bounds}
        if self.chip.kind == "v4":
            options["chip_config_name"] = "megacore"
        if self.count > 1:
            options["num_slices"] = self.count
        name = f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def parse(name: str) -> Slice:
    """The slices of a name; UserError of one line, which lists what there is, for any other.

    v5e-64, v5litepod-64, v4-128 and v5p-128 (TensorCores, so 64 chips), tpu7x-16 (TensorCores too), a shape as in
    v5e:4x8, several slices as in v5e-256x2 or 2xv5e-256.
    """
    text = name.lower().replace(" ", "")
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+)(?:x(\d+))?|:(\d+(?:x\d+)*))", text)
    kind = ALIASES.get(found[2], found[2]) if found else ALIASES.get(text.split("-")[0], text.split("-")[0])
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"topology {name!r} is not known; {hint}write KIND-SIZE, as in v5e-64; kinds are "
                         f"{', '.join(CHIPS)}")
    chip = CHIPS[kind]
    if found is None or found[1] and found[4]:
        raise UserError(f"topology {name!r} is not known; {sizes(chip)}; several slices: v5e-256x2")
    count = int(found[1] or found[4] or 1)
    if found[3]:
        number, cores = int(found[3]), chip.cores if chip.counts_cores else 1
        shape = _shape(chip, number // cores) if number % cores == 0 else None
    else:
        shape = tuple(int(side) for side in found[5].split("x"))
        shape = shape if _is_published(chip, shape) else None
    if shape is None or count < 1:
        raise UserError(f"topology {name!r} is no {kind} slice; {sizes(chip)}")
    return Slice(chip, shape, count)


def sizes(chip: Chip) -> str:
    """The names of a kind's slices."""
    if chip.dimensions == 2:
        return f"there are {', '.join(f'{chip.kind}-{chips}' for chips in FLAT)}"
    cores = chip.cores
    small = ", ".join(f"{chip.kind}-{chips * cores}" for chips in SMALL)
    return (f"there are {small}, and multiples of {CUBE * cores} from {chip.kind}-{CUBE * cores} to "
            f"{chip.kind}-{chip.largest * cores} (TensorCores, {cores} to a chip)")


def quiet() -> None:
    """Makes JAX and libtpu compile on this host's CPU alone: no TPU of it is opened, locked or asked for.

    Works before JAX starts its backends; libtpu's messages to stderr are silenced too.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {
        # The compiler alone: do not look for a machine, nor for other processes that use its chips.
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
    }


def _shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The shape of a slice of so many chips; None if there is no such slice."""
    if chip.dimensions == 2:
        return FLAT.get(chips)
    if chips in SMALL:
        return SMALL[chips]
    cubes, rest = divmod(chips, CUBE)
    if rest or not cubes or chips > chip.largest:
        return None
    boxes = [(a, b, cubes // (a * b)) for a in range(1, cubes + 1) for b in range(a, cubes // a + 1)
             if cubes % (a * b) == 0 and cubes // (a * b) >= b]
    shape = tuple(4 * side for side in min(boxes, key=lambda box: (box[2], sum(box))))
    return shape if shape[-1] < LONGEST else None


def _is_published(chip: Chip, shape: tuple[int, ...]) -> bool:
    if len(shape) != chip.dimensions:
        return False
    if chip.dimensions == 2:
        return shape in FLAT.values()
    cubes = all(side % 4 == 0 and 0 < side < LONGEST for side in shape)
    return shape in SMALL.values() or cubes and math.prod(shape) <= chip.largest
