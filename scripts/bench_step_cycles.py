"""The train step by the TPU compiler's cycles, beside MaxText's LLaMA2-7B step compiled in the same way.

    python scripts/bench_step_cycles.py

LLaVA-1.5-7B on v5e-64, fsdp 64, rows of 2048 tokens with two images of 336 pixels, by `python -m llava_jax.plan`. No
TPU is needed or used: cycles and bytes are the compiler's (pip install 'llava_jax[plan]').
"""

import json
import subprocess
import sys

GIB = 2**30
ROW = ("--stages.{}.data.sequence_length", "2048", "--stages.{}.data.tiles_per_sequence", "2")

# Stage, rows of each chip, policy; MaxText's (e591f30, jax 0.10.2, libtpu 0.0.52) million cycles a row and GiB.
SETTINGS = (
    ("instruct", 1, "full", 1156, 3.23),
    ("instruct", 1, "save_qkv", 1047, 4.58),
    ("instruct", 2, "save_dots", 966, 12.98),
    ("align", 1, "full", None, None),
    ("align", 1, "save_qkv", None, None),
    ("align", 2, "save_dots", None, None),
)

VISION_FLOPS = 2 * 577 * 23 * 12 * 1024**2 + 2 * 576 * 3 * 14**2 * 1024
"""Of the tower's products with weights, for one image: 23 layers, and the patches' embedding. Attention is a Pallas
kernel, to which the compiler gives no cycles: neither these nor the tower's cycles count it."""

PEAK = 197e12 / 1.5e9
"""FLOPs of a v5e in a cycle."""


def main() -> None:
    print("| stage | rows/chip | remat | M cycles/row | decoder, loss, optimizer | vision | x its MXU bound | "
          "MaxText | GiB | MaxText | kernels, ms | step, ms | MFU | MFU if no collective waited |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for stage, rows, remat, theirs, their_memory in SETTINGS:
        command = [sys.executable, "-m", "llava_jax.plan", "llava_1_5_7b", "--topology", "v5e-64", "--stage", stage,
                   "--json", *(part.format(stage) for part in ROW), f"--stages.{stage}.remat", remat,
                   *(part for name in ("align", "instruct") for part in
                     (f"--stages.{name}.batch_size", str(64 * rows)))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip())
        plan = json.loads(done.stdout)["stages"][0]
        parts = plan["cycles_by_part"]
        vision = sum(count for part, count in parts.items() if part.startswith("vision"))
        projector = sum(count for part, count in parts.items() if part.startswith("projector"))
        cycles, seconds = plan["cycles"], plan["seconds"]
        unhindered = plan["mfu"] * plan["step_seconds"] / (seconds["cycles"] + seconds["kernels"])
        million = [count / rows / 1e6 for count in (cycles, cycles - vision - projector, vision)]
        print(f"| {stage} | {rows} | {remat} | {million[0]:,.0f} | {million[1]:,.0f} | {million[2]:.2f} | "
              f"{million[2] * 1e6 / (2 * VISION_FLOPS / PEAK):.2f} | {theirs or ''} | "
              f"{plan['memory']['peak'] / GIB:.2f} | "
              f"{their_memory or ''} | {1e3 * seconds['kernels']:.0f} | {1e3 * plan['step_seconds']:.0f} | "
              f"{100 * plan['mfu']:.1f} % | {100 * unhindered:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
