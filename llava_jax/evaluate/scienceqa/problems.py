"""Reads ScienceQA's problems, from its own files or from Hugging Face's, and writes the files that LLaVA trains on.

`write_conversations` writes what LLaVA's converter writes, byte for byte, with its oddities: the formats AL and AE have
each other's content, and a question that starts with `Question: ` loses every `Question: ` in it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from llava_jax.cli import Flag, printable
from llava_jax.data.parquet_rows import ParquetRows, find_parquet
from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.question_file import read_json
from llava_jax.files import make_folder, matches_schema, write_file

Problem = Mapping[str, Any]
"""A problem as problems.json has it: question, choices, answer (an index), hint, lecture, solution, subject, grade, ...
`image` is a file's name, None, or the content of an image file from Hugging Face's rows."""

LETTERS = "ABCDE"
SIZES = {"train": 12_726, "val": 4_241, "test": 4_241}
"""Number of problems in the published splits."""
HUB = "derek-thomas/ScienceQA"
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}

INPUTS = {
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}\n",
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}\n",
    # These contain the reasoning, for an upper bound of its benefit.
    "QCML": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {options}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {options}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {options}\n",
}
OUTPUTS = {
    "A": "Answer: The answer is {answer}.",
    "AL": "Answer: The answer is {answer}. BECAUSE: {solution}",
    "AE": "Answer: The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "Answer: The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "Answer: The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "Answer: {lecture} The answer is {answer}.",
    "EA": "Answer: {solution} The answer is {answer}.",
    "LEA": "Answer: {lecture} {solution} The answer is {answer}.",
    "ELA": "Answer: {solution} {lecture} The answer is {answer}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {answer}.",
}


def compose(problem: Problem, prompt_format: str) -> tuple[str, str]:
    """Returns question and answer of a problem in a format such as "QCM-LEA", without a mark for the image.

    Raises UserError for an unknown format, KeyError for a field that the problem lacks.
    """
    question_format, answer_format = _parse_format(prompt_format)
    # LLaVA writes line breaks as \\n and reads them back, so a \\n in the text becomes a line break as well.
    lecture, solution = (problem[key].replace("\\n", "\n") for key in ("lecture", "solution"))
    parts = {
        "question": problem["question"],
        "context": problem["hint"].strip() or "N/A",
        "options": " ".join(f"({letter}) {x}" for letter, x in zip(LETTERS, problem["choices"], strict=False)),
        "answer": LETTERS[problem["answer"]],
        "lecture": lecture,
        "solution": solution,
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }
    question = _tidy(INPUTS[question_format].format(**parts), "Question: ")
    return question, _tidy(OUTPUTS[answer_format].format(**parts), "Answer: ")


def compose_listed(problem: Problem) -> str:
    """Returns the question in the layout of LLaVA-1.5's published run: the hint, if any, and one choice per line."""
    hint = problem["hint"].strip()
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    lines = [*([f"Context: {hint}"] if hint else []), problem["question"], *choices]
    return "\n".join(lines).replace("  ", " ").strip()


def read_listed(data: str, split: str, problems: Mapping[str, Problem]) -> dict[str, str] | None:
    """Returns the questions of LLaVA's eval.zip for a split by id, without image marks, or None without that file.

    The converter's file of the same name has another layout, and gives None. Raises UserError for a file of another
    form or version than `problems`.
    """
    path = os.path.join(data, f"llava_{split}_CQM-A.json")
    if not os.path.isfile(path) or not os.path.isfile(os.path.join(data, "problems.json")):
        return None
    schema = [{"id": str, "conversations": [{"value": str}]}]
    rows = read_json(path, lambda x: matches_schema(x, schema) and all(row["conversations"] for row in x),
                     "not LLaVA's questions: [{id, conversations: [{value}]}]")
    questions = {row["id"]: row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows}
    if missing := [pid for pid in problems if pid not in questions]:
        raise UserError(f"{path}: {len(missing):,} problems of the split {split} are not in it, the first is "
                        f"{missing[0]!r}; it is of another version than problems.json")
    with_image = {row["id"] for row in rows if "image" in row}
    if other := [pid for pid, problem in problems.items() if (pid in with_image) != (problem["image"] is not None)]:
        raise UserError(f"{path}: problem {other[0]!r} has {'an' if other[0] in with_image else 'no'} image there, "
                        "unlike in problems.json; they are of different versions")
    if all(questions[pid] == compose(problem, "CQM-A")[0] for pid, problem in problems.items()):
        return None
    return {pid: questions[pid] for pid in problems}


def read_problems(data: str, split: str = "test") -> dict[str, Problem]:
    """Returns the problems of a split by id, in the split's order.

    `data` is a folder with problems.json and pid_splits.json, a folder of Hugging Face's parquet files, or one such
    file. Hugging Face's rows have no ids, and get test-0, test-1, ... Raises UserError for other files.
    """
    path = os.path.join(data, "problems.json")
    if os.path.exists(path):
        problems = _read_json_files(data, split)
    elif os.path.isfile(data) or find_parquet(data):
        path, problems = data, _read_rows(data, split)
    else:
        raise UserError(f"{data}: has neither problems.json, with pid_splits.json and images, nor Hugging Face's "
                        f"parquet files of ScienceQA; scienceqa-data {data} --download gets these")
    if not problems:
        raise UserError(f"{data}: the split {split} has no problems")
    for pid, problem in problems.items():
        _check(problem, f"{path}, problem {pid}")
    return problems


def find_image(data: str, split: str, pid: str, problem: Problem) -> str | bytes | None:
    """Returns a problem's image, the path of its file (where it is, or should be), or None if it has no image."""
    name = problem["image"]
    if name is None or isinstance(name, bytes):
        return name
    folder = problem.get("split") or split  # minitest is a part of test, trainval is train and val
    paths = [os.path.join(data, *parts, pid, name) for parts in (("images", folder), (folder,), ("images",), ())]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def write_conversations(problems: Mapping[str, Problem], path: str, prompt_format: str, kind: str = "llava") -> None:
    """Writes one file as LLaVA's converter does, with images named `ID/image.png`.

    The kind "llava" is a list of conversations, to train on. "jsonl" is lines with instruction and output.
    """
    rows = []
    for pid, problem in problems.items():
        question, answer = compose(problem, prompt_format)
        row = {"id": pid}
        if problem["image"] is not None:
            row["image"] = os.path.join(pid, problem["image"])
            question += "\n<image>"
        if kind == "llava":
            row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        else:
            row |= {"instruction": question, "output": answer}
        rows.append(row)
    write_file(path, json.dumps(rows, indent=2) if kind == "llava" else "".join(json.dumps(row) + "\n" for row in rows))


def unpack(data: str, out: str, splits: Sequence[str]) -> None:
    """Writes Hugging Face's rows in ScienceQA's layout: problems.json, pid_splits.json, images/SPLIT/ID/image.png."""
    problems, ids = {}, {}
    for split in splits:
        in_split = read_problems(data, split)
        ids[split] = list(in_split)
        for pid, problem in in_split.items():
            image = problem["image"]
            if image is not None:
                folder = os.path.join(out, "images", split, pid)
                make_folder(folder)
                write_file(os.path.join(folder, "image.png"), image)
            problems[pid] = {**problem, "image": None if image is None else "image.png", "split": split}
    make_folder(out)
    write_file(os.path.join(out, "pid_splits.json"), json.dumps(ids))
    write_file(os.path.join(out, "problems.json"), json.dumps(problems))


def download(folder: str) -> None:
    """Downloads Hugging Face's parquet files (0.6 GB), and continues an interrupted download."""
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(HUB, repo_type="dataset", allow_patterns="data/*.parquet", local_dir=folder)
    except Exception as error:  # the library raises its own errors and those of two HTTP libraries
        why = " ".join(str(error).split())
        raise UserError(f"{HUB} cannot be downloaded to {folder} ({why:.200}); try again, or put its parquet files "
                        "there yourself") from None


def _parse_format(prompt_format: str) -> tuple[str, str]:
    question, _, answer = prompt_format.partition("-")
    if question not in INPUTS or answer not in OUTPUTS:
        raise UserError(f"format {prompt_format!r}: it must be QUESTION-ANSWER, such as QCM-LEA, with one of "
                        f"{', '.join(INPUTS)} and one of {', '.join(OUTPUTS)}")
    return question, answer


def _tidy(text: str, opening: str) -> str:
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(opening, "") if text.startswith(opening) else text


def _read_json_files(data: str, split: str) -> dict[str, Problem]:
    problems, splits = (
        read_json(os.path.join(data, name), lambda x: isinstance(x, dict),
                  "must hold an object, and is none of ScienceQA's files") for name in ("problems.json",
                                                                                        "pid_splits.json"))
    if split not in splits or not matches_schema(splits[split], [str]):
        raise UserError(f"{os.path.join(data, 'pid_splits.json')}: there is no split {split!r}; there are "
                        f"{', '.join(splits)}")
    if missing := [pid for pid in splits[split] if pid not in problems]:
        raise UserError(f"{data}/problems.json: {len(missing):,} problems of the split {split} are not in it, the "
                        f"first is {missing[0]!r}; it is of another version than pid_splits.json")
    return {pid: problems[pid] for pid in splits[split]}


def _read_rows(data: str, split: str) -> dict[str, Problem]:
    rows = ParquetRows(data if os.path.isfile(data) else f"{data}:{HUB_SPLITS.get(split, split)}")
    return {f"{split}-{i}": {**row, "image": row["image"]["bytes"] if row.get("image") else None}
            for i, row in enumerate(rows[i] for i in range(len(rows)))}


REQUIRED = {"question": str, "choices": list, "answer": int, "hint": str, "lecture": str, "solution": str,
            "image": str | bytes | None}
OPTIONAL = {"split": str | None, "subject": str | None}


def _check(problem: Any, where: str) -> None:
    """Raises UserError for a problem without the fields that every use of it needs."""
    if not isinstance(problem, Mapping):
        raise UserError(f"{where}: must be an object")
    for key, schema in (REQUIRED | OPTIONAL).items():
        if key not in problem and key in REQUIRED:
            raise UserError(f"{where}: has no {key!r}; it has {', '.join(map(str, problem))}")
        value = problem.get(key)
        if not matches_schema(value, schema) or key == "choices" and not 0 < len(value) <= len(LETTERS) \
                or key == "answer" and not 0 <= value < len(problem["choices"]):
            raise UserError(f"{where}: {key!r} is {value!r:.80}, which is not ScienceQA's form of it")


@dataclass(frozen=True)
class ScienceQAData:
    """Makes ScienceQA's training and test files, from its own files or from Hugging Face's.

    Hugging Face's rows are first written in ScienceQA's own layout. A format is INPUT-OUTPUT as in the paper: QCM
    (question, context, choices) or CQM, and for example LEA (lecture, explanation, then the answer) or A."""

    data: tyro.conf.Positional[str]
    """Folder with problems.json, pid_splits.json and images, or with Hugging Face's parquet files, or one of these."""
    out: str = ""
    """Folder for the files; default: the folder of DATA."""
    splits: tuple[str, ...] = ("train", "val", "test")
    """Splits of pid_splits.json: train, val, test, trainval, minival, minitest."""
    formats: tuple[str, ...] = ("QCM-LEA", "CQM-A")
    """Formats of the prompts. Each gives one file per split."""
    kind: Literal["llava", "jsonl"] = "llava"
    """Form of the files: llava_SPLIT_FORMAT.json with conversations, or scienceqa_SPLIT_FORMAT.jsonl with instruction
    and output."""
    download: Flag = False
    """Whether to download the parquet files from Hugging Face into DATA first (0.6 GB)."""
    overwrite: Flag = False
    """Whether to replace existing files."""

    def run(self) -> int:
        for prompt_format in self.formats:
            _parse_format(prompt_format)
        single = os.path.isfile(self.data)
        out = self.out or (os.path.dirname(self.data) if single else self.data)
        paths = {(split, name): os.path.join(out, self._name(split, name))
                 for split in self.splits for name in self.formats}
        self._refuse(paths.values())
        if self.download:
            download(self.data)
        source = self.data
        if not os.path.exists(os.path.join(source, "problems.json")) and (single or find_parquet(source)):
            if single and len(self.splits) > 1:
                raise UserError(f"{source}: one file is one split; say which, as in --splits test")
            self._refuse([os.path.join(out, "problems.json")])
            names = [os.path.basename(path) for path in find_parquet(source)]
            unpack(source, out, self.splits if single else [
                split for split, start in HUB_SPLITS.items() if any(name.startswith(start) for name in names)])
            source = out
        make_folder(out)
        for split in self.splits:
            problems = read_problems(source, split)
            images = [find_image(source, split, pid, problem) for pid, problem in problems.items()]
            missing = [path for path in images if path is not None and not os.path.exists(path)]
            suffix = f"; {len(missing):,} images are missing, the first is {printable(missing[0])}" if missing else ""
            count = len(images) - images.count(None)
            print(f"{source}, {split}: {len(problems):,} problems, {count:,} with an image{suffix}")
            for prompt_format in self.formats:
                write_conversations(problems, paths[split, prompt_format], prompt_format, self.kind)
                print(f"{paths[split, prompt_format]}: {len(problems):,} records")
        return 0

    def _name(self, split: str, prompt_format: str) -> str:
        return (f"llava_{split}_{prompt_format}.json" if self.kind == "llava" else
                f"scienceqa_{split}_{prompt_format}.jsonl")

    def _refuse(self, paths: Iterable[str]) -> None:
        for path in paths:
            if os.path.exists(path) and not self.overwrite:
                raise UserError(f"{path}: exists already; add --overwrite to replace it")
