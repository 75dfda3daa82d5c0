"""The paper's second scenario from end to end, on a made-up ScienceQA and with the miniature's backbones."""

import json
from pathlib import Path

import pytest
from PIL import Image

import llava_jax
from llava_jax.evaluate.scienceqa.task import ScienceQA
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.inference.llava import Request
from llava_jax.train import __main__ as train

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six problems, three of them about a picture, which are all there is to train on and to test on; and captions."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = {}
    for i, (name, colour) in enumerate(COLOURS.items()):
        common = {"choices": [*COLOURS], "answer": i, "lecture": "Light has colours.", "task": "closed choice",
                  "topic": "", "category": "", "skill": "", "grade": f"grade{5 + i}", "split": "train"}
        problems[str(2 * i)] = common | {
            "question": "Which colour is this?", "hint": "", "image": "image.png", "subject": "natural science",
            "solution": f"The picture is {name}."}
        problems[str(2 * i + 1)] = common | {
            "question": "Which word is it?", "hint": f"The word is {name}.", "image": None,
            "subject": "language science", "solution": f"The word is {name}."}
        picture = Image.new("RGB", (60, 60), colour)
        (folder / "images" / "train" / str(2 * i)).mkdir(parents=True)
        picture.save(folder / "images" / "train" / str(2 * i) / "image.png")
        picture.save(folder / f"{name}.png")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems), "test": list(problems)}))
    (folder / "captions.json").write_text(json.dumps([
        {"id": name, "image": f"{name}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": name}]}
        for name in COLOURS]))
    return folder


@pytest.mark.slow
def test_the_recipe_and_the_benchmark_make_a_model_that_reasons_and_is_right(folder):
    mini = Path(llava_jax.__file__).parent / "data" / "mini"
    assert train.main([
        "scienceqa_13b", "--output", str(folder / "run"), "--model.template", "mistral_instruct",
        "--model.vision", str(mini / "vision"), "--model.language", str(mini / "language"),
        "--stages.align.data.path", str(folder / "captions.json"), "--stages.align.data.image_root", str(folder),
        "--stages.align.steps", "2", "--stages.align.batch_size", "2", "--stages.align.data.sequence_length", "96",
        "--stages.align.data.workers", "0", "--stages.scienceqa.data.workers", "0",
        "--stages.scienceqa.data.path", str(folder / "llava_train_QCM-LEA.json"),
        "--stages.scienceqa.data.image_root", str(folder / "images" / "train"),
        "--stages.scienceqa.steps", "100", "--stages.scienceqa.batch_size", "1",
        "--stages.scienceqa.data.sequence_length", "512",
        "--stages.scienceqa.remat", "none", "--stages.align.remat", "none",
        "--stages.scienceqa.learning_rates", "(projector|decoder)/.*", "2e-3", "vision/.*", "None",
    ]) == 0

    llava, task = llava_jax.load(folder / "run" / "model"), ScienceQA(style="reason")
    questions = task.load(str(folder))
    completions = llava.batch([Request(question.text, question.images, 100) for question in questions])
    texts = [completion.text.strip() for completion in completions]
    answers = [Answer(question.id, text, question.prompt) for question, text in zip(questions, texts, strict=True)]
    scores = task.score(str(folder), questions, answers)
    assert texts[::2] == [f"Light has colours. The picture is {name}. The answer is {letter}."
                          for name, letter in zip(COLOURS, "ABC", strict=True)]
    assert scores.main == "Avg" and scores.figures["Avg"] == scores.figures["IMG"] == 100
