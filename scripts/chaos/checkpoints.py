"""`checkpoints`: a run's checkpoints are damaged before it goes on: noticed, harmless, or silently another model."""

import contextlib
import json
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path

import forks
import mutations
import numpy as np
import world

SECONDS = 180
"""Limit of one continuation."""
KINDS = ("noticed", "fell back", "harmless", "SILENT", "traceback", "hang", "died")
WRONG = ("SILENT", "traceback", "hang", "died")


def run(folder: Path, count: int, seed: int, number: int | None) -> int:
    """Goes on from `count` damaged copies of a run; returns 1 if a damage went unnoticed, or ended in a traceback."""
    made, log = folder / "world", folder / "log.jsonl"
    made.mkdir()
    for make in (world.make_models, world.make_records):
        if (result := forks.attempt(lambda make=make: make(made), folder, 600)).kind != "ok":
            raise RuntimeError(f"the files could not be made: {result.text}\n{result.output}")
    numbers = list(range(count)) if number is None else [number]
    results: dict[int, tuple[str, str, str]] = {}
    shown = 0
    while len(results) < len(numbers):
        left = [n for n in numbers if n not in results]
        begun = _run_worker(lambda left=left: work(folder, made, log, seed, left), log, results)
        if begun is not None and begun not in results:
            results[begun] = "hang", f"try {begun}", "ended by the time limit, or by itself"
        elif not log.exists() or begun is None and len(results) < len(numbers):
            raise RuntimeError(f"the undamaged run failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
        for n, (kind, what, text) in list(results.items())[shown:]:
            if kind in WRONG:
                print(f"{kind:10} --try {n}: {what}: {ascii(text[-300:])}", flush=True)
        shown = len(results)
    counts = Counter(kind for kind, _, _ in results.values())
    print(f"{len(results)} damages, seed {seed}: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    by_damage = Counter((what.split()[0], kind) for kind, what, _ in results.values())
    for (damage, kind), number in sorted(by_damage.items()):
        print(f"  {damage:10} {kind:10} {number}")
    return int(any(counts[kind] for kind in WRONG))


def _run_worker(work, log: Path, results: dict) -> int | None:
    """Runs a worker to its end and reads its log; returns the try that it had begun last."""
    log.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    os.waitpid(pid, 0)
    begun = None
    for line in log.read_text().splitlines() if log.exists() else ():
        n, *result = json.loads(line)
        begun = n
        if result:
            results[n] = tuple(result)
    return begun


def work(folder: Path, made: Path, log: Path, seed: int, numbers: list[int]) -> None:
    """In a process of its own: trains undamaged, then goes on from one damaged copy after the other."""
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    try:
        from llava_jax.train import loop, stage

        # One compilation serves all continuations: their recipes differ in the output directory alone.
        compiled = {}
        original = stage.make_train_step

        def make_train_step(graph, tx, state, seed):
            key = str(sorted(state.trainable))
            if key not in compiled:
                compiled[key] = original(graph, tx, state, seed)
            return compiled[key]

        stage.make_train_step = make_train_step
        shutil.rmtree(folder / "runs", ignore_errors=True)
        runs = folder / "runs"
        bases = {"stopped": runs / "stopped", "finished": runs / "finished"}
        loop.train(world.make_recipe(made, bases["finished"]))
        expected = read_model(bases["finished"])
        shutil.rmtree(bases["finished"] / "model")
        stop_at(loop, 9, world.make_recipe(made, bases["stopped"]))
    except BaseException:
        traceback.print_exc()
        raise
    for n in numbers:
        with log.open("a") as file:
            file.write(json.dumps([n]) + "\n")
        rng = random.Random(f"{seed} {n}")
        shutil.rmtree(runs / "damaged", ignore_errors=True)
        base = rng.choice(("stopped", "stopped", "finished"))
        shutil.copytree(bases[base], runs / "damaged")
        what = f"{damage(runs / 'damaged' / 'checkpoints', rng)} ({base})"
        os.ftruncate(1, 0), os.lseek(1, 0, os.SEEK_SET)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        kind, text = go_on(loop, made, runs / "damaged", expected)
        signal.alarm(0)
        with log.open("a") as file:
            file.write(json.dumps([n, kind, what, text]) + "\n")


def stop_at(loop, step: int, recipe) -> None:
    """Trains up to the `step`-th step, where the machine is gone."""
    from llava_jax.train import batches

    original, count = batches.shard_batch, [0]

    def shard_batch(*arguments):
        count[0] += 1
        if count[0] == step:
            raise InterruptedError
        return original(*arguments)

    batches.shard_batch = shard_batch
    with contextlib.suppress(InterruptedError):
        loop.train(recipe)
    batches.shard_batch = original


def go_on(loop, made: Path, output: Path, expected: dict) -> tuple[str, str]:
    """How the continuation of a damaged run ends."""
    from llava_jax.errors import UserError

    try:
        loop.train(world.make_recipe(made, output))
    except UserError as error:
        return "noticed", str(error)
    except BaseException:
        return "traceback", traceback.format_exc()
    said = Path(f"/proc/self/fd/{1}").read_text(errors="replace")
    found = read_model(output)
    differ = [name for name in expected if not np.array_equal(found.get(name), expected[name], equal_nan=True)]
    steps = [(line["stage"], line["step"]) for line in
             map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    if differ or found.keys() != expected.keys():
        return "SILENT", f"{len(differ)} of {len(expected)} tensors differ"
    if steps != [("align", n) for n in range(1, 5)] + [("instruct", n) for n in range(1, 7)]:
        return "SILENT", f"metrics.jsonl has the steps {steps}"
    return ("fell back" if "checkpoints/" in said else "harmless"), said


def read_model(output: Path) -> dict[str, np.ndarray]:
    """Every tensor of the exported model."""
    from safetensors.numpy import load_file

    found = {}
    for path in (output / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file (or two) of the checkpoints, mostly of those that the continuation reads."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    read = [path for path in files if path.relative_to(folder).parts[1] in ("4", "6")]
    path = rng.choice(read if rng.random() < 0.8 else files)
    name = path.relative_to(folder)
    kind = rng.choice(("flip", "flip", "flip", "truncate", "delete", "swap", "zero", "append"))
    if kind == "delete":
        path.unlink()
        return f"delete {name}"
    if kind == "swap":
        other = rng.choice([other for other in files if other != path])
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second), other.write_bytes(first)
        same = " (equal)" if first == second else ""
        return f"swap {name} and {other.relative_to(folder)}{same}"
    change = {"flip": mutations.flip, "truncate": mutations.truncate, "zero": mutations.zero,
              "append": mutations.append}[kind]
    content = path.read_bytes()
    if not content:
        return f"none: {name} is empty"
    changed, what = change(content, rng)
    path.write_bytes(changed)
    return f"{kind} {name}: {what}"
