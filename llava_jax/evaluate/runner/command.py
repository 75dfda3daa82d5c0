"""Asks a model the questions of a benchmark and scores the answers, or scores a file of answers."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from llava_jax import config
from llava_jax.cli import Flag, printable
from llava_jax.errors import UserError
from llava_jax.evaluate.runner import answer_file, results
from llava_jax.evaluate.runner.answer_file import NOT_ASKED, Line
from llava_jax.evaluate.runner.answer_folder import AnswerFolder, chunk, identity, remove
from llava_jax.evaluate.runner.published import published_results
from llava_jax.evaluate.runner.tables import markdown
from llava_jax.evaluate.tasks.base import Question, Task, get_task
from llava_jax.files import make_folder, write_json_lines
from llava_jax.json_lines import JsonLinesFile
from llava_jax.progress import Progress
from llava_jax.text import templates

if TYPE_CHECKING:
    from llava_jax.models.llava import LlavaConfig

MESH = config.Mesh(1, 1, -1)
MAX_EXAMPLES = 5
"""Number of questions that a note names."""
MAX_PRINTED_FIGURES = 40
"""Number of figures that are printed. results.md has all of them."""
MESSAGE_CHARS = 2**20
"""Number of characters that a process sends to the other processes at once."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Options that all benchmarks share. `task_command` adds those of one benchmark."""

    data: str
    """Folder of the benchmark, or its file of questions."""
    model: str = ""
    """Directory of the model."""
    adapter: str = ""
    """Directory of LoRA adapters for the model, of PEFT or of the original LLaVA."""
    answers: str = ""
    """File of answers to score, without a model."""
    out: str = ""
    """Folder for the results. They are written to its subfolder with the benchmark's name."""
    partial: Flag = False
    """Whether to score a file with missing, duplicate or unknown answers, as the original scorer would."""
    name: str = ""
    """Name of the model in the results; default: the name of its folder."""
    limit: int | None = None
    """Number of questions to ask, from the first one on; default: all."""
    batch_size: int = 16
    """Number of questions per batch."""
    score_by: Literal["generation", "likelihood"] = "generation"
    """Way of answering: generation lets the model write, likelihood selects the most likely choice."""
    baseline: Literal["none", "blind", "shuffled"] = "none"
    """Images that the model sees: blind shows another question's, shuffled mixes the patches of each image."""
    template: str = ""
    """Conversation template of the prompts, such as vicuna_v1; default: the model's."""
    num_chunks: int = 1
    """Number of parts of the questions, for independent processes that write to the same folder."""
    chunk_idx: int = 0
    """Index of this process's part, from 0. The process that ends last scores."""
    overwrite: Flag = False
    """Whether to delete existing answers, instead of continuing."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Compute dtype of the model; default: bfloat16 on TPU and GPU, float32 on CPU."""
    mesh: config.Mesh = field(default_factory=lambda: MESH)
    """Mesh of this host's devices. By default tensor is as many as divide the heads, and data the remaining devices."""
    task: Task

    benchmark: ClassVar[str]

    def __post_init__(self):
        if bool(self.model) == bool(self.answers):
            raise UserError("give either --model DIR, to ask it, or --answers FILE, to score that")
        if self.model and self.partial:
            raise UserError("--partial is for --answers; a model's answers are scored when all are there")
        for name in ("template", "adapter"):
            if getattr(self, name) and not self.model:
                raise UserError(f"--{name} is for --model; the answers of a file were asked for already")
        if self.model and not self.out:
            raise UserError("give --out DIR, a folder for the answers and results")
        if self.limit is not None and self.limit < 1 or self.batch_size < 1:
            raise UserError("--limit and --batch-size must be at least 1")
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise UserError(f"--chunk-idx {self.chunk_idx}: with --num-chunks {self.num_chunks} it must be in "
                             f"0..{self.num_chunks - 1}")

    @property
    def folder(self) -> AnswerFolder:
        return AnswerFolder(os.path.join(self.out, self.benchmark))

    def run(self) -> int:
        """Returns 0. Raises UserError for mistakes before any work."""
        for package in self.task.required_packages if self.out else ():
            if importlib.util.find_spec(package) is None:
                raise UserError(f"the upload of {self.task.title} needs {package}: pip install {package}")
        if self.answers:
            self._score_file()
            return 0
        # Imported here, because files of answers are scored without JAX.
        from llava_jax.parallel.processes import abort_all_on_error, initialize

        initialize()
        with abort_all_on_error():
            self._ask_model()
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
        if self.out and self.folder.exists():
            raise UserError(f"{self.folder.path}: holds the answers of a model that was asked; choose another --out")
        settings = self._settings(questions) | {"name": name, "model": None, "answers_file": self.answers,
                                                "partial": self.partial}
        self._finish(settings, asked, lines, notes)

    def _ask_model(self) -> None:
        """Asks the questions of this process. The first process, or the one that ends last, scores."""
        from llava_jax.evaluate.runner.baselines import images_of
        from llava_jax.evaluate.runner.generation import OWN_IMAGES, check_questions
        from llava_jax.parallel.cluster import detect_cluster
        from llava_jax.parallel.processes import WORK_TIMEOUT, allgather_object, assert_equal_across_processes

        questions, cluster, folder = self.task.load(self.data), detect_cluster(), self.folder
        self.task.check_ground_truth(self.data, questions)
        asked = questions[: self.limit]
        self._check_options(asked, in_cluster=cluster is not None)
        model_config = self._model_config()
        settings = self._settings(questions) | self._model_settings(model_config)
        assert_equal_across_processes("evaluate", identity(settings))
        num_chunks, index = (cluster.num_processes, cluster.process_id) if cluster else (self.num_chunks,
                                                                                         self.chunk_idx)
        own = chunk(len(asked), num_chunks, index)
        source = self.task.question_path(self.data)
        images = OWN_IMAGES if self.baseline == "shuffled" else images_of(self.baseline, questions, model_config)
        is_new = self.overwrite or not folder.exists()
        if is_new:  # before anything is written or deleted
            check_questions((asked[n] for n in own), source, model_config, images)
        if self.overwrite and index == 0:
            folder.clear()
        allgather_object("the folder", None, WORK_TIMEOUT)  # because checking takes some processes longer
        lines = folder.start(settings, questions)
        if lines:
            print(f"{folder.path}: {len(lines):,} of {len(questions):,} answers are there", file=sys.stderr)
        remaining = [n for n in own if n not in lines]
        if remaining:
            if not is_new:
                check_questions((asked[n] for n in remaining), source, model_config, images)
            lines |= self._answer(questions, remaining, len(own), folder.chunk_path(num_chunks, index), settings,
                                  model_config)
        # Answers of other processes come through the cluster or, without one, from the same folder.
        if cluster:
            for pairs in _allgather([[n, lines[n]] for n in own]):
                lines |= dict(pairs)
        elif num_chunks > 1:
            lines = folder.read(questions)
        if missing := sum(n not in lines for n in range(len(asked))):
            print(f"part {index} of {num_chunks} is answered; {missing:,} questions of other parts are not yet")
        elif index == 0 or not cluster:
            folder.join([lines[n] for n in sorted(lines)])
            self._finish(settings, asked, [lines[n] for n in range(len(asked))], [])
        allgather_object("the results", None, WORK_TIMEOUT)
        if cluster and index:  # process 0 has all answers, maybe on another disk
            remove(folder.chunk_path(num_chunks, index))

    def _check_options(self, asked: Sequence[Question], in_cluster: bool) -> None:
        """Raises UserError for options that do not match the questions or the other processes."""
        if self.baseline != "none" and not any(question.images for question in asked):
            raise UserError(f"--baseline {self.baseline}: {self.task.title} has no pictures here")
        if self.score_by == "likelihood" and not all(question.choices for question in asked):
            raise UserError(f"--score-by likelihood: {self.task.title} has questions without choices to take from")
        if self.num_chunks > 1 and in_cluster:
            raise UserError("--num-chunks is for processes that know nothing of each other; these do, and divide the "
                            "questions by themselves")
        if self.num_chunks > 1 and self.overwrite:
            raise UserError("--num-chunks is for processes that know nothing of each other; with --overwrite one would "
                            "throw away what another has answered; remove the folder first")

    def _settings(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {"benchmark": self.benchmark, "data": os.path.abspath(self.data), "limit": self.limit,
                "options": dataclasses.asdict(self.task), "questions_hash": results.hash_questions(questions)}

    def _model_settings(self, model_config: "LlavaConfig") -> dict[str, Any]:
        import jax

        path = os.path.abspath(self.model)
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        template = templates.get(self.template or model_config.template)
        if template.captions:
            raise UserError(f"template {template.name!r} writes an image alone and no question; ask such a model with "
                            "--template v1_mmtag, or v0_mmtag for the first LLaVA, as LLaVA's scripts do")
        baseline = "" if self.baseline == "none" else f" ({self.baseline})"
        names = [os.path.basename(os.path.abspath(folder)) for folder in (path, self.adapter) if folder]
        model_hash = "+".join(results.hash_model(folder) for folder in (path, self.adapter) if folder)
        return {"name": self.name or " + ".join(names) + baseline,
                "model": {"path": path, "hash": model_hash, "template": template.name, "dtype": dtype,
                          "platform": jax.default_backend(), "score_by": self.score_by, "baseline": self.baseline}}

    def _model_config(self) -> "LlavaConfig":
        """Returns the model's config. Raises UserError for a part of a model."""
        from llava_jax.models.llava import LlavaConfig
        from llava_jax.weights.checkpoint import read_config

        model_config = read_config(self.model, self.template or None, adapter=self.adapter)
        if not isinstance(model_config, LlavaConfig):
            raise UserError(f"{self.model}: a vision tower or language model alone; join two with llava_jax.convert")
        return model_config

    def _answer(self, questions: Sequence[Question], remaining: Sequence[int], num_own: int, path: str,
                settings: Mapping[str, Any], model_config: "LlavaConfig") -> dict[int, Line]:
        """Asks the remaining questions, and appends each answer to the file at once. Returns the lines by index."""
        from llava_jax.evaluate.runner.baselines import images_of
        from llava_jax.evaluate.runner.generation import choose, generate
        from llava_jax.inference.llava import load

        llava = load(self.model, settings["model"]["dtype"], self._mesh(model_config), settings["model"]["template"],
                     adapter=self.adapter or None)
        source, lines, num_not_asked = printable(self.task.question_path(self.data)), {}, 0
        answer = generate if self.score_by == "generation" else choose
        images = images_of(self.baseline, questions, llava.config)
        progress = Progress(num_own, num_own - len(remaining), "answers")
        with JsonLinesFile(path) as file:
            if file.dropped:
                print(f"{path}: the last line was broken off, and is cut ({file.dropped:,} bytes)", file=sys.stderr)
            try:
                for generation in answer(llava, self.task, [questions[n] for n in remaining], self.batch_size, images):
                    n = remaining[generation.index]
                    if reason := generation.metadata.get(NOT_ASKED):
                        num_not_asked += 1
                        if num_not_asked <= MAX_EXAMPLES:
                            progress.print(f"{source}, question {questions[n].id!r} is not asked: {reason}")
                    lines[n] = answer_file.make_line(questions[n], generation.text, settings["name"],
                                                     generation.metadata)
                    file.append(lines[n])
                    progress.update()
            finally:
                progress.close()
                progress.print(progress.line())
        return lines

    def _mesh(self, model_config: "LlavaConfig"):
        """Returns the mesh of this host's devices, None for a single one."""
        import jax

        from llava_jax.parallel.sharding import make_mesh

        devices, mesh = jax.local_devices(), self.mesh
        if len(devices) == 1 and mesh == MESH:
            return None
        if mesh == MESH:
            sizes = [size for part in (model_config.text, model_config.vision)
                     for size in (part.num_heads, part.intermediate_size)]
            mesh = config.Mesh(-1, 1, math.gcd(len(devices), *sizes, model_config.text.num_kv_heads))
        return make_mesh(mesh, devices)

    def _finish(self, settings: Mapping[str, Any], asked: Sequence[Question], lines: Sequence[Line],
                notes: Sequence[str]) -> None:
        """Scores, writes the results, and prints the figures."""
        answers = [answer_file.to_answer(line) for line in lines]
        try:
            scores = self.task.score(self.data, asked, answers)
        except UserError as error:
            if not self.answers or self.answers in str(error):
                raise
            raise UserError(f"{self.answers}: {error}") from error
        if self.limit is not None:
            notes = [*notes, f"--limit: the first {len(asked):,} questions only"]
        scores = dataclasses.replace(scores, notes=[*notes, *self._not_asked_notes(lines), *scores.notes])
        folder, paths = self.folder, []
        if self.out:
            make_folder(folder.path)
            if self.answers:
                write_json_lines(folder.answers_path, lines)
            paths = self.task.write_submission(self.data, asked, answers, folder.path)
            results.write(folder.path, self.task, settings, asked, lines, scores, paths)
            paths.append(os.path.join(folder.path, "results.html"))
        table = results.beside_published(scores, settings["name"], published_results().get(self.benchmark, ()))
        if len(table[0]) > 1:
            print(markdown(table))
        if 1 < len(scores.figures) <= MAX_PRINTED_FIGURES:
            print(markdown(results.figure_table(scores, settings["name"])))
        print(printable("".join(f"- {note}\n" for note in scores.notes) + "\n" * bool(paths)
                        + "".join(f"{path}\n" for path in paths)), end="")

    def _not_asked_notes(self, lines: Sequence[Line]) -> list[str]:
        """Returns a note on questions that the model was not asked."""
        reasons = [(line["question_id"], line["metadata"][NOT_ASKED]) for line in lines
                   if isinstance(line.get("metadata"), dict) and isinstance(line["metadata"].get(NOT_ASKED), str)]
        if not reasons:
            return []
        named = "; ".join(f"question {id!r}: {reason}" for id, reason in reasons[:MAX_EXAMPLES])
        return [f"{len(reasons):,} of {len(lines):,} questions of {self.task.question_path(self.data)} were not asked; "
                f"their answers are empty, and scored as {self.task.title} scores an empty one ({named})"]


def task_command(name: str) -> type[EvaluateCommand]:
    """Returns the command of a benchmark: the options of EvaluateCommand and those of the task."""
    kind = get_task(name)
    task = ("task", tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind))
    about = f"{kind.__doc__}\n\nNeeds {kind.required_files}."
    return dataclasses.make_dataclass(kind.__name__, [task], bases=(EvaluateCommand,), frozen=True, kw_only=True,
                                      namespace={"benchmark": name, "__doc__": about})


def _allgather(value: Any) -> list[Any]:
    """Returns the value of every process, of any size."""
    from llava_jax.parallel.processes import WORK_TIMEOUT, allgather_object

    text = json.dumps(value)
    rounds = max(allgather_object("sizes of the answers", -(-len(text) // MESSAGE_CHARS), WORK_TIMEOUT))
    pieces = [allgather_object("the answers", text[i * MESSAGE_CHARS : (i + 1) * MESSAGE_CHARS]) for i in range(rounds)]
    return [json.loads("".join(parts)) for parts in zip(*pieces, strict=True)]
