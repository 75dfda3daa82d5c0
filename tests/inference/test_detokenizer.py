import random

import pytest

from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.text.tokenizer import StreamDecoder

END = 2


class Spelling:
    """A decoder for which token i is the i-th of some texts."""

    def __init__(self, texts):
        self.texts = texts

    def push(self, token):
        return self.texts[token]

    def finish(self):
        return ""


def grow(answer, tokens, rng):
    """Adds the tokens in random portions; returns the pieces."""
    pieces, i = [], 0
    while i < len(tokens) and not answer.finish_reason:
        n = rng.randint(1, 5)
        pieces.append(answer.add(tokens[i : i + n]))
        i += n
    return pieces


def test_stop_strings_across_tokens_against_brute_force():
    rng = random.Random(0)
    word = lambda low, high: "".join(rng.choice("ab# \n") for _ in range(rng.randint(low, high)))  # noqa: E731
    reasons = set()
    for _ in range(4000):
        texts = [word(0, 3) for _ in range(12)]
        stops = [word(1, 5) for _ in range(rng.randint(0, 3))]
        # The first token after which a stop string is complete ends the answer; the first such string cuts it.
        expected, used, reason = "".join(texts), 12, "length"
        for n in range(1, 13):
            found = [at for stop in stops if (at := "".join(texts[:n]).find(stop)) >= 0]
            if found:
                expected, used, reason = "".join(texts[:n])[: min(found)], n, "stop"
                break
        answer = Detokenizer(Spelling(texts), (END + 100,), stops, max_new_tokens=12)
        pieces = grow(answer, list(range(12)), rng)
        assert "".join(pieces) == answer.text == expected.strip()
        assert (answer.tokens, answer.finish_reason) == (list(range(used)), reason)
        reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_text_is_released_as_soon_as_no_stop_can_claim_it():
    answer = Detokenizer(Spelling(["a#", "#b", "##", "#"]), (), ["###"], max_new_tokens=9)
    assert [answer.add([i]) for i in range(4)] == ["a", "##b", "", ""]
    assert answer.text == "a##b" and answer.finish_reason == "stop"


def test_held_back_text_comes_when_the_answer_ends_otherwise():
    answer = Detokenizer(Spelling(["a#", "#"]), (5,), ["###"], max_new_tokens=9)
    assert [answer.add([0, 1]), answer.add([5])] == ["a", "##"]
    assert answer.finish_reason == "stop" and answer.tokens == [0, 1, 5]


def test_outer_blanks_are_no_part_of_the_text():
    """What the template puts around an answer would stand there twice in the next prompt."""
    answer = Detokenizer(Spelling([" ", "\n a", " ", "b", "\u3000\n", " ", "#"]), (6,), ["##"], max_new_tokens=9)
    assert [answer.add([i]) for i in range(7)] == ["", "a", "", " b", "", "", ""]
    assert answer.text == "a b" and answer.tokens == list(range(7))


def test_what_follows_the_end_is_ignored():
    answer = Detokenizer(Spelling(["a", "b", "c"]), (1,), [], max_new_tokens=9)
    assert answer.add([0, 1, 2]) == "a" and answer.tokens == [0, 1]
    assert answer.add([2]) == "" and answer.text == "a"


def test_the_end_token_as_the_last_allowed_one_is_a_stop():
    answer = Detokenizer(Spelling(["a", "b"]), (1,), [], max_new_tokens=2)
    answer.add([0, 1])
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("text", ["漢字 and 🙂🇰🇷", "naïve 한글", "🙂"])
def test_no_piece_splits_a_character(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text.split()) + 1  # byte tokens are among them
    answer = Detokenizer(StreamDecoder(tokenizer), (END,), ["###"], max_new_tokens=99)
    pieces = [answer.add([token]) for token in [*tokens, END]]
    assert "".join(pieces) == answer.text == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_that_the_limit_cuts(tokenizer):
    tokens = tokenizer.encode("a 🙂")[:-1]
    answer = Detokenizer(StreamDecoder(tokenizer), (END,), [], max_new_tokens=len(tokens))
    pieces = [answer.add([token]) for token in tokens]
    assert "".join(pieces) == answer.text == "a \ufffd" == tokenizer.decode(tokens)
    assert "\ufffd" not in "".join(pieces[:-1])
