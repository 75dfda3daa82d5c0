"""Finds the cycles of Pallas kernels, to which optimised HLO gives none, from the TPU compiler's own schedule.

Every different kernel of a program is compiled alone, for one device. libtpu takes the flags that dump its schedule
from LIBTPU_INIT_ARGS only, so that happens in another process, which runs this module. A kernel takes some seconds.
"""

import base64
import io
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llava_jax.plan import topologies
from llava_jax.plan.hlo import Computation, Instruction

STATIC_SECONDS = 180
"""CPU seconds after which the static profile of a kernel is given up. It simulates every round of a loop."""
MAX_BYTES = 6 * 2**30
"""Bytes of memory after which the static profile is given up. It keeps each simulated instruction."""

DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32", "u32": "uint32", "s16": "int16",
          "u16": "uint16", "s8": "int8", "u8": "uint8", "s4": "int4", "u4": "uint4", "pred": "bool",
          "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:\w\w)?: ((?:> ?)*)\{", re.MULTILINE)
_BOUNDS = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class KernelCost:
    """Holds what the compiler's lower level says about a kernel on one device."""

    grid: int
    """Number of steps of its grid."""
    bundles: int
    """Instruction bundles of one step of the grid if all its branches run. The core issues one in a cycle."""
    static: int | None
    """Cycles of all steps by the compiler's static profile, which runs loops and models DMA. None if the profile does
    not know an instruction."""

    @property
    def cycles(self) -> int:
        """Cycles of all steps."""
        return self.grid * self.bundles if self.static is None else self.static


@dataclass(frozen=True)
class Kernel:
    """Describes a kernel of a program."""

    job: str
    """Shapes and configuration as JSON, from which it is compiled alone."""
    flops: float
    """Operations that the kernel states; 0 if it states none."""
    bytes: float
    """Bytes of HBM that the kernel states."""
    max_steps: int
    """Number of steps of a dynamic grid, which is known only at run time, at most; 0 for a static grid."""

    def seconds(self, chip: topologies.Chip, steps: int = 1) -> float:
        """Returns the time on one device, of `steps` if the grid is dynamic.

        What the kernel states, of a dynamic grid for the most steps, is a lower bound at the chip's peaks.
        """
        stated = chip.devices * max(self.flops / chip.flops, self.bytes / chip.bandwidth)
        stated *= steps / self.max_steps if self.max_steps else 1
        if (cost := measure(chip, self.job)) is None:
            return stated
        cycles = steps * cost.bundles if self.max_steps else cost.cycles
        return max(stated, cycles / chip.clock)


def is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def kernel(instruction: Instruction, computation: Computation) -> Kernel:
    """Returns the kernel of an instruction."""
    config = {"body": instruction.attribute(r'"body":"([^"]*)"'), "needs_layout_passes": True,
              "serialization_format": 1}
    shapes = [[(DTYPES[array.dtype], array.dims) for array in arrays] for arrays in (
        [operand.shape[0] for operand in computation.operands(instruction)], instruction.shape)]
    # Without its own limit of VMEM, a large kernel does not compile.
    size = int(instruction.attribute(r'"scoped_memory_configs":\[\{[^\]]*"size":"?(\d+)') or 0)
    limit = {"scoped_memory_configs": [{"memory_space": 1, "offset": 0, "size": size}]} if size else {}
    job = json.dumps({"operands": shapes[0], "results": shapes[1], "config": {"custom_call_config": config} | limit})
    # The length of a dynamic grid is the first operand. A table of the others has an entry for each step.
    tables = [dims[0] for dtype, dims in shapes[0] if dtype == "int32" and len(dims) == 1]
    max_steps = max(tables, default=1) if shapes[0][:1] == [("int32", ())] else 0
    stated = (float(instruction.attribute(rf'"cost_estimate":\{{[^}}]*"{name}":"?(\d+)') or 0)
              for name in ("flops", "bytes_accessed"))
    return Kernel(job, *stated, max_steps)


@lru_cache(maxsize=256)
def measure(chip: topologies.Chip, job: str) -> KernelCost | None:
    """Compiles a kernel in a process of its own. Returns None, with a line on stderr, if it does not compile alone."""
    job, ratio = shorten(job)
    # The static profile ends the process at instructions that it does not know.
    for static in (True, False):
        with tempfile.TemporaryDirectory(prefix="llava_jax_kernel_") as folder:
            flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            flags += f" --xla_jf_dump_static_llo_profile_to={folder}" * static
            command = [sys.executable, "-m", "llava_jax.plan.kernels", chip.kind]
            done = subprocess.run(command, input=job, env=os.environ | {"LIBTPU_INIT_ARGS": flags},
                                  capture_output=True, text=True)
            if done.returncode == 0:
                return _read(Path(folder), ratio)
    print(f"a kernel does not compile alone, and its stated FLOPs count: {done.stderr.strip()[-200:]}", file=sys.stderr)
    return None


def shorten(job: str) -> tuple[str, float]:
    """Returns a kernel with one step on the parallel axes of its grid, and how many steps these axes have.

    They cost the same, and the static profile simulates each step of the grid: all would take it many minutes.
    """
    from jax.experimental.mosaic.dialects import tpu
    from jax.extend.mlir import ir

    job, ratio, text = json.loads(job), 1.0, io.BytesIO()
    config = job["config"]["custom_call_config"]
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        module = ir.Module.parse(base64.b64decode(config["body"]))
        for function in module.body.operations:
            if "iteration_bounds" in function.attributes:
                bounds = list(function.attributes["iteration_bounds"])
                for axis, kind in enumerate(function.attributes["dimension_semantics"]):
                    if "parallel" in str(kind) and bounds[axis] > 2:
                        ratio, bounds[axis] = ratio * bounds[axis] / 2, 2
                function.attributes["iteration_bounds"] = ir.DenseI64ArrayAttr.get(bounds)
        module.operation.write_bytecode(text)
    config["body"] = base64.b64encode(text.getvalue()).decode()
    return json.dumps(job), ratio


def _read(folder: Path, ratio: float) -> KernelCost:
    text = next(path for path in folder.glob("*ffi_call*-final_bundles.txt")
                if "schedule-analysis" not in path.name).read_text()
    depths = [found.count(">") for found in _BUNDLE.findall(text)]
    bounds = [math.prod(map(int, found.split(","))) for found in _BOUNDS.findall(text)]
    profiles = [re.search(r"estimated_cycles: (\d+)", path.read_text())
                for path in folder.glob("ffi_call*_static_llo_profile.textproto")]
    inside = sum(depth > 0 for depth in depths)
    return KernelCost(round(ratio * max(bounds, default=1)), inside or len(depths),
                      round(ratio * int(profiles[0][1])) if profiles else None)


def compile_kernel(kind: str) -> None:
    """Compiles the kernel on stdin for one device of a kind."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (STATIC_SECONDS, STATIC_SECONDS))
    topologies.quiet()
    import jax
    from jax.sharding import SingleDeviceSharding

    job = json.load(sys.stdin)
    size = 8 if topologies.CHIPS[kind].dimensions == 3 else 1
    device = SingleDeviceSharding(topologies.parse(f"{kind}-{size}").jax_devices()[0])
    operands = [jax.ShapeDtypeStruct(dims, dtype, sharding=device) for dtype, dims in job["operands"]]
    results = [jax.ShapeDtypeStruct(dims, dtype) for dtype, dims in job["results"]]
    call = jax.ffi.ffi_call("tpu_custom_call", results, custom_call_api_version=1,
                            legacy_backend_config=json.dumps(job["config"]))
    jax.jit(lambda *operands: call(*operands)).lower(*operands).compile()


if __name__ == "__main__":
    compile_kernel(sys.argv[1])
