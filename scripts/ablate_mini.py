"""Ablates the miniature. Every run is a process of its own, of as many steps but "without stage 1".

    python scripts/ablate_mini.py [--out runs/ablations] [parts] [korean] [places]

- parts: the recipe without one part, and with other seeds.
- korean: the share of Korean instructions, against probes in English and in Korean.
- places: three mends of seeing an image as a bag of patches, each alone and together: questions about the places of
  three objects in the data ("as it is"), a projector that joins 2 x 2 patches, and tiles (anyres, at twice the size).

A second call trains only variants without a report.json. The output is a Markdown table for each name.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import llava_jax
from llava_jax.config import Recipe, load_recipe

VARIABLE, RANDOM_TOWER = "LLAVA_JAX_ABLATION", "LLAVA_JAX_RANDOM_TOWER"
"""Environment variables: the name of the variant that `recipe` returns, and the folder of the random vision tower."""
PROBES = ("all", "left/right", "above/below", "between", "order", "counting", "binding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(TABLES)):
        parser.error(f"no table {unknown[0]}")
    for name in args.names or TABLES:
        variants, row = TABLES[name]
        rows = [dict(row(train(variant, args.out))) for variant in variants]
        print(f"\n| {name} | " + " | ".join(rows[0]) + " |\n" + "|---" * (len(rows[0]) + 1) + "|")
        for variant, shares in zip(variants, rows, strict=True):
            print(f"| {variant} | " + " | ".join(f"{100 * share:.1f}" for share in shares.values()) + " |")


def train(variant: str, out: Path) -> dict[str, Any]:
    """Trains a variant, unless its report is there, and returns its report."""
    folder, tower = out / variant.replace(" ", "_"), out / "random_vision"
    if not (folder / "report.json").exists():
        if variant == "random vision tower":
            write_random_tower(tower)
        command = [sys.executable, "-m", "llava_jax.train", __file__, "--output", str(folder)]
        subprocess.run(command, check=True, env=os.environ | {VARIABLE: variant, RANDOM_TOWER: str(tower)})
    return json.loads((folder / "report.json").read_text())


def recipe() -> Recipe:
    """Returns the recipe of a variant. The training process calls it, because this file is its recipe."""
    name, mini = os.environ[VARIABLE], load_recipe("mini")
    if name.startswith("seed "):
        return replace(mini, seed=int(name.removeprefix("seed ")))
    if name.endswith("% Korean"):
        return replace(mini, korean=int(name.split()[0]) / 100)
    match name:
        case "as it is":
            return mini
        case "no mend":
            return replace(mini, places=False)
        case "2 x 2":
            return join_patches(replace(mini, places=False))
        case "tiles":
            return add_tiles(replace(mini, places=False))
        case "all three":
            return join_patches(add_tiles(mini))
        case "linear projector":
            return replace(mini, model=replace(mini.model, projector="linear"))
        case "random vision tower":
            return replace(mini, model=replace(mini.model, vision=os.environ[RANDOM_TOWER]))
        case "without stage 1":
            # One step with a negligible learning rate: the projector starts stage 2 with its initial weights.
            rates = (("projector/.*", 1e-30), ("(vision|decoder)/.*", None))
            align = replace(mini.stages["align"], steps=1, learning_rates=rates)
            return replace(mini, stages=mini.stages | {"align": align})
    raise ValueError(name)


def join_patches(mini: Recipe) -> Recipe:
    return replace(mini, model=replace(mini.model, projector="merge2x2_mlp2x_gelu"))


def add_tiles(mini: Recipe) -> Recipe:
    """Returns the recipe with five tiles of each picture in stage 2: one of all, and four of its quarters."""
    align, instruct = mini.stages["align"], mini.stages["instruct"]
    side = 120  # of the canvas: twice the picture's
    more = 4 * 36 + 12  # visual tokens: those of four tiles, and a newline after each row
    images = instruct.data.tiles_per_sequence  # of a row
    newline_rate = dict(instruct.learning_rates)["projector/.*"]
    stages = {
        "align": replace(align, learning_rates=(*align.learning_rates, ("image_newline", None)),
                         data=replace(align.data, image_mode="crop")),
        "instruct": replace(instruct, learning_rates=(*instruct.learning_rates, ("image_newline", newline_rate)),
                            data=replace(instruct.data, sequence_length=instruct.data.sequence_length + images * more,
                                         tiles_per_sequence=5 * images))}
    model = replace(mini.model, image_mode="anyres", pinpoints=f"({side}x{side})")
    return replace(mini, model=model, stages=stages)


def write_random_tower(folder: Path) -> None:
    """Writes the miniature's vision tower with random weights, in Hugging Face's layout."""
    source = Path(llava_jax.__file__).parent / "data" / "mini" / "vision"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = load_file(source / "model.safetensors")
    # Matrices with the spread of the trained ones, so that only what was learned is gone; norms and biases stay.
    drawn = {name: rng.normal(0, x.std(), x.shape).astype(x.dtype) if x.ndim > 1 else x for name, x in tensors.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})


def parts_row(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from report["accuracy"].items()
    for part in ("blind", "stage1", "unseen_pairs"):
        yield part.replace("_", " "), report[f"{part}_accuracy"]


def korean_row(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield "questions", report["accuracy"]["overall"]
    yield "English probes", report["probes"]["English"]["all"]
    for kind in PROBES:
        yield f"Korean: {kind}", report["probes"]["Korean"][kind]


def places_row(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for kind in PROBES:
        yield kind, report["probes"]["English"][kind]
    yield "shuffled: all", report["probes"]["shuffled patches"]["all"]
    yield "questions", report["accuracy"]["overall"]


TABLES = {
    "parts": (
        ("as it is", "seed 1", "seed 2", "linear projector", "without stage 1", "random vision tower"), parts_row),
    "korean": (("as it is", "10 % Korean", "25 % Korean", "50 % Korean"), korean_row),
    "places": (("no mend", "as it is", "2 x 2", "tiles", "all three"), places_row),
}

if __name__ == "__main__":
    main()
