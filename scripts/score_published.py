"""Scores LLaVA's published answers with these tasks, and compares the prompts with the original's.

    python scripts/score_published.py FOLDER

FOLDER has published files, which are not part of this package:

- llava/: github haotian-liu/LLaVA with playground/data/eval of commit 32cebc38 (answers, reviews, uploads)
- pope-e3e39262/: output/coco of github AoiDragon/POPE at that commit
- derived/mme: llava_mme.jsonl and the benchmark's release; derived/mmbench: the table with the right letters
- derived/scienceqa: problems.json, pid_splits.json, and answers_13b.jsonl, which has the answers of the published
  llava-v1.5-13b_output.jsonl as lines
- derived/judge: answers to LLaVA-Bench (COCO) in candidate.jsonl, and in original_messages_sha256.json the hashes of
  the requests of LLaVA's script about them
- derived/tokenizers/llama_legacy_false, and derived/prompts/ids_legacy_false.jsonl: lines of [benchmark, id, the first
  12 hex digits of the sha256 of json.dumps(ids)], with the ids of LLaVA's own conversation.py and
  tokenizer_image_token

Missing files are left out with a message. The script prints each figure beside the published one, and for each
benchmark the number of prompts with the original's ids. Exit code 1 if anything differs, 2 if nothing was compared.
"""

import hashlib
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import printable
from llava_jax.evaluate.judge.reviews import read_reviews, summarize_as_published
from llava_jax.evaluate.judge.rules import JudgeRules
from llava_jax.evaluate.runner import answer_file, generation
from llava_jax.evaluate.scienceqa.task import ScienceQA
from llava_jax.evaluate.tasks.base import Question, Task
from llava_jax.evaluate.tasks.gqa import Gqa
from llava_jax.evaluate.tasks.llava_bench import LlavaBenchCoco
from llava_jax.evaluate.tasks.mmbench import MMBench
from llava_jax.evaluate.tasks.mme import Mme
from llava_jax.evaluate.tasks.mmvet import MMVet
from llava_jax.evaluate.tasks.pope import Pope
from llava_jax.evaluate.tasks.question_file import QuestionFileTask
from llava_jax.evaluate.tasks.textvqa import TextVqa
from llava_jax.evaluate.tasks.vqa import VizWiz
from llava_jax.files import read_json_lines
from llava_jax.inference.llava import as_messages
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_prompt
from llava_jax.text.tokenizer import Tokenizer

EVAL = "llava/playground/data/eval"
RESULTS = "llava/llava/eval/table/results"


class Row(NamedTuple):
    """A figure. `published` has the digits of the publication."""

    name: str
    ours: str
    published: str


class Folder:
    """The published files, and a scratch folder with links to them in the tasks' layout."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = root, scratch

    def __call__(self, path: str) -> Path:
        """Returns a path. Raises FileNotFoundError if it is missing."""
        if not (self.root / path).exists():
            raise FileNotFoundError(path)
        return self.root / path

    def data(self, name: str, **files: str) -> str:
        """Makes a folder with links: name with `__` for the dot -> path in the root. Returns its path."""
        folder = self.scratch / name
        folder.mkdir(exist_ok=True)
        for file, path in files.items():
            link = folder / file.replace("__", ".")
            if not link.is_symlink():
                link.symlink_to(self(path).resolve())
        return str(folder)


def score(task: Task, data: str, path: Path) -> tuple[Any, list[Question], list]:
    """Scores a complete file of answers to exactly these prompts."""
    questions = task.load(data)
    lines, _ = answer_file.read(str(path))
    answer_file.check(str(path), task.title, questions, lines, task.uses_answer_order)
    given = [answer_file.to_answer(line) for line in lines]
    return task.score(data, questions, given), questions, given


def pope(folder: Folder) -> Iterator[Row]:
    data = folder.data("pope", llava_pope_test__jsonl=f"{EVAL}/pope/llava_pope_test.jsonl", coco="pope-e3e39262")
    scores, _, _ = score(Pope(), data, folder(f"{EVAL}/pope/answers/llava-v1.5-13b.jsonl"))
    yield Row("POPE F1, LLaVA-1.5 13B", f"{scores.figures['F1']:.2f}", "85.95")


def mme(folder: Folder) -> Iterator[Row]:
    scores, _, _ = score(Mme(), str(folder("derived/mme")), folder(f"{EVAL}/MME/answers/llava-v1.5-13b.jsonl"))
    yield Row("MME perception, LLaVA-1.5 13B", f"{scores.figures['perception']:.2f}", "1531.32")


def mmbench(folder: Folder) -> Iterator[Row]:
    path = folder(f"{EVAL}/mmbench/answers/mmbench_dev_20230712/llava-v1.5-13b.jsonl")
    scores, _, _ = score(MMBench(), str(folder("derived/mmbench")), path)
    yield Row("MMBench dev, LLaVA-1.5 13B", f"{scores.figures['circular']:.1f}", "67.7")


def scienceqa(folder: Folder) -> Iterator[Row]:
    data = str(folder("derived/scienceqa"))
    scores, _, _ = score(ScienceQA(), data, folder("derived/scienceqa/answers_13b.jsonl"))
    result = json.loads(folder(f"{EVAL}/scienceqa/answers/llava-v1.5-13b_result.json").read_text())
    yield Row("ScienceQA images, LLaVA-1.5 13B", f"{scores.figures['IMG-accuracy']:.2f}", "71.64")
    yield Row("ScienceQA all, LLaVA-1.5 13B", f"{scores.figures['Avg']:.2f}", f"{result['acc']:.2f}")
    for name, file in (("13B v0", "test_sqa_llava_13b_v0.json"),
                       ("13B v1.3", "test_sqa_llava_lcs_558k_sqa_12e_vicuna_v1_3_13b.json")):
        result = json.loads(folder(f"{RESULTS}/{file}").read_text())
        task = ScienceQA(style="reason")
        questions = task.load(data)
        lines = [{"question_id": question.id, "text": result["outputs"][question.id]} for question in questions]
        scores = task.score(data, questions, [answer_file.to_answer(line) for line in lines])
        yield Row(f"ScienceQA all, LLaVA {name}", f"{scores.figures['Avg']:.2f}", f"{result['acc']:.2f}")


def wild(folder: Folder) -> Iterator[Row]:
    for size, published in (("13b", "72.5"), ("7b", "65.4")):
        name = f"{EVAL}/llava-bench-in-the-wild/reviews/llava-v1.5-{size}-eval"
        paths = [folder(f"{name}{run}.jsonl") for run in (1, 2, 3)]
        ratios = [summarize_as_published(read_reviews(str(path)))["all"].ratio for path in paths]
        yield Row(f"LLaVA-Bench (In-the-Wild), LLaVA-1.5 {size.upper()}", f"{statistics.fmean(ratios):.1f}", published)


def uploads(folder: Folder) -> Iterator[Row]:
    """Counts the equal answers in the uploads."""
    for size in ("7b", "13b"):
        data = str(folder(f"{EVAL}/mm-vet"))
        ours = json.loads(_upload(folder, MMVet(), data, f"{EVAL}/mm-vet/answers/llava-v1.5-{size}.jsonl").read_text())
        theirs = json.loads(folder(f"{EVAL}/mm-vet/results/llava-v1.5-{size}.json").read_text())
        yield _same(f"MM-Vet's upload, LLaVA-1.5 {size.upper()}", ours, theirs)
    data, file = str(folder(f"{EVAL}/vizwiz")), "answers{}/llava-v1.5-13b.json{}"
    ours = json.loads(_upload(folder, VizWiz(), data, f"{EVAL}/vizwiz/{file.format('', 'l')}").read_text())
    theirs = json.loads(folder(f"{EVAL}/vizwiz/{file.format('_upload', '')}").read_text())
    yield _same("VizWiz's upload, LLaVA-1.5 13B", dict(map(dict.values, ours)), dict(map(dict.values, theirs)))
    file = "mmbench_dev_20230712/llava-v1.5-13b"
    ours = _upload(folder, MMBench(), str(folder("derived/mmbench")), f"{EVAL}/mmbench/answers/{file}.jsonl")
    theirs = folder(f"{EVAL}/mmbench/answers_upload/{file}.xlsx")
    yield _same("MMBench's upload, LLaVA-1.5 13B", *map(_predictions, (ours, theirs)))


def _upload(folder: Folder, task: Task, data: str, path: str) -> Path:
    _, questions, given = score(task, data, folder(path))
    return Path(task.write_submission(data, questions, given, str(folder.scratch))[0])


def _predictions(path: Path) -> dict[int, Any]:
    import openpyxl

    head, *rows = openpyxl.load_workbook(path, read_only=True).active.iter_rows(values_only=True)
    return {row[head.index("index")]: row[head.index("prediction")] for row in rows}


def _same(name: str, ours: dict, theirs: dict) -> Row:
    equal = sum(ours.get(key) == value for key, value in theirs.items())
    return Row(name, f"{equal:,}", f"{max(len(ours), len(theirs)):,}")


def judge(folder: Folder) -> Iterator[Row]:
    """Counts the judge's requests that equal those of LLaVA's script."""
    task, rules = LlavaBenchCoco(), JudgeRules.load(str(folder("llava/llava/eval/table/rule.json")))
    cases = task.cases(task.paths(str(folder("llava/playground/data/coco2014_val_qa_eval"))))
    path = str(folder("derived/judge/candidate.jsonl"))
    candidates = {row["question_id"]: row["text"] for _, row in read_json_lines(path)}
    wanted = json.loads(folder("derived/judge/original_messages_sha256.json").read_text())
    messages = (json.dumps(rules.messages(case, candidates[case.question.id])) for case in cases)
    ours = [hashlib.sha256(text.encode()).hexdigest() for text in messages]
    equal = sum(own == published for own, published in zip(ours, wanted, strict=True))
    yield Row("the judge's requests, LLaVA-Bench (COCO)", f"{equal:,}", f"{len(wanted):,}")


def prompts(folder: Folder) -> Iterator[Row]:
    """Counts the prompts with the original's ids."""
    wanted: dict[str, list] = {}
    for line in folder("derived/prompts/ids_legacy_false.jsonl").read_text().splitlines():
        name, id, digest = json.loads(line)
        wanted.setdefault(name, []).append((id, digest))
    tokenizer = Tokenizer.load(folder("derived/tokenizers/llama_legacy_false"))
    read: dict[str, Callable[[], Iterable[Question]]] = {
        "pope": lambda: _read(Pope(), folder(f"{EVAL}/pope")), "mme": lambda: _read(Mme(), folder("derived/mme")),
        "vizwiz": lambda: _read(VizWiz(), folder(f"{EVAL}/vizwiz")),
        "gqa": lambda: _read(Gqa(), folder(f"{EVAL}/gqa")),
        "textvqa": lambda: _read(TextVqa(), folder(f"{EVAL}/textvqa")),
        "mmvet": lambda: _read(MMVet(), folder(f"{EVAL}/mm-vet")),
        "coco": lambda: _read(LlavaBenchCoco(), folder("llava/playground/data/coco2014_val_qa_eval")),
        "wild": lambda: _wild_questions(folder), "mmbench": lambda: MMBench().load(str(folder("derived/mmbench"))),
        "scienceqa": lambda: ScienceQA().load(str(folder("derived/scienceqa"))),
    }
    for name, pairs in wanted.items():
        try:
            ours = Counter((question.id, _digest(question, tokenizer)) for question in read[name]())
        except FileNotFoundError as missing:
            print(f"prompts of {name} left out: {missing} is not there")
            continue
        yield Row(f"prompts of {name}", f"{(Counter(pairs) & ours).total():,}", f"{len(pairs):,}")


def _read(task: QuestionFileTask, folder: Path) -> list[Question]:
    """Returns the questions without reading the labels that a task's own `load` needs."""
    return QuestionFileTask.load(task, str(folder))


def _wild_questions(folder: Folder) -> Iterator[Question]:
    """Yields the questions from the answer files, because the question file is not in LLaVA's repository."""
    for size in ("7b", "13b"):
        path = folder(f"{EVAL}/llava-bench-in-the-wild/answers/llava-v1.5-{size}.jsonl")
        yield from (Question(row["question_id"], row["prompt"], ("image",)) for _, row in read_json_lines(str(path)))


def _digest(question: Question, tokenizer: Tokenizer) -> str:
    """Returns a hash of a LLaVA-1.5's prompt, where an image is one token as in the original."""
    request = generation.make_request(question, Task())
    messages = as_messages(request.messages, len(request.images))
    ids = encode_prompt(messages, "vicuna_v1", tokenizer, 1, request.assistant_prefix, request.verbatim).tolist()
    assert ids.count(IMAGE_TOKEN_ID) == len(question.images)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def main(args: Sequence[str]) -> int:
    if len(args) != 1 or args[0] in ("-h", "--help"):
        print(__doc__)
        return 2 * (len(args) != 1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(Path(args[0]), Path(scratch))
        for check in (pope, mme, mmbench, scienceqa, wild, uploads, judge, prompts):
            try:
                for row in check(folder):
                    rows.append(row)
                    sign = "" if row.ours == row.published else "   DIFFERS"
                    print(f"{row.name:45} {row.ours:>10} {row.published:>10}{sign}", flush=True)
            except FileNotFoundError as missing:
                print(f"{check.__name__}: left out from here, {printable(str(missing))} is not there")
    differ = sum(row.ours != row.published for row in rows)
    print(f"{len(rows)} figures, ours beside the published; {differ} differ")
    return 2 if not rows else int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
