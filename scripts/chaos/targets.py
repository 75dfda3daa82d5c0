"""The small files that users bring or commands leave, and the commands that read them."""

import contextlib
import dataclasses
import functools
import json
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import world

from llava_jax import convert
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.prepare import __main__ as prepare
from llava_jax.synthesize import __main__ as synthesize

Command = Callable[[Path, Path], object]
"""Called with the copy of the template (where the damaged file is) and the folder of everything else."""


@dataclass(frozen=True)
class Target:
    """A file in a folder of the world, and the commands that read it, one after the other in turns."""

    template: str
    file: str
    commands: tuple[Command, ...]

    @property
    def name(self) -> str:
        return f"{self.template}/{self.question_file}"


def cli(main: Callable, *args: str) -> Command:
    """A command line, in which {} stands for the copy and {world} for the folder of everything else."""
    return lambda copy, everything: main([arg.replace("{world}", str(everything)).replace("{}", str(copy))
                                          for arg in args])


def load(copy: Path, everything: Path) -> None:
    """Opens a model and makes the inputs of a question."""
    import llava_jax

    llava = llava_jax.load(copy)
    llava._prompt(request := _request(everything), *llava._encode(request), llava._tiles(request.images))


def answer(copy: Path, everything: Path) -> str:
    import llava_jax

    return llava_jax.load(copy).generate("What is it?", [everything / "data" / "0_0.png"], max_new_tokens=2).text


def _request(everything: Path):
    from llava_jax.inference.llava import Request

    return Request("What is it?", [str(everything / "data" / "0_0.png")])


def models() -> Iterator[Target]:
    check = cli(prepare.main, "check", "{world}/data/data.json", "--model", "{}", "--workers", "0")
    for template, other in (("hf", "native"), ("own", "hf")):
        commands = (load, cli(convert.main, "{}", "{}/../converted", "--to", other), check,
                    cli(convert.main, "{}", "{}/../converted", "--to", "hf"), answer)
        for path in sorted((everything() / template).iterdir()):
            yield Target(template, path.name, commands)
    again = cli(convert.main, "{}", "{}/../converted", "--to", "hf")
    yield Target("sharded", "model.safetensors.index.json", (load, again))
    yield Target("sharded", "model-00002-of-00004.safetensors", (load, again))
    join = cli(convert.main, "--vision", "{}/vision", "--language", "{}/language", "{}/../joined", "--to", "hf")
    for part in ("vision", "language"):
        for path in sorted((everything() / "parts" / part).iterdir()):
            yield Target("parts", f"{part}/{path.name}", (join, joined_recipe))


def joined_recipe(copy: Path, everything: Path) -> None:
    """What training reads of the parts before its first step."""
    from llava_jax.train.parameters import load_parameters
    from llava_jax.train.setup import setup

    recipe = world.make_recipe(everything, copy.parent / "run")
    model = dataclasses.replace(recipe.model, vision=str(copy / "vision"), language=str(copy / "language"))
    context = setup(dataclasses.replace(recipe, model=model))
    load_parameters(context, lambda path: "float32", before="align")


def continued(copy: Path, everything: Path) -> None:
    """What a continuation reads of the run's small files."""
    from llava_jax.train import inputs, output
    from llava_jax.train.metrics import Log

    recipe = world.make_recipe(everything, everything / "run")
    moved = dataclasses.replace(recipe, output=str(copy))
    output.check_recipe(moved)
    with contextlib.closing(Log(copy, moved)) as log:
        log.rewind("instruct", 2)


    # What this hash is of matters not: that it is as before, or not, does.
    inputs.check_inputs(types.SimpleNamespace(directory=copy), "align", {"data 1: data.json": "0123456789abcdef"})


def locked(copy: Path, everything: Path) -> None:
    """The note of a run that was killed."""
    from llava_jax.train import lock

    lock.LOST_SECONDS = 0.1
    with lock.lock_directory(copy):
        pass


def reported(copy: Path, everything: Path) -> None:
    from llava_jax.train import report

    report.write_page(copy / "report.html", "title", "about", report.read_metrics(copy / "metrics.jsonl"), {}, [])


def training() -> Iterator[Target]:
    yield Target("run", "recipe.json", (continued,))
    yield Target("run", "metrics.jsonl", (continued, reported))
    yield Target("run", "inputs.json", (continued,))
    yield Target("run", ".lock", (locked,))


def data() -> Iterator[Target]:
    for name in ("mixture.json", "data.json", "data.jsonl", "data.parquet"):
        check = cli(prepare.main, "check", f"{{}}/{name}", "--workers", "0", "--model", "{world}/hf")
        sample = cli(prepare.main, "sample", f"{{}}/{name}", "{}/../sample.jsonl", "--count", "3", "--workers", "0")
        pack = cli(prepare.main, "pack", f"{{}}/{name}", "{}/../set", "--workers", "0", "--bad-rows", "skip")
        # A mixture that takes rows more than once is not packed.
        yield Target("data", name, (check, sample) if name == "mixture.json" else (check, sample, pack))
    exclude = cli(prepare.main, "sample", "{world}/data/data.json", "{}/../sample.jsonl", "--count", "3",
                  "--workers", "0", "--exclude", "{}/findings.jsonl")
    yield Target("data", "findings.jsonl", (exclude,))
    check = cli(prepare.main, "check", "{}/set", "--workers", "0")
    for path in sorted((everything() / "packed" / "set").iterdir()):
        yield Target("packed", f"set/{path.name}", (check,))
    again = cli(prepare.main, "pack", "{world}/data/data.json", "{}/set", "--workers", "0", "--shards", "2")
    for path in sorted((everything() / "unfinished" / "set" / ".pack").iterdir()):
        if path.suffix == ".json":
            yield Target("unfinished", f"set/.pack/{path.name}", (again,))


def synthesis() -> Iterator[Target]:
    out, rules = ("--out", "{}/out"), ("--data", "{}/images.jsonl", "--teacher", "rules")
    run = cli(synthesize.main, "run", *rules, *out)
    status, view = (cli(synthesize.main, name, "{}/out") for name in ("status", "view"))
    # The folder of the run has absolute paths in settings.json; those of the world are the same.
    for name, commands in {"settings.json": (status, view, run), "progress.json": (status, run),
                           "manifest.json": (status, run), "answers.jsonl": (run, view, status),
                           "rejected.jsonl": (view, run), "flagged.jsonl": (run,)}.items():
        if (everything() / "synthesis" / "out" / name).exists():
            yield Target("synthesis", f"out/{name}", commands)
    images = ("--data", "{}/images.jsonl", "--model", "teacher", "--prompts", "{}/prompts")
    estimate = cli(synthesize.main, "estimate", *images, "--prices", "{}/prices.json", "--out", "{}/new")
    preview = cli(synthesize.main, "preview", *images, "--dry-run", "--out", "{}/new")
    yield Target("synthesis", "prices.json", (estimate,))
    yield Target("synthesis", "images.jsonl", (estimate, preview, run))
    for name in ("system_message.txt", "000_caps.txt", "000_conv.txt", "questions.txt"):
        yield Target("synthesis", f"prompts/detail_description/{name}", (estimate, preview))
    check = cli(prepare.main, "check", "{}/out/instruct.json", "--workers", "0")
    yield Target("synthesis", "out/instruct.json", (check,))
    coco = ("--captions", "{}/captions.json", "--instances", "{}/instances.json", "--out", "{}/new")
    for name in ("captions.json", "instances.json"):
        yield Target("coco", name, (cli(synthesize.main, "run", "--teacher", "rules", *coco),
                                    cli(synthesize.main, "estimate", "--model", "teacher", *coco)))
    yield Target("batches", "batches.json", (collected,))


def collected(copy: Path, everything: Path) -> None:
    """What the Batch API's notes of an earlier command are read with."""
    from llava_jax.endpoint import batch
    from llava_jax.endpoint.budget import Budget
    from llava_jax.endpoint.cancel import CancelToken

    batch._Batches(types.SimpleNamespace(client=None), None, str(copy), Budget(batch=True), CancelToken(), None)


def benchmarks() -> Iterator[Target]:
    for place in sorted((everything() / "benchmarks").iterdir()):
        options = ("--annotations", "{}/annotations.json") if place.name in world.ANNOTATED else ()
        score = cli(evaluate.main, place.name, "--data", "{}", "--answers", "{}/answers.jsonl", *options)
        partial = cli(evaluate.main, place.name, "--data", "{}", "--answers", "{}/answers.jsonl", "--partial",
                      "--out", "{}/../out", *options)
        for path in sorted(place.iterdir()):
            if path.suffix in (".json", ".jsonl"):
                yield Target(f"benchmarks/{place.name}", path.name, (score, partial))
    compare = (cli(evaluate.main, "compare", "{}/one/scenes", "{}/two/scenes"),
               cli(evaluate.main, "compare", "{}/two/scenes", "{}/one/scenes", "--all"))
    for name in ("results.json", "items.jsonl"):
        yield Target("evaluated", f"one/scenes/{name}", compare)
    again = cli(evaluate.main, "scenes", "--data", "{world}/benchmarks/scenes", "--model", "{world}/hf", "--out",
                "{}/hf")
    for name in ("run.json", "answers.jsonl"):
        yield Target("evaluated", f"hf/scenes/{name}", (again,))
    for name in ("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl", "answers.jsonl", "rule.json"):
        yield Target("judged", name, (judged,))
    yield Target("judged", "reviews_1.jsonl", (cli(evaluate.main, "reviews", "{}/reviews_1.jsonl"),
                                               cli(evaluate.main, "reviews", "{}/reviews_1.jsonl", "--compat")))


def judged(copy: Path, everything: Path) -> object:
    """The judge's inputs, with a judge that says the same to every question."""
    from llava_jax.endpoint.request import Response
    from llava_jax.evaluate.judge.command import JudgeAnswers

    reply = Response("8 7", "stop", 10, 0, 2, "judge", None, 0)
    def answer_all(self, jobs, log):
        for key in dict.fromkeys(job.request(0).key(self.model.model) for job in jobs):
            log.append(key, reply)
        return {}

    JudgeAnswers._ask = answer_all
    return evaluate.main(["judge", "llava-bench-wild", "--data", str(copy), "--answers", str(copy / "answers.jsonl"),
                          "--rules", str(copy / "rule.json"), "--model", "judge", "--out", str(copy / "out")])


_EVERYTHING: list[Path] = []


def everything() -> Path:
    return _EVERYTHING[0]


@functools.cache
def find(folder: Path) -> list[Target]:
    """All targets of the world in `folder`."""
    _EVERYTHING[:] = [folder]
    (folder / "batches").mkdir(exist_ok=True)
    part = {"name": "batch-0123456789abcdef.jsonl", "requests": 1, "worst": 0.1, "fields": ["a"], "since": 1.0,
            "alone": True}
    (folder / "batches" / "batches.json").write_text(json.dumps({"parts": [part]}))
    found = [target for group in (models, training, data, synthesis, benchmarks) for target in group()]
    return [target for target in found if os.path.isfile(folder / target.name)]
