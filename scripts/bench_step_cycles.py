"""Prints the train step of LLaMA2-7B beside MaxText's, compiled in the same way for v5e-64.

    python scripts/bench_step_cycles.py --programs build

Sequences of 2,048 tokens of text, fsdp 64; the vision tower is tiny. Texts of programs are kept in --programs and read
again. No TPU is needed or used: cycles and bytes are the compiler's (pip install 'llava_jax[plan]').
"""

import argparse
import json
import sys
from pathlib import Path

from bench_prediction import compiled

from llava_jax.models.llama import LlamaConfig
from llava_jax.plan import topologies

TOPOLOGY, LENGTH = "v5e-64", 2048
SETTINGS = ((2, "save_dots", 966, 12.98), (1, "save_qkv", 1047, 4.58), (1, "full", 1156, 3.23))
"""Sequences per chip and remat; then million cycles per sequence and GiB of MaxText (e591f30, jax 0.10.2, libtpu
0.0.52, its defaults; `minimal` is its save_dots). Its kernels and exposed collectives are not in the cycles."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, default=Path("build"), help="folder for the texts of programs")
    folder = parser.parse_args().programs
    folder.mkdir(parents=True, exist_ok=True)
    topologies.quiet()
    from llava_jax.plan.replay import profile, times

    where = topologies.parse(TOPOLOGY)
    print("| per chip | remat | M cycles | MaxText | GiB | MaxText | predicted ms | tokens/s/chip |")
    print("|---|---|---|---|---|---|---|---|")
    for sequences, remat, their_cycles, their_memory in SETTINGS:
        file = folder / f"step_{TOPOLOGY}_{sequences}_{remat}.json"
        if not file.exists():
            program = compiled(LlamaConfig(), TOPOLOGY, LENGTH, sequences, remat, 1)
            if not program.hlo:
                sys.exit(f"{remat} does not fit: {program.memory.peak / topologies.GIB:.1f} GiB")
            file.write_text(json.dumps([program.hlo, program.memory.peak, program.slices]))
        hlo, memory, slices = json.loads(file.read_text())
        found = profile(hlo, slices)
        seconds = times(found, where).step
        print(f"| {sequences} | {remat} | {found.cycles / sequences / 1e6:,.0f} | {their_cycles:,} | "
              f"{memory / topologies.GIB:.2f} | {their_memory} | {1e3 * seconds / sequences:,.0f} | "
              f"{LENGTH * sequences / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
