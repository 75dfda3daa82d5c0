"""The whole paper in miniature, on a CPU: pictures of coloured shapes, a tiny CLIP, a tiny LLaMA, both stages.

It is the same code and the same schedule as a 7B run. `prepare` draws the data set and lets the rule-based teacher
write the instructions; `finish` scores the model on held-out pictures and writes report.html and report.json.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import llava_jax
from llava_jax.config import Data, Model, Optimizer, Recipe, Stage

if TYPE_CHECKING:
    from llava_jax.evaluate.runner.baselines import Baseline
    from llava_jax.evaluate.tasks.base import Task
    from llava_jax.inference.llava import Llava

BEGAN = time.perf_counter()
BACKBONES = Path(llava_jax.__file__).parent / "data" / "mini"
TRAIN, VALIDATION, TEST, UNSEEN, PROBE = 10_000, 100, 400, 200, 1_000
"""Pictures. VALIDATION are further ones for the loss; UNSEEN show colour-shape pairs that no training picture has; of
PROBE those are asked about that differ in one answer alone."""


def recipe() -> Recipe:
    data = "runs/mini/data"
    return Recipe(
        model=Model(vision=str(BACKBONES / "vision"), language=str(BACKBONES / "language"),
                    image_mode="crop", template="mistral_instruct"),
        stages={
            "align": Stage(
                learning_rates=(("projector/.*", 5e-3), ("(vision|decoder)/.*", None)),
                data=Data(path=f"{data}/captions.json", validation=f"{data}/captions_validation.json",
                          template="plain", sequence_length=256, tiles_per_sequence=4),
                optimizer=Optimizer(b2=0.98),
                batch_size=8, steps=300, remat="none",
            ),
            "instruct": Stage(
                # A gentler decoder keeps more of what it knew about colour-shape pairs that no picture shows.
                learning_rates=(("projector/.*", 1e-3), ("decoder/.*", 4e-4), ("vision/.*", None)),
                data=Data(path=f"{data}/instructions.json", validation=f"{data}/instructions_validation.json",
                          sequence_length=192, tiles_per_sequence=1),
                optimizer=Optimizer(b2=0.98, clip=1.0),
                batch_size=24, steps=150, remat="none",
            ),
        },
        output="runs/mini",
        log_every=10, validate_every=100, sample_every=150, checkpoint_every=100,
    )


def prepare(recipe: Recipe) -> None:
    """Draws the pictures and writes the data of both stages, the same for every seed, unless they are there."""
    from llava_jax.annotations import drawn_scenes as scenes
    from llava_jax.evaluate.probes.make_probes import ProbesData
    from llava_jax.synthesize import rules
    from llava_jax.train.metrics import read_json_lines

    global BEGAN
    # A run that was stopped has taken time before.
    BEGAN -= sum(line.get("seconds", 0) for line in read_json_lines(Path(recipe.output) / "metrics.jsonl"))
    folder = Path(recipe.stages["align"].data.path).parent
    if not (folder / "probes.jsonl").exists():
        scenes.write(folder, train=0, test=0, probe=PROBE)
        captions, instances = (str(folder / "annotations" / f"{kind}_probe.json") for kind in ("captions", "instances"))
        ProbesData(str(folder), captions, instances, prefix="probe/", each=100).run()
    done = folder / "questions_unseen.jsonl"
    if done.exists():
        return
    print(f"drawing {TRAIN:,} pictures and writing their captions, boxes and instructions to {folder}", flush=True)
    scenes.write(folder, train=TRAIN, test=TEST + VALIDATION, unseen=UNSEEN)
    rules.write_captions(folder, "train", folder / "captions.json")
    rules.write_instructions(folder, "train", folder / "instructions.json")
    for name, write in (("captions", rules.write_captions), ("instructions", rules.write_instructions)):
        whole = folder / f"{name}_validation.json"
        write(folder, "test", whole)
        whole.write_text(json.dumps(json.loads(whole.read_text())[TEST:]))
    rules.write_questions(folder, "test", folder / "questions.jsonl")
    about = [" ".join(pair) for pair in scenes.UNSEEN]
    rules.write_questions(folder, "unseen", done, about=about)


def finish(recipe: Recipe, model: Path) -> None:
    """Puts the held-out questions to the model, to it with the wrong picture, and to the model of stage 1 alone."""
    import jax

    from llava_jax.evaluate.runner.baselines import shown
    from llava_jax.evaluate.runner.generation import ask
    from llava_jax.evaluate.tasks.scenes import Scenes
    from llava_jax.inference.llava import Llava
    from llava_jax.train import report
    from llava_jax.train.setup import load_parameters, setup

    folder, output = Path(recipe.stages["align"].data.path).parent, Path(recipe.output)
    llava = llava_jax.load(model)
    run = setup(recipe)
    aligned = Llava(run.model, load_parameters(run, lambda path: "float32", before="instruct"), run.tokenizer)
    task = Scenes()
    questions = [q for q in task.load(str(folder)) if int(Path(q.row["image"]).stem) <= TEST]
    unseen = task.load(str(folder / "questions_unseen.jsonl"))
    blind = shown("blind", questions, llava.config)
    results = {}
    for name, *asked in (("trained", llava, questions), ("blind", llava, questions, blind),
                         ("stage 1 alone", aligned, questions), ("unseen pairs", llava, unseen)):
        print(f"asking {len(asked[1]):,} questions: {name}", flush=True)
        results[name] = task.score("", asked[1], ask(asked[0], task, asked[1], 64, *asked[2:]))
    scores = {name: {kind: round(value / 100, 4) for kind, value in result.figures.items()}
              for name, result in results.items()}

    probes = probe(llava, str(folder))

    seconds = round(time.perf_counter() - BEGAN, 1)
    cards = []
    answered = list(zip(questions, results["trained"].items, strict=True))
    for image in list(dict.fromkeys(question.images for question in questions))[:24]:
        cards.append((Path(*image), [(question.text, item.reference, item.parsed, item.score == 1)
                                     for question, item in answered if question.images == image]))
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device" + "s" * (jax.device_count() > 1)
    report.write_page(
        output / "report.html", "LLaVA in miniature",
        f"Both stages, evaluation included, took {seconds:.0f} seconds on {devices}. Blind: the same questions with "
        "another picture. Stage 1 alone: the projector trained on captions, the decoder as it came. Unseen pairs: "
        "questions about colour-shape pairs that no training picture shows. Probes: sets of questions that nothing but "
        "the picture answers, the likelier of the possible answers taken; guessing is drawing among these.",
        report.read_metrics(output / "metrics.jsonl"), {"Right answers on held-out pictures": scores, "Probes": probes},
        cards)
    (output / "report.json").write_text(json.dumps({
        "accuracy": scores["trained"],
        "blind_accuracy": scores["blind"]["overall"],
        "stage1_accuracy": scores["stage 1 alone"]["overall"],
        "unseen_pairs_accuracy": scores["unseen pairs"]["overall"],
        "by_kind": {name: scores[name] for name in ("blind", "stage 1 alone", "unseen pairs")},
        "probes": probes,
        "questions": {name: len(result.items) for name, result in results.items()},
        "seconds": seconds,
    }, indent=1) + "\n")

    [picture] = questions[0].images
    answer = llava.generate("Describe the picture in detail.", [picture], max_new_tokens=80)
    for columns in (scores, probes):
        print(f"\n{'right answers, %':<16}" + "".join(f"{name:>18}" for name in columns))
        for kind in next(iter(columns.values())):
            print(f"{kind:<16}" + "".join(f"{100 * column[kind]:18.1f}" for column in columns.values()))
    print(f"\n{picture}: {answer.text}\n\nmodel   {model}\nreport  {output / 'report.html'}\n"
          f"time    {seconds:.0f} s\nchat    python -m llava_jax.generate --model {model} --image {picture}")


def probe(llava: "Llava", folder: str) -> dict[str, dict[str, float]]:
    """Right answers to the probes by kind, 0..1, in English, in Korean, and of the baselines."""
    from llava_jax.evaluate.probes.multilingual import Multilingual
    from llava_jax.evaluate.probes.spatial import Spatial, guessing
    from llava_jax.evaluate.runner.baselines import shown
    from llava_jax.evaluate.runner.generation import choose
    from llava_jax.evaluate.tasks.base import Answer

    def figures(task: "Task", baseline: "Baseline") -> dict[str, float]:
        questions = task.load(folder)
        print(f"asking {len(questions):,} questions: {task.title}, {baseline}", flush=True)
        said = choose(llava, task, questions, 64, shown(baseline, questions, llava.config))
        answers = [Answer(questions[one.number].id, one.text) for one in said]
        return task.score(folder, questions, answers).figures

    # The miniature never saw a question that names its answers.
    english, both = Spatial(name_choices=False), Multilingual(name_choices=False)
    spoken, chance = figures(both, "none"), guessing(english.load(folder))

    def language(code: str) -> dict[str, float]:
        own = {name.removeprefix(f"{code} "): value for name, value in spoken.items() if name.startswith(f"{code} ")}
        return {"all": spoken[code], **own}

    columns = {
        "English": language("en"),
        "another picture": figures(english, "blind"),
        "shuffled patches": figures(english, "shuffled"),
        "Korean": language("ko"),
        "guessing": {"all": spoken["guessing"], **chance, "binding, sets": 25.0},  # both questions about a picture
    }
    return {name: {row: round(column[row] / 100, 4) for row in columns["guessing"]} for name, column in columns.items()}
