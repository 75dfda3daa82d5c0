"""Ablates the miniature: trains its recipe without one part, and with other seeds.

    python scripts/ablate_mini.py [--out runs/ablations] [NAME ...]

Every variant is a run of configs/mini.py with overrides, in a process of its own. A second call trains only variants
without a report.json. The output is a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

KINDS = ("colour", "shape", "count", "position", "relation", "existence")
VARIANTS = {
    "as it is": [],
    "seed 1": ["--seed", "1"],
    "seed 2": ["--seed", "2"],
    "linear projector": ["--model.projector", "linear"],
    # One step with a negligible learning rate: the projector starts stage 2 with its initial weights.
    "without stage 1": ["--stages.align.steps", "1", "--stages.align.learning-rates",
                        "projector/.*", "1e-30", "(vision|decoder)/.*", "None"],
    "random vision tower": ["--model.vision", "{out}/random_vision"],
}


def write_random_vision(folder: Path) -> None:
    """Writes the miniature's vision tower with random weights, in Hugging Face's layout."""
    import shutil

    import numpy as np
    from safetensors.numpy import load_file, save_file

    import llava_jax
    source = Path(llava_jax.__file__).parent / "data" / "mini" / "vision"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = load_file(source / "model.safetensors")
    # Matrices with the spread of the trained ones, so that only what was learned is gone; norms and biases stay.
    drawn = {name: rng.normal(0, x.std(), x.shape).astype(x.dtype) if x.ndim > 1 else x for name, x in tensors.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    columns = ("all", *KINDS, "blind", "stage 1 alone", "unseen pairs")
    rows = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in args.names:
        folder = args.out / name.replace(" ", "_")
        if not (folder / "report.json").exists():
            if name == "random vision tower":
                write_random_vision(args.out / "random_vision")
            overrides = [word.format(out=args.out) for word in VARIANTS[name]]
            command = [sys.executable, "-m", "llava_jax.train", "mini", "--output", str(folder), *overrides]
            subprocess.run(command, check=True)
        report = json.loads((folder / "report.json").read_text())
        shares = [report["accuracy"][kind] for kind in ("overall", *KINDS)]
        shares += [report[f"{part}_accuracy"] for part in ("blind", "stage1", "unseen_pairs")]
        rows.append(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
