"""Log-probabilities of given answers, against transformers' logits."""

import dataclasses

import numpy as np
import pytest

from llava_jax import IMAGE_TOKEN_ID
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.inference.llava import Request
from llava_jax.inference.scoring import scoring_rows
from llava_jax.text.encode import encode_prompt

CONTINUATIONS = ["A", "B", "Yes", "Yes, it is.", "Yes, it is. It stands on the left of the others", "No"]


@pytest.fixture(scope="module")
def asked(pictures):
    return [Request("What is this?", pictures[:1]), Request("And without a picture?"),
            Request("Which of the two <image> <image> is it?", pictures[1:3]),
            Request("Go on from there.", pictures[2:3], assistant_prefix=" It is")]


def expected(hf_model, llava, request, text):
    """What transformers gives the tokens that follow the prompt."""
    import torch

    prefix = request.assistant_prefix + text if request.assistant_prefix else f" {text}"
    messages = [{"role": "user", "content": request.messages}]
    if request.images and "<image>" not in request.messages:
        messages[0]["content"] = "<image>\n" + request.messages
    prompt = encode_prompt(messages, "vicuna_v1", llava.tokenizer, 16, request.assistant_prefix)
    ids = encode_prompt(messages, "vicuna_v1", llava.tokenizer, 16, prefix)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    inputs = {"input_ids": torch.tensor(np.where(ids == IMAGE_TOKEN_ID, 2000, ids).astype(np.int64)[None])}
    if request.images:
        tiles = np.concatenate([ImageProcessor(28, "pad")(image) for image in request.images])
        inputs["pixel_values"] = torch.tensor(ImageProcessor().normalise(tiles).transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits = hf_model(**inputs).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_equals_transformers(hf_model, llava, asked):
    for request in asked:
        wanted = [expected(hf_model, llava, request, text) for text in CONTINUATIONS]
        assert llava.log_likelihood(request, CONTINUATIONS) == pytest.approx(wanted, abs=2e-4)
        assert len(set(np.round(wanted, 2))) == len(CONTINUATIONS)


def test_many_at_once_are_as_one_by_one(llava, asked):
    alone = [llava.log_likelihood(request, CONTINUATIONS) for request in asked]
    together = dict(llava.log_likelihoods(((dataclasses.asdict(one), CONTINUATIONS) for one in asked * 2), 4))
    assert sorted(together) == list(range(8))
    for number, scores in together.items():
        assert scores == pytest.approx(alone[number % 4], abs=1e-4)


def test_what_cannot_be_scored_is_told(llava, asked):
    for continuations in ([], ["A", ""]):
        with pytest.raises(UserError, match="needs at least one continuation"):
            llava.log_likelihood(asked[0], continuations)


def test_rows_are_shared():
    prompt = [1, 2, 3]

    def rows(*texts):
        found = scoring_rows(prompt, [prompt + text for text in texts])
        for number, text in enumerate(texts):  # every text is scored once, in a row that reads all but its last token
            [(row, tokens)] = [(row, tokens) for row in found for n, tokens in row.continuations if n == number]
            assert tokens == text and row.tokens[: 3 + len(text) - 1] == prompt + text[:-1] and row.start == 3
        return sorted(row.tokens[3:] for row in found)

    assert rows([4], [5], [6], [7]) == [[]]
    assert rows([4], [5, 6], [5, 7], [5, 6, 8]) == [[5, 6]]
    assert rows([4, 9], [5, 9], [6]) == [[4], [5]]


def test_a_merged_token_is_scored_for_all():
    """The tokenizer made one token of the prompt's last and the first of one text: there all of them begin."""
    [row] = scoring_rows([1, 2, 3], [[1, 2, 9], [1, 2, 3, 4]])
    assert row.start == 2 and row.tokens == [1, 2, 3] and dict(row.continuations) == {0: [9], 1: [3, 4]}
