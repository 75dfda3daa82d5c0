import random
import re

import pytest
from odd_texts import odd_texts

from llava_jax.evaluate.tasks import evalai

MARKS = set(';/[]"{}()=+\\_-><@`,?!')


def spelled_out(text):
    """The normalisation once more, character by character."""
    triples = zip(text, text[1:], text[2:], strict=False)
    joined = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in triples)
    neighbours = set(zip(text, text[1:], strict=False))
    kept, periods = [], 0
    for character in text:
        if character in MARKS:
            touches = joined or (character, " ") in neighbours or (" ", character) in neighbours
            kept.append("" if touches else " ")
        else:
            kept.append(character)
    text, out = "".join(kept), []
    for here, after in zip(text, [*text[1:], ""], strict=False):
        if here == "." and not after.isdecimal() and periods < 32:
            periods += 1
        else:
            out.append(here)
    numbers = ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in "".join(out).lower().split():
        word = next((str(n) for n, names in enumerate(numbers) if word in names.split()), word)
        words += [] if word in ("a", "an", "the") else [evalai.CONTRACTIONS.get(word, word)]
    return " ".join(words)


@pytest.mark.parametrize("text, expected", [
    ("Two.", "2"), ("none", "0"), ("The U.S.", "us"), ("A red car!", "red car"), ("yes, it is", "yes it is"),
    ("1,000", "1000"),  # the comma goes before anything looks at it
    ("3.5", "3.5"), ("5.", "5"), (".5", ".5"), ("stop-sign", "stop sign"), ("stop -sign", "stop sign"),
    ("a-b c- d", "ab c d"),  # a hyphen beside a blank somewhere: all hyphens go
    ("x/y (z)", "x/y z".replace("/", " ")), ("dog's", "dog 's"), ("dont know", "don't know"), ("Im", "im"),
    ("let's", "let 's"), ("somebody'd", "somebodyd"), ("what?\nwhy", "what why"), ("", ""), ("...", ""),
    ("٣.٤", "٣.٤"), ("x." * 40, "x" * 32 + "x.x.x.x.x.x.x.x."), ("ten\tthe", "10"),
])
def test_process(text, expected):
    assert evalai.process(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("1,000", "1000"), ("a,b 1,2", "ab 12"), ("a,b", "b"), ("dog's", "dog's"), ("what?", "what"), ("1,,2", "1 2"),
])
def test_challenge_form(text, expected):
    assert evalai.challenge_form(text) == expected


def test_both_forms_character_by_character():
    for text in odd_texts(4000):
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        assert evalai.challenge_form(text) == spelled_out(plain), text
        lower = re.sub("[,?]", "", text.lower())
        lower = " 's".join(lower.split("'s")).strip().replace("\n", " ").replace("\t", " ").strip()
        assert evalai.process(text) == spelled_out(lower), text


def test_contractions_are_the_standard_table():
    assert len(evalai.CONTRACTIONS) == 116  # 120 less Id've, I'dve, Im and Ive
    odd = {key for key, value in evalai.CONTRACTIONS.items() if value.replace("'", "") != key.replace("'", "")}
    assert not odd
    same = {key for key, value in evalai.CONTRACTIONS.items() if key == value}
    assert same == {"let's", "she's"}
    fewer = {key for key, value in evalai.CONTRACTIONS.items() if value.count("'") <= key.count("'")} - same
    assert fewer == {"somebody'd"}
    assert all(key == key.lower() for key in evalai.CONTRACTIONS)


@pytest.mark.parametrize("same, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten(same, expected):
    """`same` of ten equal: same times min(1, (same-1)/3), and 10-same times min(1, same/3), over ten."""
    references = ["x"] * same + [f"other {n}" for n in range(10 - same)]
    random.Random(same).shuffle(references)
    assert evalai.soft_accuracy("x", references) == pytest.approx(expected)
