"""Compares tiles (anyres) with one tile on larger pictures, and LoRA with full tuning, in miniature.

    python scripts/ablate_next.py [--out runs/ablate_next] [NAME ...]

Every variant is a run of `python -m llava_jax.train` in a process of its own. A second call trains only variants
without a result. The output is two Markdown tables.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from llava_jax.config import Lora, Recipe, load_recipe

VARIABLE = "LLAVA_JAX_ABLATION"
"""Environment variable with the name of the variant that `recipe` returns."""
TILES = ("tiles", "one tile", "one tile, padded")
LORA = ("full tuning", "LoRA, rank 8", "LoRA, rank 32", "LoRA, rank 8, nf4", "projector alone")


def recipe() -> Recipe:
    """Returns the recipe of a variant. The training process calls it, because this file is its recipe."""
    name = os.environ[VARIABLE]
    base = load_recipe("mini_next" if name in TILES else "mini")
    if name in ("tiles", "full tuning"):
        return base
    instruct = base.stages["instruct"]
    if name in TILES:
        model = dataclasses.replace(base.model, image_mode="pad" if "padded" in name else "resize", pinpoints="")
        data = dataclasses.replace(instruct.data, sequence_length=192, tiles_per_sequence=1)  # one conversation, too
        instruct = dataclasses.replace(instruct, data=data)
    elif "LoRA" in name:
        rank, quantize = int(name.split()[2].rstrip(",")), "nf4" if "nf4" in name else "none"
        model = dataclasses.replace(base.model, lora=Lora(rank=rank, alpha=2.0 * rank, dropout=0.0), quantize=quantize)
        instruct = dataclasses.replace(instruct, learning_rates=(
            (".*/lora_.", 4e-3), ("projector/.*", 1e-3), ("(vision|decoder)/(?!.*/lora_).*", None)))
    else:
        model = base.model
        instruct = dataclasses.replace(instruct, learning_rates=(
            ("projector/.*", 1e-3), ("(vision|decoder)/.*", None)))
    return dataclasses.replace(base, model=model, stages=base.stages | {"instruct": instruct})


def run(name: str, folder: Path) -> None:
    """Trains and scores a variant, and adds the largest memory of its process to its report."""
    command = [sys.executable, "-m", "llava_jax.train", __file__, "--output", str(folder)]
    process = subprocess.Popen(command, env=os.environ | {VARIABLE: name})
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    report = json.loads((folder / "report.json").read_text()) | {"peak_kilobytes": usage.ru_maxrss}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def tiles_row(name: str, folder: Path, report: dict) -> list[str]:
    shares = report["accuracy"]["trained"]
    return [name, *(f"{100 * share:.1f}" for share in shares.values()),
            f"{100 * report['accuracy']['blind']['all']:.1f}", f"{report['visual_tokens']:.0f}",
            f"{report['seconds']['training']:.0f}"]


def lora_row(name: str, folder: Path, report: dict) -> list[str]:
    [*_, last] = sorted((folder / "checkpoints" / "instruct").iterdir(), key=lambda path: int(path.name))
    size = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    trained = trainable_count(name)
    return [name, f"{100 * report['accuracy']['overall']:.1f}", f"{100 * report['unseen_pairs_accuracy']:.1f}",
            f"{trained:,}", f"{8 * trained / 1e6:.2f}", f"{size / 1e6:.2f}", f"{report['peak_kilobytes'] / 1e6:.2f}"]


def trainable_count(name: str) -> int:
    """Returns the number of values that stage 2 of a variant trains."""
    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.train.optimizer import trainable_paths
    from llava_jax.train.setup import model_config, model_layout

    os.environ[VARIABLE] = name
    variant = recipe()
    shapes = model_layout(variant, make_mesh(variant.mesh), model_config(variant.model))[2]
    return sum(shapes[path].size for path in trainable_paths(variant.stages["instruct"], list(shapes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*TILES, *LORA], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate_next"))
    args = parser.parse_args()
    tables: list[list[list[str]]] = [[], []]
    for name in args.names:
        folder = args.out / name.replace(",", "").replace(" ", "_")
        file = folder / "report.json"
        if not file.exists() or "peak_kilobytes" not in json.loads(file.read_text()):
            run(name, folder)
        report = json.loads(file.read_text())
        if name in TILES:
            tables[0] += [["", *report["accuracy"]["trained"], "blind", "visual tokens", "seconds"]] * (not tables[0])
            tables[0].append(tiles_row(name, folder, report))
        else:
            tables[1] += [["", "all", "unseen pairs", "trained values", "optimizer MB", "checkpoint MB",
                           "process GB"]] * (not tables[1])
            tables[1].append(lora_row(name, folder, report))
    for heading, *rows in filter(None, tables):
        print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)))


if __name__ == "__main__":
    main()
