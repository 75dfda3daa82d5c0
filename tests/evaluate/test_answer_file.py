"""Answer files: what is written can be read, what is broken is told, and only whole sets of answers are scored."""

import json
import os
import random

import pytest

from llava_jax.errors import UserError
from llava_jax.evaluate.runner import answer_file
from llava_jax.evaluate.runner.answer_file import make_line
from llava_jax.evaluate.runner.answer_folder import chunk
from llava_jax.evaluate.tasks.base import Question
from llava_jax.files import write_json_lines
from llava_jax.json_lines import JsonLinesFile

ALIKE = Question("a", "Is it?")
QUESTIONS = [ALIKE, Question("a", "Is it not?"), Question(7, "Which?", prompt="Which one?"), ALIKE, Question("b", "B?"),
             Question("r", "R?")]
ROUNDS = [Question(id, "Round", fields={"round_id": turn}) for id in "rs" for turn in range(3)]


def lines(questions=QUESTIONS, model="m"):
    return [make_line(question, f"text {n}", model) for n, question in enumerate(questions)]


def check(given, ordered=False, questions=QUESTIONS):
    answer_file.check("answers.jsonl", "The task", questions, given, ordered)


def test_a_line_is_the_originals():
    line = make_line(ROUNDS[1], "No. \ud800 é", "llava", {"x": 1})
    assert list(line) == ["question_id", "prompt", "text", "round_id", "answer_id", "model_id", "metadata"]
    assert line["prompt"] == "Round" and make_line(QUESTIONS[2], "", "m")["prompt"] == "Which one?"
    assert len(line["answer_id"]) == 22 and line == make_line(ROUNDS[1], "No. \ud800 é", "llava", {"x": 1})
    others = {make_line(question, "", model)["answer_id"] for question in QUESTIONS + ROUNDS for model in ("m", "n")}
    assert len(others) == 2 * (len(QUESTIONS) - 1 + len(ROUNDS))


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "answers.jsonl")
    texts = ["é漢🙂", "\ud800", "a\nb\u2028c\r", ""]
    written = [make_line(question, text, "m") for question, text in zip(QUESTIONS, texts, strict=False)]
    with JsonLinesFile(path) as file:
        for line in written:
            file.append(line)
            assert answer_file.read(path)[0][-1] == line  # at once
    assert answer_file.read(path) == (written, [])
    assert [json.loads(line) for line in open(path, "rb")] == written
    write_json_lines(path, written[:2])
    assert answer_file.read(path)[0] == written[:2]


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_broken_last_line_is_told_and_mended(tmp_path, cut):
    path, given = str(tmp_path / "answers.jsonl"), lines()
    write_json_lines(path, given)
    os.truncate(path, os.path.getsize(path) - cut)
    if cut == 1:  # only the newline is missing
        assert answer_file.read(path) == (given, [])
        with JsonLinesFile(path) as file:
            file.append(given[0])
        assert answer_file.read(path)[0] == [*given, given[0]]
        return
    with pytest.raises(UserError, match=r"answers\.jsonl, line 6: the last line is broken off.*--partial"):
        answer_file.read(path)
    whole, notes = answer_file.read(path, partial=True)
    assert whole == given[:-1] and "broken off" in notes[0]
    with JsonLinesFile(path) as file:
        assert file.dropped == len(json.dumps(given[-1], ensure_ascii=False)) + 1 - cut
        file.append(given[-1])
    assert answer_file.read(path) == (given, [])


@pytest.mark.parametrize("bad", [b"{\n", b"[1]\n", b"3\n", b"null\n", b'{"question_id": 1}\n', b"\xff\xfe\n",
                                 b"[" * 100_000 + b"\n", b'{"question_id": true, "text": "x"}\n',
                                 b'{"question_id": 1, "text": 2}\n', b'{"question_id": [], "text": "x"}\n'])
def test_another_broken_line_is_an_error(tmp_path, bad):
    path = tmp_path / "answers.jsonl"
    good = json.dumps(lines()[0]).encode() + b"\n"
    path.write_bytes(good + b"\n" + bad + good)
    for partial in (False, True):
        with pytest.raises(UserError, match=r"answers\.jsonl, line 3: not "):
            answer_file.read(str(path), partial)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no such file of answers"):
        answer_file.read(str(tmp_path / "x"))
    (tmp_path / "x").write_text("\n")
    with pytest.raises(UserError, match="has no answers"):
        answer_file.read(str(tmp_path / "x"))


def test_lines_find_their_questions_in_any_order():
    rng = random.Random(0)
    for questions in (QUESTIONS, ROUNDS) * 20:
        numbered = list(enumerate(lines(questions)))
        rng.shuffle(numbered)
        places = answer_file.match(questions, [line for _, line in numbered])
        assert sorted(places) == list(range(6))
        assert [questions[place] for place in places] == [questions[number] for number, _ in numbered]
    assert answer_file.match(QUESTIONS, [*lines(), lines()[1]])[-1] is None
    # What lines do not have, they are not told apart by.
    bare = [{"question_id": question.id, "text": ""} for question in QUESTIONS]
    assert answer_file.match(QUESTIONS, bare) == list(range(6))


def test_a_whole_set_passes():
    given = lines()
    check(given, ordered=True)
    check(given[::-1])
    check(lines(ROUNDS), questions=ROUNDS)
    check([{"question_id": question.id, "text": ""} for question in QUESTIONS])


def changed(line, **values):
    return {**line, **values}


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[:-1], "1 of 6 questions have no answer, the first is 'r'"),
    (lambda x: x[:2] + x[3:], "1 of 6 questions have no answer, the first is 7"),
    (lambda x: [*x, x[2]], "1 questions have more than one answer, the first is 7"),
    (lambda x: [*x, changed(x[0], question_id="z")], "1 of 7 answers are to questions that The task does not have"),
    (lambda x: [changed(line, question_id=str(line["question_id"])) for line in x], "the first to '7'"),
    (lambda x: [changed(line, prompt="Why?") for line in x], "was asked as 'Why\\?', and The task asks 'Is it\\?'"),
    (lambda x: [changed(x[0], model_id="n"), *x[1:]], "answers are of 2 models: m, n"),
])
def test_what_is_no_whole_set_is_told(change, message):
    with pytest.raises(UserError, match=rf"^answers\.jsonl: .*{message}"):
        check(change(lines()))


def test_a_round_that_is_answered_twice_is_told():
    given = lines(ROUNDS)
    with pytest.raises(UserError, match=r"question 'r' has two answers where it was asked once \(round_id\)"):
        check([*given[:2], given[1], *given[3:]], questions=ROUNDS)


def test_rounds_of_other_options_are_told():
    given = lines(ROUNDS)
    for line in given:
        del line["prompt"]
    check(given, questions=ROUNDS)
    with pytest.raises(UserError, match=r"question 'r' was not asked with \"{'round_id': 7}\"; the answers"):
        check([changed(given[0], round_id=7), *given[1:]], questions=ROUNDS)


@pytest.mark.parametrize("name", ["prompt", "round_id"])
def test_answers_of_which_some_lack_what_tells_them_apart_are_of_two_makers(name):
    given = lines(ROUNDS)
    del given[2][name]
    with pytest.raises(UserError, match=f"1 of 6 answers have no '{name}', the first is to 'r'"):
        check(given, questions=ROUNDS)


def test_order_matters_where_it_does():
    given = lines()
    given[2], given[4] = given[4], given[2]
    check(given)
    with pytest.raises(UserError, match="answer 3 is to question 'b', which is another order"):
        check(given, ordered=True)


@pytest.mark.parametrize("count", [1, 5, 7, 100])
def test_chunks_are_the_originals(count):
    for chunks in (1, 2, 3, 7, 11):
        parts = [list(chunk(count, chunks, index)) for index in range(chunks)]
        assert sum(parts, []) == list(range(count))
        size = -(-count // chunks)
        assert [part for part in parts if part] == [list(range(count))[i : i + size] for i in range(0, count, size)]
