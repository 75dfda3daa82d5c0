"""Files of benchmarks with three questions each, which several tests start from."""

import json

from llava_jax.benchmarks.bench import SHORT

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


def write(path, content):
    rows = path.suffix == ".jsonl" or path.name.startswith("coco_pope")
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if rows else json.dumps(content))
