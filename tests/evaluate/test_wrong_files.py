"""Benchmarks' own files with something wrong in them: one line that names what is wrong, or a score, but no crash."""

import copy
import random

import pytest
from bench_files import FILES, write

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, get_task

WRONG = (None, 7, -1, True, 1e400, "", "other", "\ud800", [], [None], {}, {"a": 1})


def places(value, path=()):
    """Of every item and field of a JSON value, the way there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("each", [1, pytest.param(len(WRONG), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_nothing_that_is_wrong_in_a_file_is_a_crash(name, each, tmp_path):
    options = {"annotations": str(tmp_path / "annotations.json")} if name in ("vqav2", "vizwiz") else {}
    task = get_task(name)(**options)
    for file, content in FILES[name].items():
        write(tmp_path / file, content)
    questions = task.load(str(tmp_path))
    answers = [Answer(question.id, "red", question.text if question.prompt is None else question.prompt)
               for question in questions]
    assert task.score(str(tmp_path), questions, answers).items  # as they are, the files are right
    rng, told = random.Random(name), 0
    for file, content in FILES[name].items():
        for way in places(content):
            wrong = copy.deepcopy(content)
            target = wrong
            for key in way[:-1]:
                target = target[key]
            for value in rng.sample(WRONG, each):
                target[way[-1]] = value
                write(tmp_path / file, wrong)
                try:
                    scores = task.score(str(tmp_path), task.load(str(tmp_path)), answers)
                except UserError as error:
                    told += 1
                    assert len(str(error).splitlines()) == 1
                else:
                    assert all(isinstance(item.category, str) for item in scores.items), (way, value)
        write(tmp_path / file, content)
    assert told > 3 * each
