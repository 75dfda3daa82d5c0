"""LLaVA's own ids and labels of thousands of conversations. Their folder is not part of the repository.

LLAVA_PUBLISHED names it: `derived/encode/*.jsonl` hold conversations with hashes of the ids and labels that the
original's preprocess functions gave, `derived/tokenizers/` LLaMA's tokenizer as LLaMA and Vicuna-1.5 set it up.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from llava_jax.errors import UserError
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, NoSupervisedTokens, encode_conversation
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

FOLDER = Path(os.environ.get("LLAVA_PUBLISHED", "")) / "derived"
pytestmark = pytest.mark.skipif("LLAVA_PUBLISHED" not in os.environ, reason="LLAVA_PUBLISHED names no folder")


def rows(name):
    with (FOLDER / "encode" / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(legacy):
    return Tokenizer.load(FOLDER / "tokenizers" / f"llama_legacy_{legacy}")


def short_hash(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["real_mix", "real_more", "mild", "odd_mixed", "odd_plain"])
def test_ids_and_labels_are_the_originals(name):
    """Ids always, labels wherever the original gave some and no text holds what its counting splits at."""
    tokenizers = {legacy: load(legacy) for legacy in ("true", "false")}
    compared = labelled = 0
    for number, row in enumerate(rows(name)):
        texts = [turn["value"] for turn in row["conversations"]]
        splits = any(mark in text for text in texts for mark in ("</s>", "ASSISTANT:", "[/INST]"))
        for key, expected in row["original"].items():
            template, legacy = key.split(" legacy=")
            if template == "plain" and (texts[0].count("<image>") > 1 or "<image>" in texts[1]):
                continue  # the original makes one image of all marks of a turn, and masks two tokens
            try:
                example = encode_conversation(row["conversations"], template, tokenizers[legacy], 1)
            except NoSupervisedTokens:
                assert expected["labels"] is None
                continue
            except UserError as error:
                assert "error" in expected and "empty question as the first" in str(error)
                continue
            assert short_hash(example.tokens.tolist()) == expected["ids"], (number, key)
            compared += 1
            if expected["labels"] is not None and (template == "plain" or not splits):
                assert short_hash(example.labels.tolist()) == expected["labels"], (number, key)
                labelled += 1
    print(f"{name}: {compared} ids, {labelled} labels")
    assert compared > 900 and labelled > 900


def first_llava(turns, system, ids_of):
    """The original's `_add_speaker_and_signal` and the branch of `preprocess` that masks what it wrote, as counted."""
    header, closing, stretches = system + "\n\n", "### ", []
    for turn in turns:
        value = turn["value"]
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        stretches.append(f"### {'Human' if turn['from'] == 'human' else 'Assistant'}: {value}\n")
    ids = ids_of("".join([header, *stretches, closing]))
    labels, at = list(ids), len(ids_of(header))
    labels[:at] = [IGNORE] * at
    for turn, stretch in zip(turns, stretches, strict=True):
        length = len(ids_of(stretch))  # BOS and one token for ###, where the whole has two
        if turn["from"] == "human":
            labels[at + 2 : at + length] = [IGNORE] * (length - 2)
        at += length
    assert at + len(ids_of(closing)) == len(ids)
    return ids, labels


@pytest.mark.parametrize("legacy", ["true", "false"])
@pytest.mark.parametrize("name", ["real_mix", "real_more"])
def test_the_first_llavas_ids_and_labels(name, legacy):
    tokenizer, compared = load(legacy), 0

    def ids_of(text):
        ids = [1]
        for i, chunk in enumerate(text.split("<image>")):
            ids += [IMAGE_TOKEN_ID] * (i > 0) + tokenizer.encode(chunk)
        return ids

    for row in rows(name):
        turns = row["conversations"]
        if turns[0]["from"] != "human":  # here such a turn is left out, as LLaVA's later formats do
            continue
        ids, labels = first_llava(turns, TEMPLATES["llava_v0"].system, ids_of)
        example = encode_conversation(turns, "llava_v0", tokenizer, 1)
        assert example.tokens.tolist() == ids
        assert example.labels.tolist() == labels
        compared += 1
    assert compared > 900
