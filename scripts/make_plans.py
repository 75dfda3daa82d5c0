"""Plans the recipes on TPU slices by `python -m llava_jax.plan`, writes configs/plans.json and prints a table.

    python scripts/make_plans.py [--fresh] [--jobs 2] [--only llava_1_5_13b]

A stopped run continues with the same command: plans in the file are not compiled again without --fresh. Some 7B and 13B
programs take minutes. Without --only, plans that are no longer listed here are removed from the file.
"""

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_jax.config import load_recipe
from llava_jax.plan import show

FILE = Path(__file__).parent.parent / "configs" / "plans.json"
GIB = 2**30

SAVE_DOTS = "--stages.align.remat save_dots --stages.instruct.remat save_dots"
TUNED = "--stages.mid.{0} --stages.single_image.{0} --stages.onevision.{0}"
PARTS = "--stages.instruct.gradient_accumulation 16"
ONEVISION_7B = f"--stages.align.remat save_attention {TUNED.format('remat save_attention')}"

PLANS = (
    ("mini", "v5e-4", "", ""),
    ("llava_1_5_7b", "v5e-16", "align: save_dots, 4 parts",
     "--stages.align.remat save_dots --stages.align.gradient_accumulation 4"),
    ("llava_1_5_7b", "v5e-64", "save_dots", SAVE_DOTS),
    ("llava_1_5_7b", "v5e-256x2", "batch_size 512", "--stages.align.batch_size 512 --stages.instruct.batch_size 512"),
    ("llava_1_5_7b", "v6e-32", "save_dots", SAVE_DOTS),
    ("llava_1_5_7b", "v5p-32", "save_dots", SAVE_DOTS),
    ("llava_1_5_7b", "tpu7x-16", "save_dots", SAVE_DOTS),
    ("llava_1_5_13b", "v5e-64", "instruct: save_qkv", "--stages.instruct.remat save_qkv"),
    ("llava_1_5_7b_lora", "v6e-1", "16 parts", PARTS),
    ("llava_1_5_7b_qlora", "v6e-1", "16 parts", PARTS),
    ("llava_next_vicuna_7b", "v5e-32", "", ""),
    ("llava_onevision_qwen2_0_5b", "v5e-16", "tuned stages: 4 parts", TUNED.format("gradient_accumulation 4")),
    ("llava_onevision_qwen2_7b", "v5p-32", "save_attention", ONEVISION_7B),
    ("llava_onevision_qwen2_7b", "v6e-32", "save_attention, tuned stages: 2 parts",
     f"{ONEVISION_7B} {TUNED.format('gradient_accumulation 2')}"),
)
"""Recipe, topology, label for the table, and options."""

LAST_STAGE = ("llava_next", "llava_1_5_7b_")
"""Beginnings of names of recipes of which only the last stage is planned: stage 1 is that of LLaVA-1.5."""
KEPT = ("stage", "fits", "memory", "rows", "tokens", "images", "model_flops", "cycles", "ici_bytes",
        "dcn_bytes", "step_seconds", "step_seconds_range", "seconds", "mfu", "mfu_range", "tokens_per_second_per_chip",
        "images_per_second_per_chip", "steps", "steps_source", "hours", "hours_range")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="compile plans again that are in the file")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel compilations")
    parser.add_argument("--only", default="", help="text that recipe and topology must contain")
    options = parser.parse_args()
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    wanted = {f"{recipe} {topology}": (recipe, topology, flags) for recipe, topology, _, flags in PLANS}
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
    """Plans the stages of a recipe on a slice. Returns the plan, or the text of an error."""
    command = [sys.executable, "-m", "llava_jax.plan", recipe, "--topology", topology, "--json", *flags.split()]
    if recipe.startswith(LAST_STAGE):
        command += ["--stage", list(load_recipe(recipe).stages)[-1]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent.parent)
    if done.returncode > 1:
        return done.stderr.strip()
    found = json.loads(done.stdout)
    stages = [{name: stage[name] for name in KEPT if name in stage} for stage in found["stages"]]
    return {"recipe": recipe, "topology": topology, "flags": flags, "chips": found["chips"], "mesh": found["mesh"],
            "versions": found["versions"], "stages": stages}


def table(plans: dict[str, dict]) -> str:
    """Returns the table of llava_jax/plan/README.md."""
    lines = ["| recipe | slice | flags | stage | memory, GiB | step, s | MFU | tokens/s/chip | hours |",
             "|---|---|---|---|---|---|---|---|---|"]
    labels = {flags: label for _, _, label, flags in PLANS}
    for found in plans.values():
        for stage in found["stages"]:
            memory = stage["memory"]
            cells = [re.sub("^llava_(1_5_)?", "", found["recipe"]), found["topology"], labels[found["flags"]],
                     stage["stage"],
                     f"{memory['peak'] / GIB:.2f} of {memory['limit'] / GIB:.2f}"]
            if stage["fits"]:
                low, high = stage["mfu_range"]
                cells += [show.spread(*stage["step_seconds_range"]), show.spread(100 * low, 100 * high, " %"),
                          f"{stage['tokens_per_second_per_chip']:,.0f}",
                          show.spread(*stage["hours_range"]) if stage["hours"] is not None else ""]
            else:
                cells += ["does not fit", "", "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
