import json

import pytest

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import LETTER_INSTRUCTION, PHRASE_INSTRUCTION, TASKS, Answer, Task, get_task
from llava_jax.evaluate.tasks.mmvet import MMVet
from llava_jax.evaluate.tasks.question_file import QuestionFileTask
from llava_jax.files import matches_schema

SHORT_TASKS = ("pope", "mme", "vqav2", "vizwiz", "gqa", "textvqa", "mmbench", "mmbench-cn", "seed", "mm-vet")


@pytest.mark.parametrize("name", SHORT_TASKS)
def test_registered_and_described(name):
    task = get_task(name)
    assert name in TASKS and issubclass(task, Task) and task.title and task.required_files and task.__doc__
    assert task() == task()  # every option has a default
    assert task.max_new_tokens == (1024 if name.startswith("mm") and name != "mme" else 128)
    assert task.uses_answer_order == (name in ("pope", "mme"))
    assert task.uses_prompts == (name in ("mme", "textvqa"))


@pytest.mark.parametrize("name", SHORT_TASKS)
def test_folder_that_is_not_there(name, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        get_task(name)().load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such file"):
        get_task(name)().load(str(tmp_path))


@pytest.mark.parametrize(("value", "form", "good"), [
    (1, int, True), ("1", int, False), (True, int, False), (True, bool, True), (True, int | str, False),
    (None, str | None, True), (None, str, False), ([], [int], True), ([1, 2], [int], True), ([1, None], [int], False),
    ({}, [int], False), ({"a": 1, "b": 2}, {"a": int}, True), ({"b": 1}, {"a": int}, False), ([], {}, False),
    ({"a": [{"b": "x"}]}, {"a": [{"b": str}]}, True), ({"a": [{"b": 1}]}, {"a": [{"b": str}]}, False),
])
def test_forms_of_json(value, form, good):
    assert matches_schema(value, form) is good


def test_instructions():
    assert PHRASE_INSTRUCTION == "\nAnswer the question using a single word or phrase."
    assert LETTER_INSTRUCTION == "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize("line, message", [
    ('{"question_id": null, "image": "x.jpg", "text": "Q?"}', "line 2.*'question_id' is of another kind"),
    ('{"question_id": 1, "text": "Q?"}', "line 2.*'image' is missing"),
    ("[1]", "line 2: not a JSON object"), ('{"question_id"', "line 2: broken JSON"),
    ("[" * 10**5, "line 2: broken JSON"), ('{"a": "\udcff"}', "line 2"),
])
def test_broken_rows(tmp_path, line, message):
    good = '{"question_id": 0, "image": "x.jpg", "text": "Q?"}\n\n'
    path = tmp_path / "llava-mm-vet.jsonl"
    path.write_bytes(good.replace("\n\n", "\n").encode() + line.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        MMVet().load(str(tmp_path))


def test_mm_vet(tmp_path):
    rows = [{"image": f"v1_{n}.png", "text": f"What\nis {n}?", "category": "conv", "question_id": n} for n in range(3)]
    (tmp_path / "llava-mm-vet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = MMVet()
    questions = task.load(str(tmp_path))
    assert issubclass(MMVet, QuestionFileTask) and questions[2].text == "What\nis 2?" and questions[2].row == rows[2]
    answers = [Answer(0, "a"), Answer(2, "é\n"), Answer(1, ""), Answer(0, "again")]
    scores = task.score(str(tmp_path), questions, answers)
    assert scores.figures == {} and scores.notes[0] == "3 questions; the published file has 218"
    assert [item.score for item in scores.items] == [None] * 4
    [path] = task.write_submission(str(tmp_path), questions, answers, str(tmp_path))
    assert open(path).read() == '{\n  "v1_0": "again",\n  "v1_2": "\\u00e9\\n",\n  "v1_1": ""\n}'
