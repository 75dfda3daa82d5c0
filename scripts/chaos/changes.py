"""`data`: the data change between a stop and the continuation: refused by name, harmless, or silently another model."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import forks
import numpy as np
import world

from llava_jax import config
from llava_jax.prepare import __main__ as prepare

FORMATS = {"json": "data.json", "jsonl": "data.jsonl", "parquet": "data.parquet", "mixture": "mixture.json",
           "packed": "set"}
"""The data of a run by format, in the folder `live/data`."""


def edit(path: Path, change: Callable[[list], list]) -> None:
    """Rewrites the rows of a JSON or JSON-lines file."""
    if path.suffix == ".jsonl":
        world.write_lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def swap_letters(rows: list) -> list:
    """The same size, other words."""
    for row in rows:
        for turn in row["conversations"]:
            turn["value"] = turn["value"].replace("red", "der").replace("one", "eno").replace("left", "tfel")
    return rows


def touch(path: Path) -> None:
    os.utime(path, (time.time() + 1000,) * 2)


def pack_again(folder: Path, rows: Callable[[list], list]) -> None:
    source = folder / "source.json"
    shutil.copy(folder / "data.json", source)
    edit(source, rows)
    shutil.rmtree(folder / "set")
    world.run_quietly(prepare.main, "pack", source, folder / "set", "--workers", "0", "--shards", "2",
                      "--image-root", folder)


def rewrite_parquet(folder: Path, change: Callable) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "data.parquet")
    pyarrow.parquet.write_table(change(table), folder / "data.parquet")


def edit_tokenizer(folder: Path) -> None:
    """A tokenizer that starts no text with its mark; the ids are otherwise the same."""
    path = folder.parent / "language" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"add_bos_token": False}))


def other_tokenizer(folder: Path) -> None:
    """The same pieces with two ids exchanged."""
    from llava_jax.weights.tokenizer_files import tokenizer_json

    language = folder.parent / "language"
    spec = tokenizer_json(language / "tokenizer.model", legacy=True)
    vocab = spec["model"]["vocab"]
    a, b = "\u2581the", "\u2581is"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (language / "tokenizer.json").write_text(json.dumps(spec))
    (language / "tokenizer.model").unlink()


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "nothing": ("json", lambda folder: None),
    "rows edited, equal size": ("json", lambda folder: edit(folder / "data.json", swap_letters)),
    "a row appended": ("json", lambda folder: edit(folder / "data.json", lambda rows: [*rows, rows[0]])),
    "a row removed": ("json", lambda folder: edit(folder / "data.json", lambda rows: rows[1:])),
    "rows in another order": ("json", lambda folder: edit(folder / "data.json", lambda rows: rows[::-1])),
    "another file": ("json", lambda folder: shutil.copy(folder / "other.json", folder / "data.json")),
    "mtime only": ("json", lambda folder: touch(folder / "data.json")),
    "file gone": ("json", lambda folder: (folder / "data.json").unlink()),
    "lines edited, equal size": ("jsonl", lambda folder: edit(folder / "data.jsonl", swap_letters)),
    "a line appended": ("jsonl", lambda folder: edit(folder / "data.jsonl", lambda rows: [*rows, rows[0]])),
    "lines in another order": ("jsonl", lambda folder: edit(folder / "data.jsonl", lambda rows: rows[::-1])),
    "parquet rows in another order": ("parquet", lambda folder: rewrite_parquet(
        folder, lambda table: table.take(list(range(len(table)))[::-1]))),
    "parquet row removed": ("parquet", lambda folder: rewrite_parquet(folder, lambda table: table.slice(1))),
    "mixture: part replaced": ("mixture", lambda folder: edit(folder / "data.jsonl", swap_letters)),
    "mixture: another part": ("mixture", lambda folder: (folder / "mixture.json").write_text(
        (folder / "mixture.json").read_text().replace("data.jsonl", "other.json"))),
    "mixture: another count": ("mixture", lambda folder: (folder / "mixture.json").write_text(
        (folder / "mixture.json").read_text().replace('"count": 5', '"count": 6'))),
    "mixture: parts in another order": ("mixture", lambda folder: (folder / "mixture.json").write_text(json.dumps(
        {"mixture": json.loads((folder / "mixture.json").read_text())["mixture"][::-1]}))),
    "packed again, rows edited": ("packed", lambda folder: pack_again(folder, swap_letters)),
    "packed again, a row less": ("packed", lambda folder: pack_again(folder, lambda rows: rows[1:])),
    "packed again, the same": ("packed", lambda folder: pack_again(folder, lambda rows: rows)),
    "tokenizer without bos": ("json", edit_tokenizer),
    "tokenizer with two ids exchanged": ("json", other_tokenizer),
}


def run(folder: Path, count: int, seed: int) -> int:
    """Every change once, `count` times with other data; returns 1 if one goes unnoticed."""
    made = folder / "world"
    made.mkdir()
    for make in (world.make_models, world.make_records):
        if (result := forks.attempt(lambda make=make: make(made), folder, 600)).kind != "ok":
            raise RuntimeError(f"the files could not be made: {result.text}\n{result.output}")
    result = forks.attempt(lambda: work(folder, made, random.Random(seed), count), folder, 3600)
    if result.kind != "ok":
        raise RuntimeError(f"{result.kind}: {result.text}\n{result.output[-3000:]}")
    wrong = 0
    for name, kind, text in result.text:
        wrong += kind in checkpoints.WRONG
        print(f"{kind:10} {name:34} {ascii(text.strip()[-200:])}")
    print(f"{len(result.text)} changes: {len(result.text) - wrong} refused or harmless, {wrong} wrong")
    return int(bool(wrong))


def work(folder: Path, made: Path, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    from conftest import make_data

    from llava_jax.train import loop

    results = []
    for number in range(count):
        pristine, live = folder / f"pristine{number}", folder / "live"
        shutil.copytree(made / "parts", pristine)
        shutil.copytree(made / "data", pristine / "data")
        make_data(pristine / "data", 12, seed=rng.randrange(2**31))
        (pristine / "data" / "set").mkdir()
        pack_again(pristine / "data", lambda rows: rows)
        rows = json.loads((pristine / "data" / "data.json").read_text())
        (pristine / "data" / "other.json").write_text(json.dumps(swap_letters(rows[::-1])))
        for format, file in FORMATS.items():
            chosen = [(name, change) for name, (wanted, change) in CHANGES.items() if wanted == format]
            reset(pristine, live)
            recipe = make_recipe(live, folder / "finished", file)
            shutil.rmtree(folder / "finished", ignore_errors=True)
            shutil.rmtree(folder / "stopped", ignore_errors=True)
            loop.train(recipe)
            expected = checkpoints.read_model(folder / "finished")
            checkpoints.stop_at(loop, 9, dataclasses.replace(recipe, output=str(folder / "stopped")))
            for name, change in chosen:
                reset(pristine, live)
                change(live / "data")
                shutil.rmtree(folder / "changed", ignore_errors=True)
                shutil.copytree(folder / "stopped", folder / "changed")
                results.append((name, *go_on(loop, make_recipe(live, folder / "changed", file), expected)))
    return results


def reset(pristine: Path, live: Path) -> None:
    """The data and parts as they were, with their times."""
    shutil.rmtree(live, ignore_errors=True)
    shutil.copytree(pristine, live)


def make_recipe(live: Path, output: Path, file: str) -> config.Recipe:
    recipe = world.make_recipe(live, output)
    stages = {name: dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=str(live / "data" / file)))
              for name, stage in recipe.stages.items()}
    model = config.Model(vision=str(live / "vision"), language=str(live / "language"))
    return dataclasses.replace(recipe, stages=stages, model=model)


def go_on(loop, recipe: config.Recipe, expected: dict[str, np.ndarray]) -> tuple[str, str]:
    from llava_jax.errors import UserError

    try:
        with contextlib.redirect_stdout(None):
            loop.train(recipe)
    except UserError as error:
        return "noticed", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    found = checkpoints.read_model(Path(recipe.output))
    differ = sum(not np.array_equal(found.get(name), value, equal_nan=True) for name, value in expected.items())
    return ("SILENT", f"{differ} of {len(expected)} tensors differ") if differ else ("harmless", "")
