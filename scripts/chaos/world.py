"""What gets damaged: tiny random models, data and everything that the commands write of them, made on the spot."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The tests' makers of small checkpoints and data serve here as well.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "instruct"), str(ROOT / "tests" / "benchmarks"),
                str(ROOT / "tests" / "preparation")]

from llava_jax import config, convert  # noqa: E402
from llava_jax.evaluate import __main__ as evaluate  # noqa: E402
from llava_jax.prepare import __main__ as prepare  # noqa: E402
from llava_jax.synthesize import __main__ as synthesize  # noqa: E402

ANNOTATED = ("vqav2", "vizwiz")
"""Benchmarks whose ground truth is named by an option."""


def run_quietly(main, *args: str) -> None:
    """Calls a command; RuntimeError with what it wrote if its exit code is not 0."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = main([str(arg) for arg in args])
    if code:
        raise RuntimeError(f"{args}: exit code {code}\n{written.getvalue()}")


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_models(folder: Path) -> None:
    """`parts/vision` and `parts/language`, joined as `hf`, `sharded` and `own`."""
    from conftest import make_parts

    (folder / "parts").mkdir()
    vision, language = make_parts(folder / "parts")
    join = ("--vision", vision, "--language", language, "--template", "vicuna_v1")
    run_quietly(convert.main, *join, folder / "hf", "--to", "hf")
    run_quietly(convert.main, folder / "hf", folder / "sharded", "--to", "hf", "--shard-size", "200KB")
    run_quietly(convert.main, folder / "hf", folder / "own", "--to", "native")


def make_records(folder: Path) -> None:
    """`data`: rows with pictures in several formats, and a mixture of them; `packed`, and `unfinished` of a pack."""
    from conftest import make_data

    from llava_jax.prepare.pack import Pack

    data = folder / "data"
    data.mkdir()
    make_data(data, records=12)
    write_lines(data / "data.jsonl", json.loads((data / "data.json").read_text()))
    parts = [{"path": "data.json", "epochs": 2}, {"path": "data.jsonl", "count": 5, "image_root": "."}]
    (data / "mixture.json").write_text(json.dumps({"mixture": parts}))
    findings = [{"source": str(data / "data.json"), "row": 3, "kind": "broken_image", "usable": False}]
    write_lines(data / "findings.jsonl", findings)
    run_quietly(prepare.main, "sample", data / "data.json", data / "data.parquet", "--count", "12",
                "--workers", "0")
    pack = ("pack", data / "data.json", "--workers", "0", "--shards", "2")
    run_quietly(prepare.main, *pack[:2], folder / "packed" / "set", *pack[2:])
    finish, Pack._finish = Pack._finish, _stop
    with contextlib.suppress(InterruptedError):
        run_quietly(prepare.main, *pack[:2], folder / "unfinished" / "set", *pack[2:])
    Pack._finish = finish


def _stop(*_) -> None:
    raise InterruptedError


def make_recipe(folder: Path, output: Path | str, **changes) -> config.Recipe:
    """Two short stages over the tiny parts and `data` in `folder`."""
    rows = config.Data(path=str(folder / "data" / "data.json"), sequence_length=128, tiles_per_sequence=4)
    stages = {
        "align": config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)),
                              data=rows, batch_size=4, gradient_accumulation=2, steps=4),
        "instruct": config.Stage(learning_rates=(("(projector|decoder)/.*", 1e-3), ("vision/.*", None)),
                                 data=rows, batch_size=4, gradient_accumulation=2, steps=6),
    }
    model = config.Model(vision=str(folder / "parts" / "vision"), language=str(folder / "parts" / "language"))
    options = {"log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 3, "mesh": config.Mesh(fsdp=1)}
    return config.Recipe(model=model, stages=stages, output=str(output), **options | changes)


def make_run(folder: Path) -> None:
    """`run`: the small files of a run that was stopped in its second stage."""
    from llava_jax.train import output
    from llava_jax.train.metrics import Log

    recipe = make_recipe(folder, folder / "run")
    output.write_recipe(recipe)
    (folder / "run" / "inputs.json").write_text(json.dumps({"align": {"data 1: data.json": "0123456789abcdef"}}))
    (folder / "run" / ".lock").write_text(json.dumps({"host": "other", "pid": 1, "since": "2026-01-01 00:00:00"}))
    with contextlib.closing(Log(folder / "run", recipe)) as log:
        for stage, steps in (("align", 4), ("instruct", 3)):
            for step in range(1, steps + 1):
                log.write({"stage": stage, "step": step, "loss": 6.5 / step, "steps": 1, "seconds": 0.5})


def make_synthesis(folder: Path) -> None:
    """`synthesis`: annotations, prompts, prices, and a finished run of the rules in `out`; `coco`: COCO's files."""
    from synthesis_data import write_images, write_prompts
    from test_context import coco

    place = folder / "synthesis"
    place.mkdir()
    images = write_images(place)
    write_prompts(place)
    run_quietly(synthesize.main, "run", "--data", images, "--teacher", "rules", "--out", place / "out")
    rejected = {"id": "000003", "image": "000003.jpg", "kind": "conversation", "reason": "duplicate", "detail": "same",
                "attempts": 1, "answer": "?"}
    write_lines(place / "out" / "rejected.jsonl", [rejected])
    prices = {"teacher": {"prompt": 1, "completion": 4, "cached": 0.1, "batch": 0.5}, "other": {"prompt": 1}}
    (place / "prices.json").write_text(json.dumps(prices))
    (folder / "coco").mkdir()
    for name, content in zip(("captions.json", "instances.json"), coco(), strict=True):
        (folder / "coco" / name).write_text(json.dumps(content))


def make_benchmarks(folder: Path) -> None:
    """`benchmarks/NAME`: questions, ground truth and `answers.jsonl`; `judged`; `evaluated`: runs of two models."""
    from bench_files import FILES, QUESTIONS, write
    from test_llava_bench import answers_of, questions_of, review

    from llava_jax.evaluate.runner.answer_file import make_line
    from llava_jax.evaluate.tasks.base import get_task

    scenes = [row | {"answer": "red", "kind": "colour", "image": "0_0.png"} for row in QUESTIONS]
    files = FILES | {"scenes": {"questions.jsonl": scenes}, "mm-vet": {"llava-mm-vet.jsonl": QUESTIONS}}
    for name, contents in files.items():
        place = folder / "benchmarks" / name
        place.mkdir(parents=True)
        for file, content in contents.items():
            write(place / file, content)
        task = get_task(name)(**{"annotations": str(place / "annotations.json")} if name in ANNOTATED else {})
        lines = [make_line(question, "red", "one") for question in task.load(str(place))]
        write_lines(place / "answers.jsonl", lines)
    place = folder / "benchmarks" / "scenes"
    shutil.copy(folder / "data" / "0_0.png", place)
    for name in ("one", "two"):
        run_quietly(evaluate.main, "scenes", "--data", place, "--answers", place / "answers.jsonl", "--name", name,
                    "--out", folder / "evaluated" / name)
    run_quietly(evaluate.main, "scenes", "--data", place, "--model", folder / "hf", "--out",
                folder / "evaluated" / "hf")

    place = folder / "judged"
    write_lines(place / "questions.jsonl", questions_of())
    references = [{"question_id": n, "text": f"R{n}", "answer_id": f"r{n}"} for n in range(6)]
    write_lines(place / "answers_gpt4.jsonl", references)
    write_lines(place / "context.jsonl", [{"id": n, "image": f"{n:03d}.jpg", "caption": "One."} for n in range(2)])
    write_lines(place / "answers.jsonl", [{**answer.line, "prompt": answer.prompt} for answer in answers_of()])
    rules = {f"llava_bench_{kind}": {"role": "Assistant", "prompt": "Rate."} for kind in ("conv", "detail", "complex")}
    (place / "rule.json").write_text(json.dumps(rules))
    write_lines(place / "reviews_1.jsonl", [review(n, [8, 7]) for n in range(6)])


def make(folder: Path) -> str:
    """Everything."""
    make_models(folder)
    make_records(folder)
    make_run(folder)
    make_synthesis(folder)
    make_benchmarks(folder)
    return "made"
