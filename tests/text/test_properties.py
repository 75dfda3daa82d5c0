"""What holds for any conversation and any template: labels follow answers, and a prompt is a prefix of training."""

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.errors import UserError
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, ImageCount, encode_conversation, encode_prompt
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(GOLDEN / "tokenizer.model")
# A template with marks that are supervised everywhere needs a tokenizer that has them (test_original_labels.py).
TALKING = sorted(name for name, template in TEMPLATES.items() if not (template.captions or template.supervised_marks))
# Letters, spaces, newlines and signs of templates; control characters and surrogates are refused elsewhere.
TEXTS = st.text(st.sampled_from("aB é漢🙂\n.,:#<>[]/0"), min_size=1, max_size=20).filter(str.strip)


@st.composite
def conversations(draw):
    """Rounds of question and answer, the numbers of visual tokens of their images, and which answers are masked."""
    rounds, counts, turns = draw(st.integers(1, 3)), [], []
    for _ in range(rounds):
        images = draw(st.integers(0, 2))
        counts += [draw(st.integers(1, 5)) for _ in range(images)]
        turns.append({"from": "human", "value": "<image>\n" * images + draw(TEXTS)})
        turns.append({"from": "gpt", "value": draw(TEXTS), "loss": draw(st.booleans())})
    turns[-1]["loss"] = True
    return turns, counts


@given(conversations(), st.sampled_from(TALKING))
def test_a_prompt_is_a_prefix_of_the_training_sequence(conversation, name):
    turns, counts = conversation
    tokens = encode_conversation(turns, name, TOKENIZER, counts).tokens
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    for end in range(1, len(messages), 2):
        used = sum(message["content"].count("<image>") for message in messages[:end])
        prompt = encode_prompt(messages[:end], name, TOKENIZER, counts[:used])
        np.testing.assert_array_equal(prompt, tokens[: len(prompt)])


@given(conversations(), st.sampled_from([name for name in TALKING if not TEMPLATES[name].signs]))
def test_labels_are_the_supervised_answers_and_their_ends(conversation, name):
    turns, counts = conversation
    example, template = encode_conversation(turns, name, TOKENIZER, counts), TEMPLATES[name]
    supervised = example.labels != IGNORE
    np.testing.assert_array_equal(example.labels[supervised], example.tokens[supervised])
    assert not (example.tokens[supervised] == IMAGE_TOKEN_ID).any()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], supervised, [0]])))
    runs = ["".join(TOKENIZER.decode(example.tokens[start:end], skip_special_tokens=False).split())
            for start, end in edges.reshape(-1, 2)]
    answers = [turn["value"] + template.before_end + template.end
               for turn in turns if turn["from"] == "gpt" and turn["loss"]]
    assert "".join(runs) == "".join("".join(answers).split())


@given(conversations(), st.sampled_from(TALKING), st.integers(0, 6))
def test_every_image_has_its_own_number_of_visual_tokens(conversation, name, wrong):
    turns, counts = conversation
    tokens = encode_conversation(turns, name, TOKENIZER, counts).tokens
    assert (tokens == IMAGE_TOKEN_ID).sum() == sum(counts)
    without = encode_conversation(turns, name, TOKENIZER, 1).tokens
    np.testing.assert_array_equal(tokens[tokens != IMAGE_TOKEN_ID], without[without != IMAGE_TOKEN_ID])
    if wrong != len(counts):
        with pytest.raises(ImageCount, match=f"{wrong} images, but {len(counts)} in the turns"):
            encode_conversation(turns, name, TOKENIZER, [1] * wrong)


@given(st.text(max_size=30))
def test_any_text_is_encoded_or_refused_in_one_line(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text + "."}]
    try:
        encode_conversation(turns, "vicuna_v1", TOKENIZER, 1)
    except UserError as error:
        assert "\n" not in str(error)
