"""The check of answers: what it flags and what it lets pass, case by case and in figures."""

import importlib.util
from pathlib import Path

import pytest

from llava_jax.instruct import evidence
from llava_jax.instruct.context import Box, Context

HERE = Path(__file__).parent
STREET = Context(
    "1", "", ("A man walks two dogs past a red bus.", "A brown dog and a black dog on a street with shops"),
    (Box("person", 0.1, 0.4, 0.2, 0.9), Box("dog", 0.25, 0.7, 0.35, 0.85), Box("dog", 0.4, 0.7, 0.5, 0.85),
     Box("bus", 0.6, 0.1, 0.98, 0.6), Box("bench", 0.7, 0.75, 0.95, 0.95)),
)  # fmt: skip
SHAPES = tuple(f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "ring", "cross"))
PICTURE = Context(
    "2", "", ("A picture",),
    (Box("red circle", 0.05, 0.05, 0.25, 0.25), Box("blue circle", 0.75, 0.05, 0.95, 0.25),
     Box("blue ring", 0.4, 0.75, 0.6, 0.95)),
)  # fmt: skip


def kinds(answer, question="What do you see?", context=STREET, categories=evidence.COCO):
    turns = ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    return sorted({finding.kind for finding in evidence.check("conversation", turns, context, categories).findings})


def bench():
    spec = importlib.util.spec_from_file_location("bench_evidence", HERE.parents[1] / "scripts" / "bench_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("A man walks his two dogs past a bus.", []),
        ("A cat sits on the bench.", ["object"]),
        ("A puppy, a lady and a park bench can be seen.", []),  # other words for what is there
        ("There might be a cat in one of the shops, and a cat would be afraid of the dogs.", []),  # a guess
        ("Trains and boats are other ways to travel, but the man could also take a bicycle.", []),
        ("There is no cat in the picture.", []),
        ("There is no bench in the picture.", ["object"]),
        ("The man waits at the train station near a bicycle shop.", []),  # names of other things
        ("Three dogs walk beside the man.", ["count"]),
        ("One of the dogs is brown, and three of the shops are open.", []),
        ("In room 5 a dog stands, and in house 3 the man and his dogs are known.", []),  # numbers of other things
        ("Route 12 buses stop here, and on floor 3 dogs wait.", []),
        ("In room 5 three other dogs wait.", ["count"]),
        ("There is one dog.", ["count"]),
        ("There is one dog next to the man.", []),  # and there may be another elsewhere
        ("The bus is to the left of the man.", ["relation"]),
        ("To the right of the dogs there is a bench.", []),
        ("The bench is above the bus.", ["relation"]),
        ("The bus is at the top right of the image.", []),
        ("The bus is in the lower left corner.", ["position"]),
        ("On the left side of the picture there is a bench.", ["position"]),
        ("A blue bus drives past.", ["attribute"]),
        ("The bus is red, and the dogs are brown and black.", []),
        ("The bus is green.", ["attribute"]),
        ("Several giraffes and an elephant stand around a potted plant.", ["object"]),
    ],
)
def test_sentences(answer, found):
    assert kinds(answer) == found


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("How many dogs are there?", "Two.", []),
        ("How many dogs are there?", "There are 3.", ["count"]),
        ("How many dogs are on the bench?", "None of them is.", []),
        ("Is there a cat?", "Yes, there is.", ["object"]),
        ("Is there a dog in the picture?", "No.", ["object"]),
        ("Is the bus to the left of the bench?", "Yes.", []),  # one is above the other
        ("Is the man to the left of the bus?", "No, it is the other way round.", ["relation"]),
        ("Where is the bench?", "It is at the bottom right.", []),
        ("Where is the bench?", "It is at the top left.", ["position"]),
        ("What colour is the bus?", "It is white.", ["attribute"]),
        ("What is on the left side of the picture?", "A bus.", ["position"]),
        ("What would happen if the man saw a bear?", "He would run. It is on the left.", []),
    ],
)
def test_answers_with_their_questions(question, answer, found):
    assert kinds(answer, question) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("There are three objects: a red circle, a blue circle and a blue ring.", []),
        ("There are two objects.", ["count"]),
        ("There are three circles.", ["count"]),
        ("The green circle is at the top-left.", ["attribute"]),
        ("A red cross is at the top-left.", ["object"]),
        ("The red circle is blue.", ["attribute"]),
        ("The blue circle is to the left of the red circle.", ["relation"]),
        ("Two of the objects are blue.", []),
        ("Two of the objects are red.", ["count"]),
        ("Two of the objects are rings.", ["count"]),
        ("Seen from the blue ring, the red circle is higher up and to the right.", ["relation"]),
        ("The right half of the picture has the red circle in it.", ["position"]),
    ],
)
def test_coloured_shapes(answer, found):
    assert kinds(answer, context=PICTURE, categories=SHAPES) == found


def test_crowds_and_captions_count():
    crowd = Context("3", "", ("Five people wait.",), (Box("person", 0, 0, 0.1, 1), Box("person", 0.2, 0, 1, 1, True)))
    assert kinds("There are 30 people.", context=crowd) == []
    hidden = Context("4", "", ("Five people wait.",), (Box("person", 0, 0, 0.1, 1), Box("person", 0.2, 0, 1, 1)))
    assert kinds("There are five people.", context=hidden) == kinds("There are two people.", context=hidden) == []
    assert kinds("There are six people.", context=hidden) == ["count"]
    unboxed = Context("5", "", ("A cat sleeps on a couch.",))
    assert kinds("A kitten lies on the sofa.", context=unboxed) == []
    assert kinds("A dog lies on the sofa.", context=unboxed) == ["object"]


def test_what_a_finding_says():
    turns = ({"from": "human", "value": "How many dogs are there?"}, {"from": "gpt", "value": "There are four dogs."})
    found = evidence.check("conversation", turns, STREET, evidence.COCO)
    assert found.checked and 0 <= found.score < 1 and found.claims >= 1
    assert found.findings[-1] == ("count", "There are four dogs.", "there are 2 dogs")
    other = evidence.check("conversation", turns, STREET, evidence.COCO, language="ko")
    assert other == ((), 0, False) and other.score == 1


def test_any_text_can_be_read():
    for text in ("", "…", "§0 §1", "a " * 5000, "dog " * 3000, "1" * 400, "to the left of the dog", "\n\n", "the red",
                 "in the left left of the left", "[a|b] {c}", "Not a dog, no cat, nor 12345 buses!?"):  # fmt: skip
        assert isinstance(kinds(text, text), list)


def test_structured_answers_made_wrong_are_found():
    made = bench()
    for make, categories in ((made.shapes, made.SHAPES), (made.things, evidence.COCO)):
        results = made.structured(make, categories, 120, seed=5)
        for what, (precision, recall, _) in results.items():
            assert precision >= 0.95 and recall >= 0.75, (what, results)
        assert results["all"][0] >= 0.97 and results["all"][1] >= 0.85, results


def test_labelled_free_text():
    precision, recall, wrong, total = bench().labelled(HERE / "labelled_answers.json")
    assert wrong > 50 and total > 100
    assert precision >= 0.95 and recall >= 0.9
