"""Templates of LLaVA 1.6 and OneVision, token by token, and the labels of LLaVA-NeXT's Qwen scripts."""

import random

import numpy as np
import pytest
import tokenizers

from llava_jax.errors import UserError
from llava_jax.text.encode import (
    IGNORE,
    IMAGE_TOKEN_ID,
    NoSupervisedTokens,
    TooLong,
    encode_conversation,
    encode_prompt,
)
from llava_jax.text.templates import get
from llava_jax.text.tokenizer import Tokenizer

SPECIALS = ["</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


@pytest.fixture(scope="module")
def library(raw) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(raw["bytes"].to_str())
    made.add_special_tokens([*SPECIALS, "<image>"])
    return made


@pytest.fixture(scope="module")
def tokenizer(library, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("qwen")
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


def qwen_ids_and_labels(turns, library):
    """LLaVA-NeXT's Qwen preprocessing, from its description: turn by turn, then three tokens unmasked everywhere."""
    image, newline = library.token_to_id("<image>"), library.encode("\n").ids
    marks = [*newline, library.token_to_id("<|im_start|>"), library.token_to_id("<|im_end|>")]
    ids, labels = [], []
    roles = {"human": "user", "gpt": "assistant"}
    for role, text in [("system", "You are a helpful assistant."), *((roles[t["from"]], t["value"]) for t in turns)]:
        turn = library.encode(f"<|im_start|>{role}\n{text}<|im_end|>\n").ids
        ids += turn
        labels += turn if role == "assistant" else [IGNORE] * len(turn)
    labels = [i if i in marks else label for i, label in zip(ids, labels, strict=True)]
    return [IMAGE_TOKEN_ID if i == image else i for i in ids], labels


def random_turns(rng, pool):
    turns = []
    for _ in range(rng.randrange(1, 4)):
        question = "<image>\n" * rng.randrange(3) + (rng.choice(pool).strip() or "q")
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": rng.choice(pool).strip() or "x"}]
    return turns


def test_qwens_original_labels_on_random_conversations(library, tokenizer, texts):
    rng, pool = random.Random(3), [text for text in texts(5, 200) if "<" not in text and "\x00" not in text]
    for _ in range(200):
        turns = random_turns(rng, pool)
        ids, labels = qwen_ids_and_labels(turns, library)
        example = encode_conversation(turns, "qwen_1_5_original", tokenizer, visual_tokens=1)
        assert example.tokens.tolist() == ids and example.labels.tolist() == labels
        ours = encode_conversation(turns, "qwen_1_5", tokenizer, visual_tokens=1)
        assert ours.tokens.tolist() == ids  # only the labels differ
        supervised = ours.labels != IGNORE
        np.testing.assert_array_equal(example.labels[supervised], ours.labels[supervised])
        assert supervised.sum() < (example.labels != IGNORE).sum()
        prompt = encode_prompt([{"role": "user", "content": turns[0]["value"]}], "qwen_1_5_original", tokenizer, 1)
        assert prompt.tolist() == ids[: len(prompt)]


def test_marks_that_are_learned_everywhere_must_be_tokens(kinds):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(UserError, match=r"supervises '\\n' everywhere, which is 2 tokens of this tokenizer"):
        encode_conversation(turns, "qwen_1_5_original", kinds["chat"])


def test_marks_are_nothing_to_learn_by_themselves(tokenizer):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}]
    with pytest.raises(NoSupervisedTokens):
        encode_conversation(turns, "qwen_1_5_original", tokenizer)


SYSTEM_LLAMA_3 = ("You are a helpful language and vision assistant. You are able to understand the visual content that "
                  "the user provides, and assist the user with a variety of tasks using natural language.")
# Pieces in brackets are special tokens; | separates what is learned by our rule from what is not.
BY_HAND = {
    "mistral_instruct": "[INST] @\nq [/INST]| a [</s>]|[INST] r [/INST]| b [</s>]|",
    "chatml_direct": "[<|im_start|>]system\nAnswer the questions.[<|im_end|>][<|im_start|>]user\n@\nq[<|im_end|>]"
                     "[<|im_start|>]assistant\n|a[<|im_end|>]|[<|im_start|>]user\nr[<|im_end|>]"
                     "[<|im_start|>]assistant\n|b[<|im_end|>]|",
    "qwen_1_5": "[<|im_start|>]system\nYou are a helpful assistant.[<|im_end|>]\n[<|im_start|>]user\n@\nq[<|im_end|>]\n"
                "[<|im_start|>]assistant\n|a[<|im_end|>]|\n[<|im_start|>]user\nr[<|im_end|>]\n"
                "[<|im_start|>]assistant\n|b[<|im_end|>]|\n",
    "llama_3": f"[<|start_header_id|>]system[<|end_header_id|>]\n\n{SYSTEM_LLAMA_3}[<|eot_id|>]"
               "[<|start_header_id|>]user[<|end_header_id|>]\n\n@\nq[<|eot_id|>]"
               "[<|start_header_id|>]assistant[<|end_header_id|>]\n\n|a[<|eot_id|>]|"
               "[<|start_header_id|>]user[<|end_header_id|>]\n\nr[<|eot_id|>]"
               "[<|start_header_id|>]assistant[<|end_header_id|>]\n\n|b[<|eot_id|>]|",
}  # fmt: skip
TURNS = [{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"},
         {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("name", BY_HAND)
def test_templates_of_1_6_and_onevision_token_by_token(name, library, tokenizer):
    pieces = BY_HAND[name].split("|") if "<|" not in BY_HAND[name] else split_outside_marks(BY_HAND[name])
    ids, labels = [], []
    for number, piece in enumerate(pieces):
        for token in SPECIALS:
            piece = piece.replace(f"[{token}]", token)
        piece_ids = [IMAGE_TOKEN_ID if i == library.token_to_id("<image>") else i
                     for i in library.encode(piece.replace("@", "<image>")).ids]
        ids += piece_ids
        labels += piece_ids if number % 2 else [IGNORE] * len(piece_ids)
    example = encode_conversation(TURNS, name, tokenizer, visual_tokens=1)
    assert example.tokens.tolist() == ids and example.labels.tolist() == labels
    assert get(name).end in SPECIALS  # an answer ends with a token


def split_outside_marks(text):
    """Splits at | that are not part of <| or |>."""
    text = text.replace("<|", "\0").replace("|>", "\1")
    return [piece.replace("\0", "<|").replace("\1", "|>") for piece in text.split("|")]


@pytest.mark.parametrize("name", [*BY_HAND, "qwen_1_5_original"])
def test_several_images_keep_their_positions_and_counts(name, tokenizer):
    turns = [{"from": "human", "value": "first <image> then <image>?"}, {"from": "gpt", "value": "a"},
             {"from": "human", "value": "and <image>"}, {"from": "gpt", "value": "b"}]
    example = encode_conversation(turns, name, tokenizer, visual_tokens=[3, 0, 2])
    images = example.tokens == IMAGE_TOKEN_ID
    assert images.sum() == 5 and (example.labels[images] == IGNORE).all()
    text = "".join(tokenizer.decode(run, False) if run[0] != IMAGE_TOKEN_ID else f"({len(run)})"
                   for run in np.split(example.tokens, np.flatnonzero(np.diff(images)) + 1))
    assert "first (3) then ?" in text and "(2)\nand" in text
    with pytest.raises(TooLong, match=f"{len(example.tokens)} tokens, 1 more than max_length"):
        encode_conversation(turns, name, tokenizer, [3, 0, 2], max_length=len(example.tokens) - 1)
