"""The command that puts a benchmark to a model and scores the answers, or scores a file of answers."""

import dataclasses
import glob
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from llava_jax import config
from llava_jax.cli import printable
from llava_jax.errors import UserError
from llava_jax.evaluate.runner import answer_file, results
from llava_jax.evaluate.runner.answer_file import NOT_ASKED, AnswerFile, Line
from llava_jax.evaluate.runner.published import published_results
from llava_jax.evaluate.runner.tables import markdown, number
from llava_jax.evaluate.tasks.base import Question, Task, get_task
from llava_jax.files import atomic_write, make_folder, read_json
from llava_jax.progress import Progress
from llava_jax.text import templates

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

PIECE = 2**20  # characters that a process tells the others at once
PRINTED = 40  # figures; where there are more, results.md has them


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """What all benchmarks have in common; `command` adds the options of one."""

    data: str
    """folder of the benchmark, or its file of questions"""
    model: str = ""
    """folder of the model that answers"""
    answers: str = ""
    """a file of answers to score as it is; no model is asked"""
    out: str = ""
    """folder for the results, which get one of their own in it, named as the benchmark"""
    partial: Flag = False
    """score a file of answers that misses some, or has doubled or foreign ones, as the original's scorer would"""
    name: str = ""
    """what the results call the model; by default as its folder"""
    limit: int | None = None
    """ask the first so many questions only"""
    batch_size: int = 16
    """questions at a time"""
    score_by: Literal["generation", "likelihood"] = "generation"
    """likelihood takes the likeliest of the choices, instead of letting the model write"""
    baseline: Literal["none", "blind", "shuffled"] = "none"
    """blind shows another question's picture; shuffled mixes the patches of each picture"""
    template: str = ""
    """conversation format of the prompts, such as vicuna_v1; by default the model's own"""
    num_chunks: int = 1
    """parts of the questions, for processes that know nothing of each other but write to the same folder"""
    chunk_idx: int = 0
    """the part of this process, from 0; the one that ends last scores"""
    overwrite: Flag = False
    """throw away the answers that are there, instead of going on"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """by default bfloat16 on TPU and GPU, float32 on CPU"""
    mesh: config.Mesh = field(default_factory=lambda: MESH)
    """the devices of this host; by default tensor is as many as divide the heads, and data the remaining devices"""
    task: Task

    benchmark: ClassVar[str]

    def __post_init__(self):
        if bool(self.model) == bool(self.answers):
            raise UserError("give either --model DIR, to ask it, or --answers FILE, to score that")
        if self.model and self.partial:
            raise UserError("--partial is for --answers; a model's answers are scored when all are there")
        if self.template and not self.model:
            raise UserError("--template is for --model; the answers of a file were asked for already")
        if self.model and not self.out:
            raise UserError("give --out DIR, a folder for the answers and results")
        if self.limit is not None and self.limit < 1 or self.batch_size < 1:
            raise UserError("--limit and --batch-size must be at least 1")
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise UserError(f"--chunk-idx {self.chunk_idx}: with --num-chunks {self.num_chunks} it lies in "
                             f"0..{self.num_chunks - 1}")

    @property
    def folder(self) -> str:
        return os.path.join(self.out, self.benchmark)

    def run(self) -> int:
        """Returns 0. Mistakes raise UserError, FileNotFoundError or ImportError, one line each, before any work."""
        for package in self.task.required_packages if self.out else ():
            if importlib.util.find_spec(package) is None:
                raise UserError(f"the upload of {self.task.title} needs {package}: pip install {package}")
        if self.answers:
            self._score_file()
            return 0
        # Imported here, so that files of answers are scored without waiting for JAX.
        from llava_jax.parallel.processes import abort_all_on_error, initialize

        initialize()
        with abort_all_on_error():
            self._ask()
        return 0

    def _score_file(self) -> None:
        questions = self.task.load(self.data)
        asked = questions[: self.limit]
        lines, notes = answer_file.read(self.answers, self.partial)
        if not self.partial:
            title = f"{self.task.title} in {self.task.question_path(self.data)}"
            answer_file.check(self.answers, title, asked, lines, self.task.uses_answer_order)
        if self.task.uses_prompts and (without := [line["question_id"] for line in lines if "prompt" not in line]):
            raise UserError(f"{self.answers}: the answer to question {without[0]!r} has no prompt, without which "
                             f"{self.task.title} cannot be scored")
        models = answer_file.models_of(lines)
        name = self.name or (models[0] if len(models) == 1 else os.path.basename(self.answers))
        if self.out and os.path.exists(os.path.join(self.folder, RUN)):
            raise UserError(f"{self.folder}: holds the answers of a model that was asked; choose another --out")
        settings = self._settings(questions) | {"name": name, "model": None, "answers_file": self.answers,
                                                "partial": self.partial}
        self._finish(settings, asked, lines, notes)

    def _ask(self) -> None:
        """Asks what this process has to ask; the first process, or whichever ends last, scores."""
        from llava_jax.evaluate.runner.baselines import shown
        from llava_jax.evaluate.runner.generation import OWN, check_questions
        from llava_jax.parallel.cluster import detect_cluster
        from llava_jax.parallel.processes import WORK_TIMEOUT, allgather_object, assert_equal_across_processes

        questions, place = self.task.load(self.data), detect_cluster()
        self.task.check_ground_truth(self.data, questions)
        asked = questions[: self.limit]
        if self.baseline != "none" and not any(question.images for question in asked):
            raise UserError(f"--baseline {self.baseline}: {self.task.title} has no pictures here")
        if self.score_by == "likelihood" and not all(question.choices for question in asked):
            raise UserError(f"--score-by likelihood: {self.task.title} has questions without choices to take from")
        if self.num_chunks > 1 and (place or self.overwrite):
            raise UserError("--num-chunks is for processes that know nothing of each other; " + (
                "these do, and divide the questions by themselves" if place else
                "with --overwrite one would throw away what another has answered; remove the folder first"))
        settings, config = self._settings(questions) | self._model(), self._config()
        assert_equal_across_processes("evaluate", _identity(settings))
        chunks, index = (place.num_processes, place.process_id) if place else (self.num_chunks, self.chunk_idx)
        mine = answer_file.chunk(len(asked), chunks, index)
        source = self.task.question_path(self.data)
        images = OWN if self.baseline == "shuffled" else shown(self.baseline, questions, config)
        fresh = self.overwrite or not os.path.exists(os.path.join(self.folder, RUN))
        if fresh:
            check_questions((asked[n] for n in mine), source, config, images)  # before anything is made or thrown away
        if self.overwrite and index == 0:
            answer_file.remove([os.path.join(self.folder, RUN), *self._files()])
        allgather_object("the folder", None, WORK_TIMEOUT)  # parts take unlike times to check
        found = self._begin(settings, questions)
        todo = [n for n in mine if n not in found]
        own = os.path.join(self.folder, WHOLE if chunks == 1 else f"answers-{index}-of-{chunks}.jsonl")
        if todo:
            if not fresh:
                check_questions((asked[n] for n in todo), source, config, images)
            with AnswerFile(own) as file:
                if file.mended:
                    print(f"{own}: the last line was broken off, and is cut ({file.mended:,} bytes)", file=sys.stderr)
                self._answer(questions, mine, found, file, settings)
        # What others have answered comes through the group or, without one, lies in the same folder.
        if place:
            for numbered in _exchange([[n, found[n]] for n in mine]):
                found |= {n: line for n, line in numbered}
        elif chunks > 1:
            found = self._found(questions)
        if missing := sum(n not in found for n in range(len(asked))):
            print(f"part {index} of {chunks} is answered; {missing:,} questions of other parts are not yet")
        elif index == 0 or not place:
            answer_file.write(os.path.join(self.folder, WHOLE), [found[n] for n in sorted(found)])
            answer_file.remove(set(self._files()) - {os.path.join(self.folder, WHOLE)})
            self._finish(settings, asked, [found[n] for n in range(len(asked))], [])
        allgather_object("the results", None, WORK_TIMEOUT)
        if place and index:  # process 0 has all, and on its own disk
            answer_file.remove([own])

    def _settings(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {"benchmark": self.benchmark, "data": os.path.abspath(self.data), "limit": self.limit,
                "options": dataclasses.asdict(self.task), "questions_hash": results.hash_questions(questions)}

    def _model(self) -> dict[str, Any]:
        import jax

        read, path = self._config(), os.path.abspath(self.model)
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        template = templates.get(self.template or read.template)
        if template.captions:
            raise UserError(f"template {template.name!r} writes an image alone and no question; ask such a model with "
                            "--template v1_mmtag, or v0_mmtag for the first LLaVA, as LLaVA's scripts do")
        baseline = "" if self.baseline == "none" else f" ({self.baseline})"
        return {"name": self.name or os.path.basename(path) + baseline,
                "model": {"path": path, "hash": results.hash_model(path), "template": template.name, "dtype": dtype,
                          "platform": jax.default_backend(), "score_by": self.score_by, "baseline": self.baseline}}

    def _config(self):
        """The model's LlavaConfig. Raises UserError for a part of a model."""
        from llava_jax.models.llava import LlavaConfig
        from llava_jax.weights.checkpoint import read_config

        read = read_config(self.model, self.template or None)
        if not isinstance(read, LlavaConfig):
            raise UserError(f"{self.model}: a vision tower or language model alone; join two with llava_jax.convert")
        return read

    def _files(self) -> list[str]:
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), "answers*.jsonl")))

    def _begin(self, settings: Mapping[str, Any], questions: Sequence[Question]) -> dict[int, Line]:
        """The answers that are there. UserError if they are of other questions, another model, or anybody's."""
        make_folder(self.folder)
        path = os.path.join(self.folder, RUN)
        if os.path.exists(path):
            try:
                there = _identity(read_json(path))
            except (KeyError, TypeError, UserError) as error:
                raise UserError(f"{path}: broken ({error}); --overwrite begins again") from None
            ours = _identity(settings)
            if differ := [key for key in ours if there[key] != ours[key]]:
                parts = ", ".join(f"{key} ({there[key]}, not {ours[key]})" for key in differ)
                raise UserError(f"{self.folder}: holds answers of another run, which differs in {parts}; choose "
                                 "another --out, or --overwrite")
        elif self._files():
            raise UserError(f"{self._files()[0]}: no {RUN} beside it says which model's answers these are; --answers "
                             "scores such a file, and --overwrite throws it away")
        else:
            with atomic_write(path) as file:
                file.write(json.dumps(settings, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))
        found = self._found(questions)
        if found:
            print(f"{self.folder}: {len(found):,} of {len(questions):,} answers are there", file=sys.stderr)
        return found

    def _found(self, questions: Sequence[Question]) -> dict[int, Line]:
        """The answers in all files, by the number of their question; a line that is broken off is none."""
        while True:
            try:
                lines = [line for path in self._files() for line in answer_file.scan(path)[0]]
                break
            except FileNotFoundError:  # another process has joined the parts meanwhile
                continue
        places = answer_file.match(questions, lines)
        return {place: line for place, line in zip(places, lines, strict=True) if place is not None}

    def _answer(self, questions: Sequence[Question], mine: range, found: dict[int, Line], file: AnswerFile,
                settings: Mapping[str, Any]) -> None:
        """Adds the answers that are missing of `mine` to `found` and to the file, one by one."""
        from llava_jax.evaluate.runner.baselines import shown
        from llava_jax.evaluate.runner.generation import RunningScore, choose, generate
        from llava_jax.inference.llava import load

        todo = [n for n in mine if n not in found]
        mesh, template = self._mesh(), settings["model"]["template"]
        llava = load(self.model, settings["model"]["dtype"], mesh, template)
        # By their order answers meet labels from the first question on.
        scored = None if self.task.uses_answer_order and mine.start else self.task
        score = RunningScore(scored, self.data, [questions[n] for n in mine], [found.get(n) for n in mine])
        progress = Progress(len(mine), len(mine) - len(todo), "answers", note=lambda: score.text)
        told = 0
        ask = generate if self.score_by == "generation" else choose
        try:
            for said in ask(llava, self.task, [questions[n] for n in todo], self.batch_size,
                            shown(self.baseline, questions, llava.config)):
                n = todo[said.number]
                if why := said.metadata.get(NOT_ASKED):
                    told += 1
                    if told <= EXAMPLES:
                        source = printable(self.task.question_path(self.data))
                        print(f"{source}, question {questions[n].id!r} is not asked: {why}", file=sys.stderr)
                found[n] = answer_file.make_line(questions[n], said.text, settings["name"], said.metadata)
                file.add(found[n])
                score.add(n - mine.start, found[n])
                progress.update()
        finally:
            progress.close()
            progress.print(progress.line())

    def _mesh(self):
        """This host's devices, if it has several."""
        import jax

        from llava_jax.parallel.sharding import make_mesh
        from llava_jax.weights.checkpoint import read_config

        devices, mesh = jax.local_devices(), self.mesh
        if len(devices) == 1 and mesh == MESH:
            return None
        if mesh == MESH:
            model = read_config(self.model, self.template or None)
            sizes = [size for part in (model.text, model.vision) for size in (part.heads, part.intermediate_size)]
            tensor = math.gcd(len(devices), *sizes, model.text.num_kv_heads)
            mesh = config.Mesh(-1, 1, tensor)
        return make_mesh(mesh, devices)

    def _finish(self, settings: Mapping[str, Any], asked: Sequence[Question], lines: Sequence[Line],
                notes: Sequence[str]) -> None:
        """Scores, writes the results, prints the figures."""
        given = [answer_file.to_answer(line) for line in lines]
        try:
            scores = self.task.score(self.data, asked, given)
        except UserError as error:
            if not self.answers or self.answers in str(error):
                raise
            raise UserError(f"{self.answers}: {error}") from error
        if self.limit is not None:
            notes = [*notes, f"--limit: the first {len(asked):,} questions only"]
        scores = dataclasses.replace(scores, notes=[*notes, *self._not_asked(lines), *scores.notes])
        if self.out:
            make_folder(self.folder)
            if self.answers:
                answer_file.write(os.path.join(self.folder, WHOLE), lines)
            uploads = self.task.write_submission(self.data, asked, given, self.folder)
            results.write(self.folder, self.task, settings, asked, lines, scores, uploads)
        table = results.beside(scores, settings["name"], published_results().get(self.benchmark, ()))
        if len(table[0]) > 1:
            print(markdown(table))
        if 1 < len(scores.figures) <= PRINTED:
            print(markdown([["figure", settings["name"]],
                            *([name, number(value)] for name, value in scores.figures.items())]))
        for note in scores.notes:
            print(printable(f"- {note}"))
        if self.out:
            paths = (*uploads, os.path.join(self.folder, "results.html"))
            print(printable("\n" + "".join(f"{path}\n" for path in paths)), end="")


    def _not_asked(self, lines: Sequence[Line]) -> list[str]:
        """A note on questions that were not put to the model, with the first of them."""
        why = [(line["question_id"], line["metadata"][NOT_ASKED]) for line in lines
               if isinstance(line.get("metadata"), dict) and isinstance(line["metadata"].get(NOT_ASKED), str)]
        if not why:
            return []
        named = "; ".join(f"question {id!r}: {reason}" for id, reason in why[:EXAMPLES])
        return [f"{len(why):,} of {len(lines):,} questions of {self.task.question_path(self.data)} were not asked; "
                f"their answers are empty, and scored as {self.task.title} scores an empty one ({named})"]


MESH = config.Mesh(1, 1, -1)
EXAMPLES = 5  # questions that are named, at most
RUN, WHOLE = "run.json", "answers.jsonl"


def task_command(name: str) -> type[EvaluateCommand]:
    """Returns the command of a benchmark: the options of EvaluateCommand and those of the task."""
    kind = get_task(name)
    task = ("task", tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind))
    about = f"{kind.__doc__}\n\nNeeds {kind.required_files}."
    return dataclasses.make_dataclass(kind.__name__, [task], bases=(EvaluateCommand,), frozen=True, kw_only=True,
                                      namespace={"benchmark": name, "__doc__": about})


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What answers must have in common to be of one run."""
    model = settings["model"]
    return {"benchmark": settings["benchmark"], "questions": settings["questions_hash"], "name": settings["name"],
            "model": model["hash"], **{key: model[key] for key in ("template", "dtype", "score_by", "baseline")}}


def _exchange(value: Any) -> list[Any]:
    """Every process's value, of any size, by its index."""
    from llava_jax.parallel.processes import WORK_TIMEOUT, allgather_object

    text = json.dumps(value)
    rounds = max(allgather_object("sizes of the answers", -(-len(text) // PIECE), WORK_TIMEOUT))
    pieces = [allgather_object("the answers", text[i * PIECE : (i + 1) * PIECE]) for i in range(rounds)]
    return [json.loads("".join(parts)) for parts in zip(*pieces, strict=True)]
