"""`files`: damages of each small file; the command that reads it must succeed, or say what is wrong in one line."""

import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import forks
import mutations
import targets
import world
from forks import Result
from targets import Target

SECONDS = 60
UNSAFE = [chr(code) for code in (*range(9), *range(11, 13), *range(14, 32), 127, 0x202E, 0x202D, 0x2066)]
"""Characters that no command may print raw, for a terminal obeys them. A carriage return is a progress bar's."""


def run(folder: Path, count: int, seed: int, only: str, number: int | None, jobs: int) -> int:
    """Damages `count` files in all; prints how their readers take it. Returns 1 if one does wrong."""
    made = folder / "world"
    made.mkdir()
    result = forks.attempt(lambda: world.make(made), folder, 600)
    if result.kind != "ok":
        raise RuntimeError(f"the files could not be made: {result.text}\n{result.output}")
    chosen = [target for target in targets.find(made) if only in target.name]
    warm_up()
    if not chosen:
        raise SystemExit(f"no file has {only!r} in its name")
    broken = check_undamaged(folder, made, chosen) if number is None else 0
    numbers = range(-(-count // len(chosen))) if number is None else [number]
    tries = [(target, n) for n in numbers for target in chosen]
    done, wrong = defaultdict(Counter), []
    started = {}

    def calls():
        for place, (target, n) in enumerate(tries):
            copy = folder / f"{place}" / target.template
            shutil.copytree(made / target.template, copy)
            what = mutations.mutate(copy / target.file, random.Random(f"{seed} {target.name} {n}"))
            started[copy.parent if "/" not in target.template else copy.parents[1]] = target, n, what
            command = target.commands[n % len(target.commands)]
            yield lambda copy=copy, command=command: command(copy, made), folder / f"{place}"

    for place, result in forks.attempt_all(calls(), SECONDS, jobs):
        target, n, what = started.pop(place)
        kind = judge(target, result, place)
        done[target.name][kind] += 1
        if kind not in ("ok", "told"):
            wrong.append((kind, target, n, what, result))
            print(describe(*wrong[-1]), flush=True)
        shutil.rmtree(place)
    return report(done, wrong, seed) or int(broken > 0)


def check_undamaged(folder: Path, made: Path, chosen: list[Target]) -> int:
    """Runs every command on files that are right; counts those that fail, whose tries say little."""
    commands = {(target.template, id(command)): (target, command) for target in chosen for command in target.commands}
    failed = 0
    for target, command in commands.values():
        copy = folder / "right" / target.template
        shutil.copytree(made / target.template, copy)
        result = forks.attempt(lambda copy=copy, command=command: command(copy, made), folder / "right", SECONDS)
        if result.kind != "ok" or judge(target, result, copy) == "raw":
            print(f"{target.name} is right, and yet: {result}", flush=True)
            failed += 1
        shutil.rmtree(folder / "right")
    return failed


def warm_up() -> None:
    """Imports what the commands import, once for all forks; starts no thread and no device."""
    import transformers  # noqa: F401

    import llava_jax.data.pipeline
    import llava_jax.evaluate.judge.command
    import llava_jax.evaluate.runner.compare
    import llava_jax.evaluate.runner.generation
    import llava_jax.inference.llava
    import llava_jax.prepare.check
    import llava_jax.synthesize.running
    import llava_jax.train.loop
    import llava_jax.train.report  # noqa: F401


def judge(target: Target, result: Result, place: Path) -> str:
    """The result's kind; "nameless" if a message does not say which file or folder, "raw" if a terminal would obey."""
    if result.kind == "told":
        names = (target.file, Path(target.file).name, str(place), str(Path(target.file).stem))
        if not any(name in result.text for name in names):
            return "nameless"
    if any(character in result.output for character in UNSAFE):
        return "raw"
    return result.kind


def describe(kind: str, target: Target, number: int, what: str, result: Result) -> str:
    text = result.text if kind != "raw" else ascii(result.output)
    end = [line for line in str(text).splitlines() if line.strip()]
    where = [line.strip() for line in end if line.strip().startswith("File") and "llava_jax" in line]
    last = " <- ".join([end[-1] if end else "", *where[-2:][::-1]])[:500]
    return f"{kind:9} {target.name} --try {number}: {what.encode('unicode_escape').decode()[:160]}: {ascii(last)}"


def report(done: dict[str, Counter], wrong: list, seed: int) -> int:
    kinds = ("ok", "told", "nameless", "raw", "traceback", "memory", "hang", "died")
    print(f"\n{'file':52}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, counts in done.items():
        if set(counts) - {"ok", "told"}:
            print(f"{name:52}" + "".join(f"{counts[kind] or '':>10}" for kind in kinds))
    total = sum(done.values(), Counter())
    print(f"{f'{len(done)} files, seed {seed}':52}" + "".join(f"{total[kind]:>10}" for kind in kinds))
    return int(bool(wrong))
