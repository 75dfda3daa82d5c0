"""A benchmark put to a small model: the answers are those that each question gets alone."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.errors import UserError
from llava_jax.evaluate.runner import generation
from llava_jax.evaluate.runner.answer_file import NOT_ASKED
from llava_jax.evaluate.tasks.base import Question, ScoredAnswer, Scores, Task
from llava_jax.inference.llava import Llava, Request
from llava_jax.text import templates
from llava_jax.text.encode import IMAGE_TOKEN_ID


@dataclass(frozen=True)
class Twice(Task):
    """Every second question is asked again, with what was said before it; scores even ids."""

    max_new_tokens = 12

    def follow_up(self, question, texts):
        if len(texts) == 1 and question.row["again"]:
            return replace(question, text=question.text + " Again?", assistant_prefix=f" {texts[0]} so",
                           max_new_tokens=5)
        return " + ".join(texts)

    def score(self, data, questions, answers):
        if len(answers) < 3:
            raise ValueError("too few")
        assert [question.id for question in questions] == [answer.id for answer in answers]
        return Scores({}, "", [ScoredAnswer(answer.id, None if answer.id == 3 else answer.id % 2)
                               for answer in answers])


@pytest.fixture(scope="module")
def llava(talker):
    return llava_jax.load(talker, "float32")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder, questions = tmp_path_factory.mktemp("pictures"), []
    for i in range(13):
        path = folder / f"{i}.png"
        Image.new("RGB", (20, 30), (20 * i, 255 - 20 * i, 67 * i % 256)).save(path)
        images = (str(path),) if i % 4 else ()
        questions.append(Question(i, f"What is thing number {i}?" + " And why?" * (i % 3), images, {"again": i % 2},
                                  ("A", "B", "Yes it is"), max_new_tokens=20 if i == 5 else None))
    return questions


def alone(llava, question, **options):
    options = {"max_new_tokens": 12} | options
    request = {"messages": question.text, "images": question.images, **options}
    return llava.batch([request])[0].text.strip()


def test_answers_are_those_of_each_question_alone(llava, questions):
    said = list(generation.generate(llava, Twice(), questions, 4))
    assert sorted(one.index for one in said) == list(range(13)) != [one.index for one in said]
    texts = {one.index: one.text for one in said}
    for number in (0, 5):  # without an image, and with one, another limit and a second time; all would take long
        question = questions[number]
        wanted = alone(llava, question, **({"max_new_tokens": 20} if number == 5 else {}))
        if number % 2:
            second = replace(question, text=question.text + " Again?")
            wanted += " + " + alone(llava, second, assistant_prefix=f" {wanted} so", max_new_tokens=5)
        assert texts[number] == wanted
    assert len(set(texts.values())) == 13
    assert [answer.text for answer in generation.ask(llava, Twice(), questions, 4)] == [texts[n] for n in range(13)]


def test_the_likeliest_choice_is_taken(llava, questions):
    said = {one.index: one for one in generation.choose(llava, Twice(), questions, 4)}
    for number, question in enumerate(questions):
        scores = llava.log_likelihood({"messages": question.text, "images": question.images}, question.choices)
        assert said[number].text == question.choices[int(np.argmax(scores))]
        assert list(said[number].metadata["log_likelihoods"].values()) == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("template", ["vicuna_v1", "v1_mmtag"])
def test_questions_are_asked_as_they_are(llava, questions, template):
    """LLaVA's benchmark scripts strip nothing, and write a bare <image> in every format."""
    text = "  On the desk, what is it? "
    system = templates.get(template).system
    asked = f"{system} USER: <image>\n{text} ASSISTANT:"
    before, after = asked.split("<image>")
    wanted = [*llava.tokenizer.encode(before, bos=True), IMAGE_TOKEN_ID, *llava.tokenizer.encode(after)]
    llava = Llava(replace(llava.config, template=template), llava.parameters, llava.tokenizer)
    requests = []
    llava.batch_unordered = lambda asked, _: iter([requests.extend(asked)][:0])
    list(generation.generate(llava, Twice(), [replace(questions[1], text=text)]))
    prompt = llava.prompt_tokens(requests[0]).tolist()
    count = llava.config.processor.features_per_tile
    at = prompt.index(IMAGE_TOKEN_ID)
    assert prompt[at : at + count] == [IMAGE_TOKEN_ID] * count
    assert prompt[:at] + prompt[at + count - 1 :] == wanted


def test_other_pictures_are_shown_where_asked(llava, questions):
    last = questions[-2].images
    shown = lambda question: last if question.images else ()  # noqa: E731
    answers = generation.ask(llava, Twice(), questions[:3], 4, shown)
    second = replace(questions[1], text=questions[1].text + " Again?", images=last)
    first = alone(llava, replace(questions[1], images=last))
    assert answers[0].text == alone(llava, questions[0])
    assert answers[1].text == f"{first} + {alone(llava, second, assistant_prefix=f' {first} so', max_new_tokens=5)}"
    assert answers[2].text == alone(llava, replace(questions[2], images=last))
    for number, own in enumerate(generation.choose(llava, Twice(), questions[:3], 4)):
        other = list(generation.choose(llava, Twice(), questions[:3], 4, shown))[number]
        assert (other.metadata == own.metadata) == (not questions[own.index].images)


def test_questions_that_cannot_be_asked_are_named_before_the_first_is(llava, questions, tmp_path):
    generation.check_questions(questions, "q.jsonl", llava.config)
    gone = [replace(question, id=f"g{i}", images=(str(tmp_path / "gone.png"),)) for i, question in enumerate(questions)]
    cut = tmp_path / "cut.png"
    cut.write_bytes(open(questions[1].images[0], "rb").read()[:-30])
    Image.new("1", (9_000, 8_000)).save(tmp_path / "large.png")
    for bad, message in (
            ([*gone, Question("b", "", (b"bytes",))], r"question 'g0': .*gone\.png: no such image; 1 of 11 images are"),
            ([Question("b", "Q", (b"bytes",))], r"question 'b': image of 5 bytes: .*; 1 of 10 images cannot be used"),
            ([Question(7, "Q", (str(cut),)), Question(8, "Q", (str(cut), b"bytes"))],
             r"question 7: .*cut\.png: the image cannot be read.*; 2 of 11 images cannot be used"),
            ([Question(9, "Q", (str(tmp_path / "large.png"),))], "question 9: .*large.png.*9,?000 x 8,?000 pixels"),
            ([Question(10, "Q <image> <image>", ("x",))], "question 10: its text has 2 <image> marks for 1 images"),
            ([Question(11, "Q \ud83d")], "question 11: its text has half a surrogate pair")):
        with pytest.raises(UserError, match=rf"^q\.jsonl, {message}"):
            generation.check_questions([*questions, *bad], "q.jsonl", llava.config)
    with pytest.raises(UserError, match="question 0: .*cut"):  # what is shown counts
        generation.check_questions(questions, "q.jsonl", llava.config, lambda _: (str(cut),))


def test_a_question_beyond_the_context_is_answered_empty_and_the_others_as_ever(llava, questions):
    context = llava.config.text.max_length
    # Of each pair the second follows the first, and the text is too long: at once; or with what it says first.
    long = replace(questions[1], id="long", text="Why not? " * context)
    edge = next(text for n in range(context) if generation.too_long(
        llava, Request(text := "Why not? " * n, verbatim=True, assistant_prefix=" and" * 9)))
    later = replace(questions[1], id="later", text=edge[: -len("Why not? ")], images=(), max_new_tokens=10)
    asked = [questions[0], long, questions[2], later, *questions[3:5]]
    said = {one.index: one for one in generation.generate(llava, Twice(), asked, 4)}
    assert sorted(said) == list(range(6))
    assert said[1].text == "" and f"the model's context holds {context:,}" in said[1].metadata[NOT_ASKED]
    first, _, second = said[3].text.partition(" + ")
    assert first and not second and NOT_ASKED in said[3].metadata
    wanted = generation.ask(llava, Twice(), [asked[n] for n in (0, 2, 4, 5)], 4)
    assert [said[n].text for n in (0, 2, 4, 5)] == [answer.text for answer in wanted]
    assert not any(said[n].metadata for n in (0, 2, 4, 5))


@pytest.mark.parametrize("cut", [0, 1])
def test_choices_beyond_the_context_are_not_scored(llava, questions, cut):
    """The longest choice decides; with one word less it fits."""
    size = next(n for n in range(1000) if generation.too_long(llava, Request(" word" * n, verbatim=True)))
    long = Question("long", " word" * (size - 1 - cut), choices=("A", "word")[: 2 - cut])
    said = {one.index: one for one in generation.choose(llava, Twice(), [questions[0], long, questions[1]], 4)}
    assert sorted(said) == [0, 1, 2] and said[0].text in questions[0].choices and said[2].text in questions[1].choices
    assert bool(said[1].text) == (NOT_ASKED not in said[1].metadata) == bool(cut)
