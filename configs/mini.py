"""LLaVA in miniature, on a CPU: pictures of coloured shapes, a tiny CLIP, a tiny LLaMA, and both stages of the paper.

It runs the same code and the same schedule as a 7B run. `prepare` draws the data set, for which the rule-based teacher
writes instructions. `finish` scores the model on held-out pictures and writes report.html and report.json.
"""

import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import llava_jax
from llava_jax.config import Data, Model, Optimizer, Recipe, Stage
from llava_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.evaluate.runner.baselines import Baseline
    from llava_jax.evaluate.tasks.base import Task
    from llava_jax.inference.llava import Llava
    from llava_jax.train.report import Chat

BACKBONES = Path(llava_jax.__file__).parent / "data" / "mini"
TRAIN, VALIDATION, TEST, UNSEEN, PROBE = 10_000, 100, 400, 200, 1_000
"""Number of pictures of each set. VALIDATION is for the loss. UNSEEN shows colour-shape pairs that no training picture
has. Pairs of PROBE differ in the answer to one question."""
SUMMARY = (
    "Blind: the same questions with another picture. Stage 1 alone: the projector trained on captions, the decoder as "
    "it came. Unseen pairs: questions about colour-shape pairs that no training picture shows. Probes: sets of "
    "questions that only the picture answers; the likelier of the possible answers counts, and guessing draws one.")


@dataclass(frozen=True)
class MiniRecipe(Recipe):
    """The miniature with its data and its evaluation."""

    korean: float = 0.0
    """Fraction of the conversations of stage 2 that are in Korean."""
    places: bool = True
    """Whether the short questions of stage 2 ask about the places of three objects: between, and their order."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.korean <= 1:
            raise UserError(f"korean is {self.korean:g}; it is a fraction from 0 to 1")
        # Each choice of instructions is a file of its own, beside the same pictures. A user's own path stays.
        stage = self.stages["instruct"]
        path = Path(stage.data.path)
        if path.parent == self.data and re.fullmatch(r"instructions(_[\d.]+_korean)?(_pairs)?\.json", path.name):
            share = f"_{100 * self.korean:g}_korean" if self.korean else ""
            own = path.with_name(f"instructions{share}{'' if self.places else '_pairs'}.json")
            stage = replace(stage, data=replace(stage.data, path=str(own)))
            object.__setattr__(self, "stages", self.stages | {"instruct": stage})

    @property
    def data(self) -> Path:
        return Path(self.stages["align"].data.path).parent

    def prepare(self) -> None:
        """Draws the pictures and writes the data of both stages if they are missing. Every seed has the same.

        Raises UserError if the pictures there were drawn by another version, whose questions and probes differ.
        """
        from llava_jax.annotations import drawn_scenes as scenes
        from llava_jax.evaluate.probes.make_probes import ProbesData
        from llava_jax.synthesize import rules

        folder = self.data
        if not (folder / "probes.jsonl").exists():
            scenes.write(folder, train=0, test=0, probe=PROBE)
            captions, instances = (str(folder / "annotations" / f"{kind}_probe.json")
                                   for kind in ("captions", "instances"))
            ProbesData(str(folder), captions, instances, prefix="probe/", each=100).run()
        last = folder / "questions_unseen.jsonl"
        if last.exists():
            drawn = [{" ".join((thing.colour, thing.shape)) for thing in objects}
                     for objects, *_ in itertools.islice(scenes.draw_split("test"), 24)]
            if drawn != [{box.category for box in context.boxes} for context in rules.open_split(folder, "test")[:24]]:
                raise UserError(f"{folder}: its pictures are of another version of this recipe; remove the folder")
        else:
            print(f"drawing {TRAIN:,} pictures and writing their captions, boxes and questions to {folder}", flush=True)
            scenes.write(folder, train=TRAIN, test=TEST + VALIDATION, unseen=UNSEEN)
            rules.write_captions(folder, "train", folder / "captions.json")
            for name, write in (("captions", rules.write_captions), ("instructions", rules.write_instructions)):
                validation = folder / f"{name}_validation.json"
                write(folder, "test", validation)
                validation.write_text(json.dumps(json.loads(validation.read_text())[TEST:]))
            rules.write_questions(folder, "test", folder / "questions.jsonl")
            rules.write_questions(folder, "unseen", last, about=[" ".join(pair) for pair in scenes.UNSEEN])
        instructions = Path(self.stages["instruct"].data.path)
        if instructions.parent == folder and not instructions.exists():
            print(f"writing {instructions}", flush=True)
            kinds = () if self.places else [kind for kind in rules.KINDS if kind not in ("between", "order")]
            rules.write_instructions(folder, "train", instructions, korean=self.korean, kinds=kinds)

    def finish(self, model: Path) -> None:
        """Asks the model, the model with another picture, and the model of stage 1 alone the held-out questions."""
        from llava_jax.evaluate.runner.baselines import images_of
        from llava_jax.evaluate.runner.generation import ask
        from llava_jax.evaluate.tasks.scenes import Scenes
        from llava_jax.inference.llava import Llava
        from llava_jax.train.metrics import read_lines
        from llava_jax.train.parameters import load_parameters
        from llava_jax.train.setup import setup

        start = time.perf_counter()
        llava, context = llava_jax.load(model), setup(self)
        aligned = Llava(context.model, load_parameters(context, lambda path: "float32", before="instruct"),
                        context.tokenizer)
        task = Scenes()
        questions = [q for q in task.load(str(self.data)) if int(Path(q.row["image"]).stem) <= TEST]
        unseen = task.load(str(self.data / "questions_unseen.jsonl"))
        blind = images_of("blind", questions, llava.config)
        results = {}
        for name, *asked in (("trained", llava, questions), ("blind", llava, questions, blind),
                             ("stage 1 alone", aligned, questions), ("unseen pairs", llava, unseen)):
            print(f"asking {len(asked[1]):,} questions: {name}", flush=True)
            results[name] = task.score("", asked[1], ask(asked[0], task, asked[1], 64, *asked[2:]))
        probes = probe(llava, str(self.data))
        training = sum(line.get("seconds", 0) for line in read_lines(Path(self.output) / "metrics.jsonl"))
        seconds = {"training": round(training, 1), "evaluation": round(time.perf_counter() - start, 1)}
        spoken = chats(llava, self.data, ("en", "ko") if self.korean else ("en",))
        scores = write_report(Path(self.output), results, probes, questions, spoken, seconds)

        [picture] = questions[0].images
        answer = llava.generate("Describe the picture in detail.", [picture], max_new_tokens=80)
        for columns in (scores, probes):
            print(f"\n{'right answers, %':<16}" + "".join(f"{name:>18}" for name in columns))
            for kind in next(iter(columns.values())):
                print(f"{kind:<16}" + "".join(f"{100 * column[kind]:18.1f}" for column in columns.values()))
        print(f"\n{picture}: {answer.text}\n\nmodel   {model}\nreport  {Path(self.output) / 'report.html'}\n"
              f"time    training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s\n"
              f"chat    python -m llava_jax.generate --model {model} --image {picture}")


def recipe() -> MiniRecipe:
    data = "runs/mini/data"
    return MiniRecipe(
        model=Model(vision=str(BACKBONES / "vision"), language=str(BACKBONES / "language"),
                    image_mode="crop", template="mistral_instruct"),
        stages={
            "align": Stage(
                learning_rates=(("projector/.*", 5e-3), ("(vision|decoder)/.*", None)),
                data=Data(path=f"{data}/captions.json", validation=f"{data}/captions_validation.json",
                          template="plain", sequence_length=256, tiles_per_sequence=4),
                optimizer=Optimizer(b2=0.98),
                batch_size=8, steps=800, remat="none",
            ),
            "instruct": Stage(
                # A lower rate keeps more of what the decoder knew about colour-shape pairs that no picture shows.
                learning_rates=(("projector/.*", 5e-4), ("decoder/.*", 3e-4), ("vision/.*", None)),
                data=Data(path=f"{data}/instructions.json", validation=f"{data}/instructions_validation.json",
                          sequence_length=336, tiles_per_sequence=2),
                optimizer=Optimizer(b2=0.98, clip=1.0),
                batch_size=12, steps=240, remat="none",
            ),
        },
        output="runs/mini",
        log_every=10, validate_every=100, sample_every=150, checkpoint_every=100,
    )


def chats(llava: "Llava", folder: Path, languages: Sequence[str]) -> list["Chat"]:
    """Returns chats about four held-out pictures of three objects or more, in each language in turn.

    The rules teacher asks. The pictures are drawn larger than the model sees them.
    """
    from llava_jax.annotations.scene import Scene
    from llava_jax.synthesize import rules
    from llava_jax.train.report import Chat

    shown, pictures = [], enlarged_pictures(24)
    scenes = [(picture, context) for picture, context in zip(pictures, rules.open_split(folder, "test"), strict=False)
              if len(context.boxes) >= 3]
    for (picture, context), language in zip(scenes[:4], itertools.cycle(languages), strict=False):
        rng, scene = random.Random(0), Scene(context)
        teacher = rules.RulesTeacher(language)
        asked, messages = [*teacher.conversation(scene, rng, 3), teacher.description(scene, rng)], []
        for question in asked:
            messages.append({"role": "user", "content": question.question})
            answer = llava.generate(messages, [folder / context.image], max_new_tokens=96)
            messages.append({"role": "assistant", "content": answer.text})
        texts = [message["content"] for message in messages]
        shown.append(Chat(picture, language, list(zip(texts[::2], texts[1::2], strict=True))))
    return shown


def enlarged_pictures(count: int) -> list["Image"]:
    """Draws the first held-out pictures again, four times as large."""
    from llava_jax.annotations import drawn_scenes as scenes

    return [picture for *_, picture in itertools.islice(scenes.draw_split("test", enlarge=4), count)]


def write_report(output: Path, results: dict, probes: dict, questions: list, chats: list["Chat"],
                 seconds: dict[str, float]) -> dict:
    """Writes report.html and report.json. Returns the shares of right answers, 0..1, by result and kind."""
    import jax

    from llava_jax.train import report

    scores = {name: {kind: round(value / 100, 4) for kind, value in result.figures.items()}
              for name, result in results.items()}
    answered = list(zip(questions, results["trained"].items, strict=True))
    images = [(picture, [report.AnsweredQuestion(question.text, item.reference, item.parsed, item.score == 1)
                         for question, item in answered if int(Path(question.row["image"]).stem) == number])
              for number, picture in enumerate(enlarged_pictures(24), 1)]
    tables = {"Right answers on held-out pictures": scores} | {
        title: {name: probes[name] for name in names} for title, names in (
            ("Probes in two languages", ("English", "Korean", "guessing")),
            ("Probes of places", ("English", "another picture", "shuffled patches", "guessing")))}
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device" + "s" * (jax.device_count() > 1)
    report.write_page(
        output / "report.html", "LLaVA in miniature",
        f"Both stages took {seconds['training']:.0f} seconds of training on {devices}, the evaluation "
        f"{seconds['evaluation']:.0f} seconds. {SUMMARY}",
        report.read_metrics(output / "metrics.jsonl"), tables, images, chats)
    (output / "report.json").write_text(json.dumps({
        "accuracy": scores["trained"],
        "blind_accuracy": scores["blind"]["overall"],
        "stage1_accuracy": scores["stage 1 alone"]["overall"],
        "unseen_pairs_accuracy": scores["unseen pairs"]["overall"],
        "by_kind": {name: scores[name] for name in ("blind", "stage 1 alone", "unseen pairs")},
        "probes": probes,
        "questions": {name: len(result.items) for name, result in results.items()},
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_part": seconds,
    }, indent=1) + "\n")
    return scores


def probe(llava: "Llava", folder: str) -> dict[str, dict[str, float]]:
    """Returns shares of right answers to the probes, 0..1: in English, in Korean, and of the baselines."""
    from llava_jax.evaluate.probes.multilingual import Multilingual
    from llava_jax.evaluate.probes.spatial import Spatial, guessing
    from llava_jax.evaluate.runner.baselines import images_of
    from llava_jax.evaluate.runner.generation import choose
    from llava_jax.evaluate.tasks.base import Answer

    def figures(task: "Task", baseline: "Baseline") -> dict[str, float]:
        questions = task.load(folder)
        print(f"asking {len(questions):,} questions: {task.title}, {baseline}", flush=True)
        said = choose(llava, task, questions, 64, images_of(baseline, questions, llava.config))
        answers = [Answer(questions[one.index].id, one.text) for one in said]
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
