"""Benchmarks' own files with something wrong in them: one line that names what is wrong, or a score, but no crash."""

import copy
import json
import random

import pytest

from llava_jax.benchmarks.bench import SHORT, Answer, get
from llava_jax.errors import UserError

IDS = ("0", "1", "2")
QUESTIONS = [{"question_id": id, "image": f"{id}.jpg", "text": f"What is {id}?{SHORT}", "category": "conv"}
             for id in IDS]
HUMAN = [{"answer": "red"}] * 10
PROBLEM = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "lecture": "", "solution": "",
           "image": None, "subject": "natural science", "grade": "grade1"}
GQA = {"question": "What is it?", "answer": "red", "isBalanced": True, "groups": {"global": "colour"},
       "types": {"structural": "query", "semantic": "attr", "detailed": "colour"},
       "semantic": [{"operation": "select", "argument": "x"}]}
PROBE = {"text": "Where is it?", "answer": "left", "choices": ["left", "right"], "category": "left/right", "set": "a",
         "ko": {"text": "?", "answer": "왼쪽", "choices": ["왼쪽", "오른쪽"]}}
ANNOTATED = [{"question_id": id, "image": f"{id}.jpg", "answers": HUMAN, "answer_type": "other"} for id in IDS]

FILES = {
    "pope": {"llava_pope_test.jsonl": [row | {"category": "random"} for row in QUESTIONS],
             "coco_pope_random.json": [{"image": f"{id}.jpg", "label": "yes"} for id in IDS]},
    "textvqa": {"llava_textvqa_val_v051_ocr.jsonl": QUESTIONS, "TextVQA_0.5.1_val.json": {"data": [
        {"image_id": id, "question": f"What is {id}?", "answers": ["red"] * 10} for id in IDS]}},
    "gqa": {"llava_gqa_testdev_balanced.jsonl": QUESTIONS, "testdev_balanced_questions.json": dict.fromkeys(IDS, GQA),
            "testdev_balanced_choices.json": dict.fromkeys(IDS, {"valid": ["red"], "plausible": ["red"]})},
    "seed": {"llava-seed-bench.jsonl": [row | {"question_id": n} for n, row in enumerate(QUESTIONS)],
             "SEED-Bench.json": {"question_type": {"Scene": 1}, "questions": [
        {"question_id": id, "question_type_id": 1, "data_type": "image", "answer": "A"} for id in IDS]}},
    "vqav2": {"llava_vqav2_mscoco_test-dev2015.jsonl": QUESTIONS, "annotations.json": {"annotations": ANNOTATED}},
    "vizwiz": {"llava_test.jsonl": QUESTIONS, "annotations.json": ANNOTATED},
    "scienceqa": {"problems.json": dict.fromkeys(IDS, PROBLEM), "pid_splits.json": {"test": list(IDS)}},
    "spatial": {"probes.jsonl": [row | PROBE for row in QUESTIONS]},
    "multilingual": {"probes.jsonl": [row | PROBE for row in QUESTIONS]},
    "llava-bench-wild": {"questions.jsonl": QUESTIONS, "context.jsonl": [],
                         "answers_gpt4.jsonl": [{"question_id": id, "text": "It is."} for id in IDS]},
}
WRONG = (None, 7, -1, True, 1e400, "", "other", "\ud800", [], [None], {}, {"a": 1})


def places(value, path=()):
    """Of every item and field of a JSON value, the way there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def write(path, content):
    rows = path.suffix == ".jsonl" or path.name.startswith("coco_pope")
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if rows else json.dumps(content))


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_is_wrong_in_a_file_is_a_crash(name, tmp_path):
    options = {"annotations": str(tmp_path / "annotations.json")} if name in ("vqav2", "vizwiz") else {}
    bench = get(name)(**options)
    for file, content in FILES[name].items():
        write(tmp_path / file, content)
    questions = bench.read(str(tmp_path))
    answers = [Answer(question.id, "red", question.text if question.prompt is None else question.prompt)
               for question in questions]
    assert bench.score(str(tmp_path), questions, answers).items  # as they are, the files are right
    rng, told = random.Random(name), 0
    for file, content in FILES[name].items():
        for way in places(content):
            wrong = copy.deepcopy(content)
            target = wrong
            for key in way[:-1]:
                target = target[key]
            for value in rng.sample(WRONG, 6):
                target[way[-1]] = value
                write(tmp_path / file, wrong)
                try:
                    scores = bench.score(str(tmp_path), bench.read(str(tmp_path)), answers)
                except UserError as error:
                    told += 1
                    assert len(str(error).splitlines()) == 1
                else:
                    assert all(isinstance(item.category, str) for item in scores.items), (way, value)
        write(tmp_path / file, content)
    assert told > 20
