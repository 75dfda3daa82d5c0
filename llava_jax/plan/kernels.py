"""Finds the cycles of Pallas kernels, to which optimised HLO gives none, from the TPU compiler's own schedule.

    python -m llava_jax.plan.kernels step.after_codegen.txt --topology v5e-1

Every different kernel of a program is compiled alone, for one device. libtpu takes the flags that dump its schedule
from LIBTPU_INIT_ARGS only, so that happens in another process. A kernel takes some seconds. From Python, for any
jitted function: `kernels.measure(program.hlo, where)`, where `program` is that of `step.compile_program`.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.plan import topologies
from llava_jax.plan.hlo import Computation, Instruction, parse

TARGET = 'custom_call_target="tpu_custom_call"'
SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")
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
    """Cycles of all steps by the compiler's static profile, which runs loops and models DMA. It reads zeros from
    memory, so that branches that depend on tables are not taken. None if the profile does not know an instruction."""

    def cycles(self, active: float = 0.0) -> float:
        """Returns the cycles of all steps. `active`: share of the steps whose branches run because of a table."""
        if self.static is None:
            return self.grid * self.bundles
        return self.static * (1 - active) + active * max(self.grid * self.bundles, self.static)


def is_kernel(instruction: Instruction) -> bool:
    return TARGET in instruction.attributes


def key(instruction: Instruction) -> str:
    """Returns the serialised body of a kernel, which is the same wherever the kernel runs."""
    return re.search(r'"body":"([^"]*)"', instruction.attributes)[1]


def active_share(kernel: Instruction, computation: Computation) -> float:
    """Returns the share of a splash kernel's grid that a causal mask leaves; 0 for kernels without tables of blocks.

    Such a kernel computes the blocks on and below the diagonal. It has int8 tables of the blocks among its operands.
    """
    operands = [array for operand in computation.operands(kernel) for array in operand.shape]
    tables = [array for array in operands if array.dtype == "s8" and len(array.dims) == 3]
    if not SPLASH.search(kernel.op_name + kernel.name) or not tables:
        return 0.0
    rows, columns = tables[0].dims[-2:]
    below = sum(min(columns, -(-(row + 1) * columns // rows)) for row in range(rows))
    return below / (rows * columns)


def measure(hlo: str, where: topologies.Slice) -> dict[str, KernelCost]:
    """Returns the costs of the kernels of an optimised program's text, by their `key`."""
    kernels = {}
    for computation in parse(hlo).computations.values():
        for instruction in filter(is_kernel, computation.instructions.values()):
            kernels[key(instruction)] = _job(instruction, computation)
    return {body: _measure(where.chip, job) for body, job in kernels.items()}


def _job(kernel: Instruction, computation: Computation) -> str:
    """Returns the shapes and the configuration of a kernel as JSON."""
    config = {"body": key(kernel), "needs_layout_passes": True, "serialization_format": 1}
    shapes = [[(DTYPES[array.dtype], array.dims) for array in shape]
              for shape in ([operand.shape[0] for operand in computation.operands(kernel)], kernel.shape)]
    return json.dumps({"operands": shapes[0], "results": shapes[1], "config": {"custom_call_config": config}})


@lru_cache(maxsize=256)
def _measure(chip: topologies.Chip, job: str) -> KernelCost:
    """Compiles a kernel in a process of its own. The static profile ends it at instructions that it does not know."""
    for static in (True, False):
        with tempfile.TemporaryDirectory(prefix="llava_jax_kernel_") as folder:
            flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            flags += f" --xla_jf_dump_static_llo_profile_to={folder}" * static
            command = [sys.executable, "-m", "llava_jax.plan.kernels", "--compile", chip.kind]
            done = subprocess.run(command, input=job, env=os.environ | {"LIBTPU_INIT_ARGS": flags},
                                  capture_output=True, text=True)
            if done.returncode == 0:
                return _read(Path(folder))
    raise UserError(f"a kernel does not compile alone: {done.stderr.strip()[-400:]}")


def _read(folder: Path) -> KernelCost:
    text = next(path for path in folder.glob("*ffi_call*-final_bundles.txt")
                if "schedule-analysis" not in path.name).read_text()
    depths = [found.count(">") for found in _BUNDLE.findall(text)]
    bounds = [math.prod(map(int, found.split(","))) for found in _BOUNDS.findall(text)]
    profiles = [re.search(r"estimated_cycles: (\d+)", path.read_text())
                for path in folder.glob("ffi_call*_static_llo_profile.textproto")]
    inside = sum(depth > 0 for depth in depths)
    return KernelCost(max(bounds, default=1), inside or len(depths), int(profiles[0][1]) if profiles else None)


def compile_kernel(kind: str) -> None:
    """Compiles the kernel on stdin for one device of a kind."""
    topologies.quiet()
    import jax
    from jax.sharding import SingleDeviceSharding

    job = json.load(sys.stdin)
    size = 8 if topologies.CHIPS[kind].counts_cores else 1
    device = SingleDeviceSharding(topologies.parse(f"{kind}-{size}").jax_devices()[0])
    operands = [jax.ShapeDtypeStruct(dims, dtype, sharding=device) for dtype, dims in job["operands"]]
    results = [jax.ShapeDtypeStruct(dims, dtype) for dtype, dims in job["results"]]
    call = jax.ffi.ffi_call("tpu_custom_call", results, custom_call_api_version=1,
                            legacy_backend_config=json.dumps(job["config"]))
    jax.jit(lambda *operands: call(*operands)).lower(*operands).compile()


def table(hlo: str, where: topologies.Slice) -> Iterable[str]:
    """Yields lines with the costs of the kernels of a program, as they occur in its text."""
    costs = measure(hlo, where)
    yield f"{'kernel':<48}{'grid':>8}{'bundles':>9}{'static':>12}{'active':>8}{'cycles':>12}"
    for computation in parse(hlo).computations.values():
        for kernel in filter(is_kernel, computation.instructions.values()):
            cost, share = costs[key(kernel)], active_share(kernel, computation)
            yield (f"{kernel.name:<48}{cost.grid:>8,}{cost.bundles:>9,}{cost.static or '':>12}{share:>8.2f}"
                   f"{cost.cycles(share):>12,.0f}")


def main(args: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m llava_jax.plan.kernels")
    options.add_argument("hlo", help="text of an optimised program, such as *.after_codegen.txt of xla_dump_to")
    options.add_argument("--topology", default="v5e-1", help="slice, of which one device counts")
    found = options.parse_args(args)
    print("\n".join(table(Path(found.hlo).read_text(), topologies.parse(found.topology))))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_kernel(sys.argv[2])
    else:
        cli.run(main)
