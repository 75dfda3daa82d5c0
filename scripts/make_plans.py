"""Writes configs/plans.json: what the recipes take on TPU slices, by `python -m llava_jax.plan`; prints it as a table.

    python scripts/make_plans.py [--fresh] [--jobs 2] [--only llava_1_5_13b]

A stopped run goes on where it was: what is in the file is not compiled again without --fresh. Some 7B and 13B programs
take minutes. Without --only, plans that are no longer listed here leave the file.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = Path(__file__).parent.parent / "configs" / "plans.json"
GIB = 2**30

SAVE_DOTS = "--stages.align.remat save_dots --stages.instruct.remat save_dots"

# Recipe, topology, and the flags with which it runs there.
PLANS = (
    ("mini", "v5e-4", ""),
    ("llava_1_5_7b", "v5e-16", "--stages.align.remat save_dots --stages.align.gradient_accumulation 4"),
    ("llava_1_5_7b", "v5e-64", SAVE_DOTS),
    ("llava_1_5_7b", "v5e-256x2", "--stages.align.batch_size 512 --stages.instruct.batch_size 512"),
    ("llava_1_5_7b", "v6e-32", SAVE_DOTS),
    ("llava_1_5_7b", "v5p-32", SAVE_DOTS),
    ("llava_1_5_7b", "v4-64", SAVE_DOTS),
    ("llava_1_5_7b", "tpu7x-16", SAVE_DOTS),
    ("llava_1_5_13b", "v5e-64", "--stages.instruct.remat save_qkv"),
    ("llava_1_5_13b", "v6e-32", "--stages.instruct.remat save_qkv"),
)
KEPT = ("stage", "fits", "memory", "rows", "tokens", "images", "model_flops", "cycles", "hardware_flops", "hbm_bytes",
        "ici_bytes", "dcn_bytes", "step_seconds", "seconds", "mfu", "tokens_per_second_per_chip",
        "images_per_second_per_chip", "steps", "steps_source", "hours")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="compile what is in the file too")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at one time")
    parser.add_argument("--only", default="", help="plans whose recipe and topology contain this text alone")
    options = parser.parse_args()
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    wanted = {f"{recipe} {topology}": (recipe, topology, flags) for recipe, topology, flags in PLANS}
    plans = {key: plan for key, plan in before.items() if key in wanted and plan["flags"] == wanted[key][2]}
    chosen = [key for key in wanted if options.only in key and (options.fresh or key not in plans)]
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for key, found in zip(chosen, pool.map(lambda key: plan(*wanted[key]), chosen), strict=True):
            if isinstance(found, str):
                print(f"{key}: {found}", file=sys.stderr)
                failed = True
                continue
            plans[key] = found
            # After each one, so that a stopped run loses nothing; in the order above.
            partial = FILE.with_suffix(".partial")
            partial.write_text(json.dumps({key: plans[key] for key in wanted if key in plans}, indent=1) + "\n")
            partial.replace(FILE)
            print(f"{key}: planned", file=sys.stderr, flush=True)
    print(table({key: plans[key] for key in wanted if key in plans}))
    return 1 if failed else 0


def plan(recipe: str, topology: str, flags: str) -> dict | str:
    """One recipe's stages on a slice, or the error."""
    command = [sys.executable, "-m", "llava_jax.plan", recipe, "--topology", topology, "--json", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent.parent)
    if done.returncode > 1:
        return done.stderr.strip()
    found = json.loads(done.stdout)
    stages = [{name: stage[name] for name in KEPT if name in stage} for stage in found["stages"]]
    return {"recipe": recipe, "topology": topology, "flags": flags, "chips": found["chips"], "mesh": found["mesh"],
            "versions": found["versions"], "stages": stages}


def table(plans: dict[str, dict]) -> str:
    """In Markdown, as in the README."""
    lines = ["| recipe | slice | flags | stage | memory, GiB | step, s | MFU | tokens/s/chip | hours |",
             "|---|---|---|---|---|---|---|---|---|"]
    for found in plans.values():
        for stage in found["stages"]:
            memory = stage["memory"]
            cells = [found["recipe"], found["topology"], found["flags"] and f"`{found['flags']}`", stage["stage"],
                     f"{memory['peak'] / GIB:.2f} of {memory['limit'] / GIB:.2f}"]
            if stage["fits"]:
                hours = f"{stage['hours']:.2f}" if stage["hours"] is not None else ""
                cells += [f"{stage['step_seconds']:.3f}", f"{100 * stage['mfu']:.1f} %",
                          f"{stage['tokens_per_second_per_chip']:,.0f}", hours]
            else:
                cells += ["does not fit", "", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
