"""The check of answers: what it flags and what it lets pass, case by case and in figures."""

import importlib.util
from pathlib import Path

import pytest

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.synthesize import evidence

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
    return sorted({finding.kind for finding in evidence.check(turns, context, categories).findings})


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
        ("Where is the bench?", "The bench is in the middle.", ["position"]),
        ("Is the bench between the man and the bus?", "Yes, the bench is in the middle.", []),  # of the two
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


MEAL = Context(
    "6", "", ("A bowl of soup on a dining table.",),
    (Box("bowl", 0.3, 0.3, 0.6, 0.6), Box("dining table", 0, 0.3, 1, 1)),
)  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        "Several individual pieces of bread lie around the bowl.",
        "The individual slices are arranged in a circle.",
        "This shows that the person cares about a healthy diet.",
        "That the people who live here like soup is clear.",
        "The individual has a balanced approach to meals.",
        "These individuals value a warm meal.",
        "A man-made bowl stands on the table.",
        "The bowl has a glass-walled look, and is dog-friendly.",
        "The bowl stands on an orange plate.",
        "There is an orange napkin under the bowl.",
        "A baby carrot shape is painted on the bowl.",
        "Dogs are known to be loyal companions.",
        "Soup is popular with people and cats prefer milk.",
        "Cats are carnivores, and birds eat seeds.",
        "Elephants are the largest land animals.",
        "Horses were used for transport in the past.",
        "Such a bowl is a popular tourist souvenir.",
        "The sign reads \"Dogs welcome\" next to the bowl.",
        "The bowl leaves room for diners to rest their spoons.",
        "The table is big enough for a person to sit at.",
        "The bowl is placed on a mat or a book.",
        "The bowl's colour pops against the table, which is as brown as a horse.",
        "It has a child-safe rim.",
        "The adult portion fills the bowl.",
        "Human hands made it.",
        "People enjoy soup in winter, and children love noodles.",
        "The table looks like one from a train dining car.",
        "Soup keeps the body warm. Chefs use fresh carrots for the best taste.",
        "A bowl with a dog motif stands on the table.",
        "The bowl shows a drawing of a cat.",
        "The table has a mouse pad on it.",
        "The bowl is placed in the center of the table, as if a chef had just put it there.",
        "Unlike a cup, the bowl is wide.",
        "Compared to a cup, the bowl is large.",
        "The bowl serves as a cup.",
        "The bowl, not a cup, holds the soup.",
        "It is a bowl rather than a cup.",
        "The table is set without a knife.",
        "A pitcher of water would go well with it.",
        "The cake batter in the bowl is smooth.",
        "The dish is an all-American hot dog alternative.",
        "One can use the bowl to feed a cat.",
        "Bowls are used by people around the world.",
        "The owner's dog is not visible.",
        "This highlights the importance of keeping food away from cats and dogs.",
        "The bowl is crucial for all hungry skiers, and serves its passengers.",
        "In some countries cats eat at the table.",
        "The soup is popular among tourists and locals alike.",
    ],
)
def test_what_names_no_thing_of_the_picture_is_no_claim(answer):
    """Adjectives, parts of longer names, quotations, comparisons, and what is said of things in general."""
    assert kinds(answer, context=MEAL) == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What are the benefits of soup?", "Carrots contain vitamin A, and broccoli is rich in fibre."),
        ("What is the purpose of a bowl?", "A bowl holds food. People eat soup from the bowl with a spoon."),
        ("Why might someone like this?", "The person enjoys the taste. A chair helps them relax."),
        ("Can you explain how soup is made?", "The chef cuts the carrots. The knife must be sharp."),
        ("What could happen next?", "The cat jumps on the table."),
        ("What should a driver do here?", "Drivers slow down when a dog crosses the street."),
    ],
)
def test_a_question_in_general_is_answered_in_general(question, answer):
    assert kinds(answer, question, MEAL) == []


@pytest.mark.parametrize(
    "answer",
    [
        "A man sits at the table.",
        "A dog lies under the table.",
        "Two children eat soup.",
        "There are three people in the image.",
        "A woman is holding the bowl.",
        "Next to the bowl there is an orange.",
        "A baby sits at the table.",
        "An individual stands next to the table.",
        "The cat is sleeping on the table.",
        "Dogs are running around the table.",
        "There are cats and dogs in the room.",
        "A horse can be seen behind the table.",
        "The table holds a bowl, a cup and a laptop.",
        "A knife lies next to the bowl.",
        "A person is sitting at the table.",
        "A child holds the bowl.",
        "Cars are parked behind the table.",
        "The scene features a man and his dog.",
        "Several cats are in the room.",
        "The bowl is placed near two cups and a fork.",
    ],
)
def test_what_is_said_to_be_there_is_a_claim(answer):
    assert "object" in kinds(answer, context=MEAL)


def test_crowds_and_captions_count():
    crowd = Context("3", "", ("Five people wait.",), (Box("person", 0, 0, 0.1, 1), Box("person", 0.2, 0, 1, 1, True)))
    assert kinds("There are 30 people.", context=crowd) == []
    hidden = Context("4", "", ("Five people wait.",), (Box("person", 0, 0, 0.1, 1), Box("person", 0.2, 0, 1, 1)))
    assert kinds("There are five people.", context=hidden) == kinds("There are two people.", context=hidden) == []
    assert kinds("There are six people.", context=hidden) == ["count"]
    unboxed = Context("5", "", ("A cat sleeps on a couch.",))
    assert kinds("A kitten lies on the sofa.", context=unboxed) == []
    assert kinds("A dog lies on the sofa.", context=unboxed) == ["object"]


def test_a_caption_supports_in_any_words():
    fruit = Context("7", "", ("An apple orange banana salad with a baby elephant figure",))
    assert kinds("An apple, an orange, a banana and a baby can be seen.", context=fruit) == []


def test_what_a_finding_says():
    turns = ({"from": "human", "value": "How many dogs are there?"}, {"from": "gpt", "value": "There are four dogs."})
    found = evidence.check(turns, STREET, evidence.COCO)
    assert found.checked and 0 <= found.score < 1 and found.claims >= 1
    assert found.findings[-1] == ("count", "There are four dogs.", "there are 2 dogs")
    other = evidence.check(turns, STREET, evidence.COCO, language="ko")
    assert other == ((), 0, False) and other.score == 1


def test_any_text_can_be_read():
    for text in ("", "…", "§0 §1", "a " * 5000, "dog " * 3000, "1" * 400, "to the left of the dog", "\n\n", "the red",
                 "in the left left of the left", "[a|b] {c}", "Not a dog, no cat, nor 12345 buses!?"):  # fmt: skip
        assert isinstance(kinds(text, text), list)


def test_structured_answers_made_wrong_are_found():
    made = bench()
    for make, categories in ((made.shapes, made.SHAPES), (made.things, evidence.COCO)):
        results = made.structured(make, categories, 50, seed=5)
        for what, (precision, recall, _) in results.items():
            assert precision >= 0.95 and recall >= 0.75, (what, results)
        assert results["all"][0] >= 0.97 and results["all"][1] >= 0.85, results


def test_labelled_free_text():
    precision, recall, wrong, total = bench().labelled(HERE / "labelled_answers.json")
    assert wrong > 50 and total > 100
    assert precision >= 0.95 and recall >= 0.9
