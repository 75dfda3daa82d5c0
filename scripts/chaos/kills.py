"""`kills`: training runs that die by SIGKILL, several times each, and go on by the same command to the same bits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import world

CLOCK = ("seconds", "tokens_per_second", "model_flops_per_second", "mfu")
"""Fields of metrics.jsonl that depend on the clock."""
LEFTOVER = re.compile(r"\.model\.|\.tmp|orbax-checkpoint-tmp|lock|\.partial|\.shared-", re.IGNORECASE)
SECONDS = 300
"""Limit of one start."""


def run(folder: Path, count: int, seed: int) -> int:
    """Kills `count` runs; returns 1 if one ends otherwise than the run that was not killed."""
    for make in (world.make_models, world.make_records):
        if (result := forks.attempt(lambda make=make: make(folder), folder, 600)).kind != "ok":
            raise RuntimeError(f"the files could not be made: {result.text}\n{result.output}")
    whole = folder / "whole"
    start_time = time.monotonic()
    code, said = finish(start(folder, whole))
    if code:
        raise RuntimeError(f"the run that is not killed ends with {code}:\n{said[-3000:]}")
    duration = time.monotonic() - start_time
    kills, wrong = 0, 0
    print(f"{'run':>4} {'kills':>6}  moments")
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        output = folder / f"run{number}"
        moments, problems = kill_and_continue(folder, output, rng, duration)
        problems += compare(folder, output, whole)
        kills += len(moments)
        wrong += bool(problems)
        print("\n     WRONG: ".join([f"{number:>4} {len(moments):>6}  {', '.join(moments)}", *problems]), flush=True)
        subprocess.run(["rm", "-r", str(output)], check=True)
    print(f"{count} runs, {kills} kills, seed {seed}: {count - wrong} end bit-identical, {wrong} do not")
    return int(bool(wrong))


def start(folder: Path, output: Path) -> subprocess.Popen:
    """Starts the command that trains; it is the same every time."""
    recipe = folder / f"{output.name}.py"
    if not recipe.exists():
        made = world.make_recipe(folder, output)
        recipe.write_text(f"from llava_jax.config import *\n\n\ndef recipe():\n    return {made!r}\n")
    log = (folder / f"{output.name}.log").open("ab")
    environment = os.environ | {"PYTHONPATH": f"{world.ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([sys.executable, "-m", "llava_jax.train", str(recipe)], env=environment, stdout=log,
                            stderr=log, cwd=folder)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    process.wait(SECONDS)
    log = Path(process.args[-1]).with_suffix(".log")
    return process.returncode, log.read_text(errors="replace")


def kill_and_continue(folder: Path, output: Path, rng: random.Random, duration: float) -> tuple[list[str], list[str]]:
    """Kills a run up to four times, then lets it end; returns the moments of the kills, and what went wrong."""
    moments = []
    planned = rng.randint(2, 4)
    while True:
        process = start(folder, output)
        kind = rng.choice(("time", "saving", "step", "exporting", "exporting")[: 5 if moments else 3])
        moment = wait_for(kind, process, output, rng, duration) if len(moments) < planned else None
        if moment is None:
            code, said = finish(process)
            return moments, [f"exit code {code}: {said[-1500:]}"] if code else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append(moment)


def wait_for(kind: str, process: subprocess.Popen, output: Path, rng: random.Random, duration: float) -> str | None:
    """Waits for a moment to kill; None if the process ends before."""
    deadline = time.monotonic() + (rng.uniform(0, duration) if kind == "time" else SECONDS)
    happened = {"saving": lambda: names_of(output / "checkpoints"), "step": lambda: lines_of(output / "metrics.jsonl"),
                "exporting": lambda: {path.name for path in ls(output) if path.name.startswith(".model")},
                "time": lambda: 0}[kind]
    before, nth = happened(), rng.randint(1, 3)
    while process.poll() is None:
        now = happened()
        if now != before:
            before, nth = now, nth - (kind != "exporting")
            if not nth or kind == "exporting" and now:
                time.sleep(rng.uniform(0, 0.05 if kind == "saving" else 0.01))
                return kind
        if time.monotonic() > deadline:
            return kind
        time.sleep(0.001)
    return None


def ls(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def names_of(folder: Path) -> set[str]:
    """The checkpoints of all stages, those that are being written too."""
    return {f"{stage.name}/{path.name}" for stage in ls(folder) for path in ls(stage)}


def lines_of(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def compare(folder: Path, output: Path, whole: Path) -> list[str]:
    """Everything in which the run differs from the one that was not killed."""
    problems = []
    mine, theirs = list_files(output), list_files(whole)
    problems += [f"{name} is there" for name in sorted(mine - theirs)]
    problems += [f"{name} is missing" for name in sorted(theirs - mine)]
    problems += [f"{path.relative_to(output)} is left over" for path in output.rglob("*") if LEFTOVER.search(path.name)]
    for path in sorted((whole / "model").iterdir()):
        other = output / "model" / path.name
        if other.exists() and other.read_bytes() != path.read_bytes():
            problems.append(f"model/{path.name} differs")
    if read_metrics(output) != read_metrics(whole):
        problems.append("metrics.jsonl differs: steps " + str([(x["stage"], x["step"]) for x in read_metrics(output)]))
    result = forks.attempt(lambda: compare_checkpoints(output, whole), folder, SECONDS)
    if result.kind != "ok":
        return [*problems, f"the checkpoints cannot be compared: {result.text[-1000:]}"]
    return problems + result.text


def list_files(output: Path) -> set[str]:
    """What the directory holds, without the insides of the checkpoints."""
    found = {str(path.relative_to(output)) for path in output.rglob("*")}
    return {"/".join(name.split("/")[:3]) for name in found}


def read_metrics(output: Path) -> list[dict]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def compare_checkpoints(output: Path, whole: Path) -> list[str]:
    """Names the checkpoints whose parameters or optimizer state differ in a bit."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    different = []
    for path in sorted((whole / "checkpoints").glob("*/*/*/")):
        name = path.relative_to(whole)
        if path.name not in ("trainable", "optimizer") or not (output / name).exists():
            continue
        with ocp.StandardCheckpointer() as checkpointer:
            pair = [jax.tree.leaves(checkpointer.restore(place / name)) for place in (output, whole)]
        if not all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in zip(*pair, strict=True)):
            different.append(f"{name} differs")
    return different
