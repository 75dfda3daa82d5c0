"""Kills, damages and mutations: what training and the commands survive, tried at random, seeded, and counted.

    JAX_PLATFORMS=cpu python scripts/chaos kills|checkpoints|data|files [--count N] [--seed S]

- `kills`: training runs that are killed several times at random moments, also while they save and export, and go on
  by the same command. All must end with the bits of a run that was not killed, every step once in metrics.jsonl, and
  no leftovers.
- `checkpoints`: damages of a run's checkpoints before it goes on. Each must be noticed or change nothing.
- `data`: changes of the data between a stop and the continuation. Each must be refused by name or change nothing.
- `files`: damages of each small file that a command reads. It must succeed, or say what is wrong in one line that
  names the file, within 2 GB. `--only NAME` picks files, `--try N` repeats one try.

Everything is made on the spot, below one temporary folder. The exit code is 1 if anything went wrong.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

COUNTS = {"kills": 20, "checkpoints": 300, "data": 1, "files": 2000}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python scripts/chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COUNTS)
    parser.add_argument("--count", type=int, help=f"how many tries; by default {COUNTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="tries at the same time")
    parser.add_argument("--only", default="", help="files: those whose name has this text")
    parser.add_argument("--try", type=int, dest="number", help="files, checkpoints: the try of this number alone")
    options = parser.parse_args()
    count = options.count or COUNTS[options.command]
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name).resolve()
        if options.command == "files":
            import small_files

            return small_files.run(folder, count, options.seed, options.only, options.number, options.jobs)
        if options.command == "checkpoints":
            import checkpoints

            return checkpoints.run(folder, count, options.seed, options.number)
        if options.command == "kills":
            import kills

            return kills.run(folder, count, options.seed)
        import changes

        return changes.run(folder, count, options.seed)


if __name__ == "__main__":
    sys.exit(main())
