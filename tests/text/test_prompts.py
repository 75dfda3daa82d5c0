"""A prompt is the beginning of what is trained on: every template, every kind of tokenizer, every turn."""

import random

import pytest

from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, NoSupervisedTokens, encode_conversation, encode_prompt
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

KINDS = ["prepend", "first", "always", "bytes", "chat", "sentencepiece", "sentencepiece, not legacy"]
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
ODD = ("", " ", "\n", " \n", "\n\n ", "</s>", "<s>", "<|im_end|>\n", "<|eot_id|>", "\u2028", "\u200f\u202e", "e\u0301",
       "\x1b[31m", "\ufeff", "\ufdfa", "<Image>", "< image>", "<image", "{{ x }}", "\\n", "\U0010ffff", "###", "### ")


def random_content(rng, pool, images):
    """A text, or parts in any order, with up to `images` images; returns it beside the text that data would hold."""
    count = rng.randrange(images + 1)
    pieces = [*("<image>" for _ in range(count)), *rng.choices(pool, k=rng.randrange(4))]
    rng.shuffle(pieces)
    if rng.randrange(2):
        text = rng.choice(["", " ", "\n"]).join(pieces)
        return text, text
    parts = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]
    return parts, "\n".join(pieces)


def random_conversation(rng, pool, template):
    """Messages as one asks, and the same as turns of data."""
    if template.captions:
        contents = [random_content(rng, pool, 2), random_content(rng, pool, 0)]
        while "<image>" not in contents[0][1]:
            contents[0] = random_content(rng, pool, 2)
    else:
        contents = [random_content(rng, pool, 2) for _ in range(2 * rng.randrange(1, 5))]
        while template.empty == "omitted" and not contents[0][1]:
            contents[0] = random_content(rng, pool, 2)
    pairs = [(("user", "assistant")[i % 2], *content) for i, content in enumerate(contents)]
    if rng.randrange(3) == 0:
        system = "" if template.system is None else rng.choice([*pool, "", "Look <image> here."])
        pairs.insert(0, ("system", system, system))
    messages = [{"role": role, "content": content} for role, content, _ in pairs]
    turns = [{"from": ROLES[role], "value": value} for role, _, value in pairs]
    for turn in turns[:-1]:
        if turn["from"] == "gpt" and rng.randrange(4) == 0:
            turn["loss"] = False
    return messages, turns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].supervised_marks])
def test_every_prompt_begins_what_is_trained_on(kinds, texts, name, kind):
    """At every turn with an answer: prompt, then the answer and its end, then the turns that follow."""
    template, tokenizer = TEMPLATES[name], kinds[kind]
    rng = random.Random(f"{name} {kind}")
    pool = texts(rng.randrange(99), 60, ODD) + list(ODD)
    asked = 0
    for _ in range(60):
        messages, turns = random_conversation(rng, pool, template)
        answers = [i for i, turn in enumerate(turns) if turn["from"] == "gpt" and turn["value"]]
        if not any(turns[i].get("loss", True) for i in answers):
            continue
        whole = encode_conversation(turns, name, tokenizer, visual_tokens=2)
        for i in answers:
            prompt = encode_prompt(messages[:i], name, tokenizer, visual_tokens=2).tolist()
            try:
                until = encode_conversation(turns[: i + 1], name, tokenizer, visual_tokens=2)
            except NoSupervisedTokens:  # the answers up to here are only read
                until = whole
            tokens, labels = until.tokens.tolist(), until.labels.tolist()
            assert tokens[: len(prompt)] == whole.tokens.tolist()[: len(prompt)] == prompt
            # What follows is the answer, all of it learned but its images, and what the format puts behind its end.
            answer, learned = tokens[len(prompt) :], [label != IGNORE for label in labels[len(prompt) :]]
            if turns[i].get("loss") is False:
                assert not any(learned) or until is whole
                continue
            end = len(learned) - learned[::-1].index(True)
            assert learned[:end] == [token != IMAGE_TOKEN_ID for token in answer[:end]]
            assert tokenizer.decode(answer[end:], False) == ("" if template.signs else template.after_end)
            if not template.signs:  # there the conversation's last sign is cut otherwise than one between turns
                assert whole.tokens.tolist()[len(prompt) :][: len(answer)] == answer
            asked += 1
    assert asked > (15 if template.captions else 60)


def test_an_answer_of_the_first_llava_that_is_only_read(kinds):
    """Neither its role nor the sign that ends it is learned."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate("a b c d".split())]
    tokenizer = kinds["sentencepiece"]

    def learned():
        labels = encode_conversation(turns, "llava_v0", tokenizer).labels.tolist()
        return tokenizer.decode([label for label in labels if label != IGNORE], False)

    assert learned() == "###### Assistant: b\n###### Assistant: d\n### "
    turns[1]["loss"] = False
    assert learned() == "###### Assistant: d\n### "
    turns[3]["loss"] = False
    with pytest.raises(NoSupervisedTokens, match="no answer with text that is not masked"):
        learned()
    with pytest.raises(NoSupervisedTokens, match="no answer with text"):
        encode_conversation(turns[:1], "llava_v0", tokenizer)


def first_llava(turns, system):
    """What LLaVA's `_add_speaker_and_signal` writes: the header, a stretch for every turn, and the closing sign."""
    stretches = []
    for turn in turns:
        value = turn["value"]
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        stretches.append(f"### {'Human' if turn['from'] == 'human' else 'Assistant'}: {value}\n")
    return [system + "\n\n", *stretches, "### "]


def random_rounds(rng, pool):
    turns = [{"from": ("human", "gpt")[i % 2], "value": rng.choice(pool)} for i in range(rng.randrange(1, 9))]
    if rng.randrange(2):
        turns[0]["value"] = rng.choice(["<image>\n{}", "{}\n<image>", " {} <image> "]).format(turns[0]["value"])
    return turns


@pytest.mark.parametrize("legacy", [True, False])
def test_the_first_llavas_ids_and_labels(golden, texts, slow_ids, legacy):
    """Ids by LLaMA's slow tokenizer; labels by counting the tokens of what is written before each place."""
    tokenizer = Tokenizer.load(golden / "tokenizer.model", legacy=legacy)
    rng = random.Random(11)
    # No special tokens: behind one, a beginning's tokens would be others than the whole's.
    pool = [text for text in texts(12, 300, ODD) if "s>" not in text and "<image" not in text and "\u2581" not in text]

    def ids_of(text):
        ids = [1]
        for i, chunk in enumerate(text.split("<image>")):
            ids += [IMAGE_TOKEN_ID] * (i > 0) + slow_ids(chunk, legacy)
        return ids

    for _ in range(150):
        turns = random_rounds(rng, pool)
        if len(turns) == 1:  # without an answer there is nothing to learn
            continue
        header, *stretches, closing = first_llava(turns, TEMPLATES["llava_v0"].system)
        ids = ids_of("".join([header, *stretches, closing]))
        labels, before = [IGNORE] * len(ids), header
        for turn, stretch in zip([*turns, None], [*stretches, closing], strict=True):
            # A human's turn: its sign alone. The assistant's, and the closing sign: all.
            learned = "###" if turn and turn["from"] == "human" else stretch
            start, stop = len(ids_of(before)), len(ids_of(before + learned))
            labels[start:stop] = ids[start:stop]
            before += stretch
        labels = [IGNORE if token == IMAGE_TOKEN_ID else label for token, label in zip(ids, labels, strict=True)]
        example = encode_conversation(turns, "llava_v0", tokenizer, visual_tokens=1)
        assert example.tokens.tolist() == ids
        assert example.labels.tolist() == labels
