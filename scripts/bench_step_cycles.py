"""Prints the cycles of the train step beside those of MaxText's LLaMA2-7B step, compiled in the same way.

    python scripts/bench_step_cycles.py

LLaVA-1.5-7B on v5e-64, fsdp 64, sequences of 2048 tokens with two images of 336 pixels, by `python -m llava_jax.plan`.
No TPU is needed or used: cycles and bytes are the compiler's (pip install 'llava_jax[plan]').
"""

import json
import subprocess
import sys

GIB = 2**30
SEQUENCE = ("--stages.{}.data.sequence_length", "2048", "--stages.{}.data.tiles_per_sequence", "2")

SETTINGS = (
    ("instruct", 1, "full", 1156, 3.23),
    ("instruct", 1, "save_qkv", 1047, 4.58),
    ("instruct", 2, "save_dots", 966, 12.98),
    ("align", 1, "full", None, None),
    ("align", 1, "save_qkv", None, None),
    ("align", 2, "save_dots", None, None),
)
"""Stage, sequences per chip, remat; then million cycles per sequence and GiB of MaxText (e591f30, jax 0.10.2, libtpu
0.0.52)."""

VISION_FLOPS = 2 * 577 * 23 * 12 * 1024**2 + 2 * 576 * 3 * 14**2 * 1024
"""FLOPs of the tower's products with weights, for one image: 23 layers and the patch embedding. Attention is not
included, because it is a Pallas kernel, for which the compiler gives no cycles."""

FLOPS_PER_CYCLE = 197e12 / 1.5e9
"""FLOPs of a v5e in a cycle."""


def main() -> None:
    print("| stage | per chip | remat | M cycles | MaxText | vision/bound | GiB | MaxText | ms | MFU | MFU* |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for stage, sequences, remat, theirs, their_memory in SETTINGS:
        command = [sys.executable, "-m", "llava_jax.plan", "llava_1_5_7b", "--topology", "v5e-64", "--stage", stage,
                   "--json", *(part.format(stage) for part in SEQUENCE), f"--stages.{stage}.remat", remat,
                   *(part for name in ("align", "instruct") for part in
                     (f"--stages.{name}.batch_size", str(64 * sequences)))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip())
        plan = json.loads(done.stdout)["stages"][0]
        parts, seconds = plan["cycles_by_part"], plan["seconds"]
        vision = sum(count for part, count in parts.items() if part.startswith("vision"))
        overlapped = plan["mfu"] * plan["step_seconds"] / (seconds["cycles"] + seconds["kernels"])
        bound = 2 * sequences * VISION_FLOPS / FLOPS_PER_CYCLE
        print(f"| {stage} | {sequences} | {remat} | {plan['cycles'] / sequences / 1e6:,.0f} | {theirs or ''} | "
              f"{vision / bound:.2f} | {plan['memory']['peak'] / GIB:.2f} | {their_memory or ''} | "
              f"{1e3 * plan['step_seconds']:,.0f} | {100 * plan['mfu']:.1f} % | {100 * overlapped:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
