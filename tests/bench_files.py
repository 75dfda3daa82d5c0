"""Files of benchmarks with three questions each, which several tests start from."""

import base64
import io
import json

from PIL import Image

from llava_jax.evaluate.tasks.base import PHRASE_INSTRUCTION

IDS = ("0", "1", "2")
QUESTIONS = [{"question_id": id, "image": f"{id}.jpg", "text": f"What is {id}?{PHRASE_INSTRUCTION}", "category": "conv"}
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


def write(path, content):
    rows = path.suffix == ".jsonl" or path.name.startswith("coco_pope")
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if rows else json.dumps(content))


def write_all(folder) -> None:
    """The files of every benchmark, each in a folder of its name."""
    questions = [row | {"answer": "yes", "kind": "existence"} for row in QUESTIONS]
    more = {
        "mme": {"llava_mme.jsonl": [{"question_id": f"existence/{id}.jpg", "image": f"{id}.jpg",
                                     "text": f"Is {id} there?{PHRASE_INSTRUCTION}"} for id in IDS]},
        "mm-vet": {"llava-mm-vet.jsonl": QUESTIONS}, "scenes": {"questions.jsonl": questions},
        "llava-bench-coco": {"qa90_questions.jsonl": QUESTIONS,
                             "qa90_gpt4_answer.jsonl": [{"question_id": id, "text": "It is."} for id in IDS]},
    }
    for name, files in (FILES | more).items():
        (folder / name).mkdir()
        for file, content in files.items():
            write(folder / name / file, content)
    pairs = folder / "mme" / "MME_Benchmark_release_version" / "existence"
    pairs.mkdir(parents=True)
    for id in IDS:
        (pairs / f"{id}.txt").write_text(f"Is {id} there? Please answer yes or no.\tYes\n")
    for name, file in (("mmbench", "mmbench_dev_20230712.tsv"), ("mmbench-cn", "mmbench_dev_cn_20231003.tsv")):
        (folder / name).mkdir()
        (folder / name / file).write_text(table())


def table() -> str:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "png")
    image = base64.b64encode(picture.getvalue()).decode()
    rows = [["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"],
            *([id, "Q?", "", "cat", "dog", "", "", "A", "x", image] for id in IDS)]
    return "".join("\t".join(row) + "\n" for row in rows)
