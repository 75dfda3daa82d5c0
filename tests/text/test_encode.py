import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.errors import UserError
from llava_jax.text.encode import (
    IGNORE,
    IMAGE_TOKEN_ID,
    NoSupervisedTokens,
    TooLong,
    encode_conversation,
    encode_prompt,
    eos_ids_and_texts,
)
from llava_jax.text.templates import TEMPLATES, render
from llava_jax.text.tokenizer import Tokenizer

CASES = json.loads((Path(__file__).parents[1] / "golden/conversations.json").read_text(encoding="utf-8"))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
LLAMA_2 = (
    "<<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)


@pytest.fixture(scope="module")
def tokenizer(kinds) -> Tokenizer:
    return kinds["sentencepiece"]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def learned_runs(example):
    """The stretches of consecutive learned tokens. Checks on the way that a label is its token or -100."""
    runs, inside = [], False
    for token, label in zip(example.tokens.tolist(), example.labels.tolist(), strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs = runs if inside else [*runs, []]
            runs[-1].append(token)
        inside = label != IGNORE
    return runs


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['template']}-{case['legacy']}")
def test_golden(golden, case):
    tokenizer = Tokenizer.load(golden / "tokenizer.model", legacy=case["legacy"])
    turns, template = case["conversations"], case["template"]
    example = encode_conversation(turns, template, tokenizer, visual_tokens=1)
    assert example.tokens.dtype == example.labels.dtype == "int32"
    assert example.tokens.tolist() == case["input_ids"]
    if not case["dropped"]:
        assert example.labels.tolist() == case["labels"]
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"][turns[0]["from"] == "gpt" :]
    end = {"vicuna_v1": "</s>", "llava_llama_2": " </s>", "plain": "\n"}[template]
    runs = learned_runs(example)
    assert [tokenizer.decode(run, skip_special_tokens=False) for run in runs] == [answer + end for answer in answers]


def original(prompt, separator, ids_of, shorter_rounds):
    """LLaVA's own way to ids and labels: tokenize each round once more alone, and count. None where it gave up."""

    def tokenize(text):  # with BOS
        ids = [1]
        for i, chunk in enumerate(text.split("<image>")):
            ids += [IMAGE_TOKEN_ID] * (i > 0) + ids_of(chunk)
        return ids

    ids = tokenize(prompt)
    labels, at = [IGNORE, *ids[1:]], 1
    for i, one in enumerate(prompt.split("</s>")):
        parts = one.split(separator)
        if not one or len(parts) != 2:
            break
        less = 1 if i and shorter_rounds else 0
        question = len(tokenize(parts[0] + separator)) - 2 - less
        labels[at : at + question] = [IGNORE] * question
        at += len(tokenize(one)) - less
    labels[at:] = [IGNORE] * (len(labels) - at)
    return ids, labels if at == len(ids) else None


def written(turns, template):
    """The prompt of closed rounds, spelled out."""
    text = VICUNA if template == "vicuna_v1" else ""
    for i, turn in enumerate(turns):
        value = turn["value"]
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        if template == "vicuna_v1" and turn["from"] == "human":
            text += f"USER: {value} " if value else "USER:"
        elif template == "vicuna_v1":
            text += f"ASSISTANT: {value}</s>" if value else "ASSISTANT:"
        elif turn["from"] == "human":
            text += ("<s>" if i else "") + f"[INST] {'' if i else LLAMA_2}{value} [/INST]"
        else:
            text += f" {value} </s>" if value else ""
    return text


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2"])
def test_against_the_original_on_random_conversations(golden, texts, slow_ids, template, legacy):
    """Ids always equal; labels equal wherever the original's counting closes, and follow the answers elsewhere."""
    tokenizer = Tokenizer.load(golden / "tokenizer.model", legacy=legacy)
    rng = random.Random(7)
    pool = [text.replace("\u2581", "") or "x" for text in texts(8, 400) if "s>" not in text]
    # The original takes a question's "ASSISTANT:" for the answer's.
    questions = [text for text in pool if "ASSISTANT" not in text and "INST" not in text]
    separator = {"vicuna_v1": " ASSISTANT: ", "llava_llama_2": "[/INST] "}[template]
    kept = lost = 0
    for _ in range(400):
        rounds = [(rng.choice(questions), rng.choice([*pool, ""])) for _ in range(rng.randrange(1, 4))]
        turns = [turn for question, answer in rounds for turn in (human(question), gpt(answer))]
        if rng.randrange(2):
            turns[0] = human(rng.choice(["<image>\n", " "]) + turns[0]["value"] + rng.choice(["<image>", ""]))
            if turns[0]["value"].count("<image>") != 1:
                turns[0] = human("<image>")
        prompt = written(turns, template)
        shorter = not legacy and template == "vicuna_v1"
        ids, labels = original(prompt, separator, lambda text: slow_ids(text, legacy), shorter)
        try:
            example = encode_conversation(turns, template, tokenizer, visual_tokens=1)
        except NoSupervisedTokens:
            assert not any(answer for _, answer in rounds)
            continue
        assert example.tokens.tolist() == ids, prompt
        if labels is not None:
            assert example.labels.tolist() == labels, prompt
            kept += 1
        else:
            lost += 1
        end = "</s>" if template == "vicuna_v1" else " </s>"
        runs = [tokenizer.decode(run, skip_special_tokens=False) for run in learned_runs(example)]
        assert runs == [answer + end for _, answer in rounds if answer], prompt
    assert kept > 50 and lost > 50


def test_an_answer_may_hold_what_ends_one(kinds, slow_ids):
    turns = [human("q"), gpt("a</s>b ASSISTANT: c"), human("r"), gpt("d")]
    for legacy in (True, False):
        tokenizer = kinds["sentencepiece" if legacy else "sentencepiece, not legacy"]
        example = encode_conversation(turns, "vicuna_v1", tokenizer)
        text = VICUNA + "USER: q ASSISTANT: a</s>b ASSISTANT: c</s>USER: r ASSISTANT: d</s>"
        assert example.tokens.tolist() == [1, *slow_ids(text, legacy)]
        first, second = learned_runs(example)
        opening = len(slow_ids(text[: text.index(" a</s>")], legacy))
        assert first == slow_ids(text[: text.index("USER: r")], legacy)[opening:]
        assert first.count(2) == 2 and tokenizer.decode(second, False) == "d</s>"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].supervised_marks])
@pytest.mark.parametrize("kind", ["chat", "bytes"])
def test_every_template_with_both_kinds_of_tokenizer(kinds, raw, texts, slow_ids, name, kind):
    template, tokenizer = TEMPLATES[name], kinds[kind]
    rng = random.Random(9)
    pool = ["A" + text for text in texts(10, 100) if "s>" not in text and "\u2581" not in text and "#" not in text]

    chat_tokens = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]

    def library_ids(text):
        if kind == "chat":
            return slow_ids(text, True, {token: tokenizer.special_id(token) for token in chat_tokens})
        return raw[kind].encode(text, add_special_tokens=False).ids

    for _ in range(40):
        count = 1 if template.captions else rng.randrange(1, 4)
        rounds = [(rng.choice(pool), rng.choice(pool)) for _ in range(count)]
        images = rng.choice(["<image>\n", "<image><image>"])
        turns = [turn for question, answer in rounds for turn in (human(question), gpt(answer))]
        turns[0] = human(images + turns[0]["value"])
        example = encode_conversation(turns, template, tokenizer, visual_tokens=3)

        messages = [{"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(turns)]
        expected = [1] if kind != "bytes" else []
        for i, chunk in enumerate(render(messages, template).split("<image>")):
            expected += [IMAGE_TOKEN_ID] * 3 * (i > 0) + library_ids(chunk)
        assert example.tokens.tolist() == expected
        assert not (example.labels == IMAGE_TOKEN_ID).any()

        runs = learned_runs(example)
        decoded = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
        answers = [template.gap + answer + template.before_end + template.end for _, answer in rounds]
        if template.signs:
            answers = ["###", *(f"### Assistant:{answer}" for answer in answers)]
            answers[-1] += " "
        assert decoded == [answer if kind == "bytes" else answer.removeprefix(" ") for answer in answers]

        prompt = encode_prompt(messages[:-1], template, tokenizer, visual_tokens=3)
        assert example.tokens[: len(prompt)].tolist() == prompt.tolist()
        answer = example.tokens[len(prompt) :].tolist()  # it follows at once
        assert runs[-1][-len(answer) :] == answer if template.signs else answer[: len(runs[-1])] == runs[-1]


def test_no_token_reaches_from_the_opening_into_the_answer(kinds):
    """Byte-level BPE would join the newline of `assistant\\n` with one that begins the answer."""
    tokenizer = kinds["bytes"]
    assert len(tokenizer.encode("\n\n")) == 1
    example = encode_conversation([human("q"), gpt("\nYes.")], "qwen_2", tokenizer)
    (run,) = learned_runs(example)
    assert tokenizer.decode(run, False) == "\nYes.<|im_end|>"
    prompt = encode_prompt([{"role": "user", "content": "q"}], "qwen_2", tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt.tolist()


def test_plain_is_the_caption_and_a_newline(tokenizer):
    for question in ("<image>\nDescribe.", "Describe.\n<image>", "<image>"):
        example = encode_conversation([human(question), gpt("a red circle")], "plain", tokenizer, visual_tokens=2)
        caption = tokenizer.encode("a red circle\n")
        assert example.tokens.tolist() == [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *caption]
        assert example.labels.tolist() == [IGNORE] * 3 + caption
    example = encode_conversation([human("<image>"), gpt("")], "plain", tokenizer, visual_tokens=1)
    assert example.labels.tolist() == [IGNORE, IGNORE, *tokenizer.encode("\n")]


def test_several_images_stay_where_they_are(tokenizer):
    turns = [human("first <image> then <image> ?"), gpt("same"), human("and <image>"), gpt("no")]
    tokens = encode_conversation(turns, "vicuna_v1", tokenizer, visual_tokens=1).tokens.tolist()
    expected = [1, *tokenizer.encode(VICUNA + "USER: first ")]
    for chunk in (" then ", " ? ASSISTANT: same</s>USER: ", "\nand ASSISTANT: no</s>"):
        expected += [IMAGE_TOKEN_ID, *tokenizer.encode(chunk)]
    assert tokens == expected


def test_an_image_costs_its_places(tokenizer):
    turns = [human("<image>\nhi"), gpt("yes")]
    few = encode_conversation(turns, "vicuna_v1", tokenizer, visual_tokens=1)
    many = encode_conversation(turns, "vicuna_v1", tokenizer)
    assert len(many.tokens) - len(few.tokens) == 575 and (many.tokens == IMAGE_TOKEN_ID).sum() == 576


def test_an_image_in_an_answer_is_not_learned(tokenizer):
    example = encode_conversation([human("draw"), gpt("here <image> it is")], "mpt", tokenizer, visual_tokens=2)
    assert (example.labels[example.tokens == IMAGE_TOKEN_ID] == IGNORE).all()
    assert len(learned_runs(example)) == 1  # moved to the front of the answer, so one stretch follows it


def test_tagged_images(tokenizer):
    tokens = encode_conversation([human("<image>\nhi"), gpt("yes")], "v1_mmtag", tokenizer, visual_tokens=1).tokens
    at = tokens.tolist().index(IMAGE_TOKEN_ID)
    assert tokenizer.decode(tokens[:at]).endswith("USER: <Image>")
    assert tokenizer.decode(tokens[at:]).startswith("</Image>\nhi ASSISTANT: yes")


def test_a_first_turn_from_gpt_is_dropped(tokenizer):
    turns = [human("q"), gpt("a")]
    dropped = encode_conversation([gpt("<image> Welcome."), *turns], "vicuna_v1", tokenizer)
    assert dropped.tokens.tolist() == encode_conversation(turns, "vicuna_v1", tokenizer).tokens.tolist()


@pytest.mark.parametrize(
    ("turns", "line"),
    [
        ([], "the conversation has no turns"),
        ([gpt("hi")], "the conversation has no human turn"),
        ([human("q"), human("r")], "turn 1 is from 'human', as the turn before it is"),
        ([gpt("a"), gpt("b"), human("q")], "turn 1 is from 'gpt', as the turn before it is"),
        ([human("q"), {"from": "bot", "value": "a"}], "turn 1 is from 'bot'; expected 'human' or 'gpt'"),
        ([human("q"), {"value": "a"}], "turn 1 is not"),
        ([human("q"), gpt(None)], "turn 1 is not"),
        ([human("q"), gpt("\ud83d")], "turn 1 is not UTF-8"),
        (["q"], "turn 0 is not"),
    ],
)
def test_what_is_no_conversation(tokenizer, turns, line):
    with pytest.raises(UserError, match=line):
        encode_conversation(turns, "vicuna_v1", tokenizer)


def test_nothing_to_learn(tokenizer):
    for turns in ([human("q")], [human("q"), gpt("")]):
        with pytest.raises(NoSupervisedTokens, match="no answer with text"):
            encode_conversation(turns, "vicuna_v1", tokenizer)
    assert issubclass(NoSupervisedTokens, ValueError) and issubclass(TooLong, ValueError)


def test_too_long_is_never_cut(tokenizer):
    turns = [human("<image>\nhi"), gpt("yes")]
    length = len(encode_conversation(turns, "vicuna_v1", tokenizer).tokens)
    assert len(encode_conversation(turns, "vicuna_v1", tokenizer, max_length=length).tokens) == length
    with pytest.raises(TooLong, match=f"{length} tokens, 3 more than max_length {length - 3}"):
        encode_conversation(turns, "vicuna_v1", tokenizer, max_length=length - 3)


def test_prompt(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What? <image>"}]
    prompt = encode_prompt(messages, "vicuna_v1", tokenizer, visual_tokens=1)
    assert prompt.dtype == "int32"
    before, after = tokenizer.encode("Be kind. USER: "), tokenizer.encode("\nWhat? ASSISTANT:")
    assert prompt.tolist() == [1, *before, IMAGE_TOKEN_ID, *after]
    for bad in (messages[:1], [*messages, {"role": "assistant", "content": "x"}]):
        with pytest.raises(UserError, match="ends with a user message"):
            encode_prompt(bad, "vicuna_v1", tokenizer)


def test_what_ends_an_answer(kinds):
    bytes_, llama = kinds["bytes"], kinds["sentencepiece"]
    assert eos_ids_and_texts("vicuna_v1", llama) == ({2}, ())
    assert eos_ids_and_texts("llava_v0", llama) == ({2}, ("###",))
    assert eos_ids_and_texts("plain", llama) == ({2}, ("\n",))
    assert eos_ids_and_texts("qwen_2_5", bytes_) == ({bytes_.eos_id, bytes_.special_id("<|im_end|>")}, ())
    assert eos_ids_and_texts("mpt", llama) == ({2}, ("<|im_end|>",))


def test_text_imports_no_jax():
    code = "import sys, llava_jax.text.encode; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
