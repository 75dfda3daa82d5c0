import random

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_jax.errors import UserError
from llava_jax.text.templates import ALIASES, TEMPLATES, chat_template, get, read_messages, render, spans

ROUNDS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "<image>\nhi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
]
# Written out by hand from the formats' definitions, with an open answer at the end.
RENDERED = {
    "vicuna_v1": "Be kind. USER: <image>\nhi ASSISTANT: yes</s>USER: why? ASSISTANT:",
    "llava_v1": "Be kind. USER: <image>\nhi ASSISTANT: yes</s>USER: why? ASSISTANT:",
    "v1_mmtag": "Be kind. USER: <Image><image></Image>\nhi ASSISTANT: yes</s>USER: why? ASSISTANT:",
    "llava_v0": "Be kind.\n\n### Human: <image>\nhi\n### Assistant: yes\n### Human: why?\n### Assistant:",
    "v0_mmtag": "Be kind.\n\n### Human: <Image><image></Image>\nhi\n### Assistant: yes\n"
    "### Human: why?\n### Assistant:",
    "v1_start_end": "Be kind. USER: <im_start><image><im_end>\nhi ASSISTANT: yes</s>USER: why? ASSISTANT:",
    "v0_start_end": "Be kind.\n\n### Human: <im_start><image><im_end>\nhi\n### Assistant: yes\n"
    "### Human: why?\n### Assistant:",
    "llava_llama_2": "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nhi [/INST] yes </s><s>[INST] why? [/INST]",
    "llama_2": "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nhi [/INST] yes </s><s>[INST] why? [/INST]",
    "mistral_instruct": "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nhi [/INST] yes </s>[INST] why? [/INST]",
    "mpt": "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\n<image>\nhi<|im_end|>"
    "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n",
    "mistral_zephyr": "<|system|>\nBe kind.</s><|user|>\n<image>\nhi</s>"
    "<|assistant|>\nyes</s><|user|>\nwhy?</s><|assistant|>\n",
    "qwen_1_5": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\nhi<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n",
    "llava_llama_3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
for name, twin in {"chatml_direct": "mpt", "mistral_orca": "mpt", "qwen_2_5": "qwen_1_5",
                   "qwen_1_5_original": "qwen_1_5"}.items():
    RENDERED[name] = RENDERED[twin]
GEMMA = (
    "<start_of_turn>user\n<image>\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
    "<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n"
)


@pytest.mark.parametrize("name", RENDERED)
def test_two_rounds_by_hand(name):
    assert render(ROUNDS, name, open_answer=True) == RENDERED[name]


def test_formats_without_a_system_text():
    assert render(ROUNDS[1:], "gemma_instruct", open_answer=True) == GEMMA
    caption = [{"role": "user", "content": "Describe.\n<image>"}, {"role": "assistant", "content": "a red circle"}]
    assert render(caption, "plain") == "<image>a red circle\n"
    assert {*RENDERED, "gemma_instruct", "plain"} == {*TEMPLATES}


def test_default_system_texts():
    def start(name):
        return render([{"role": "user", "content": "hi"}], name)

    assert start("vicuna_v1") == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: hi "
    )
    assert start("llava_v1") == start("vicuna_v1").replace("user", "human")
    assert "natural language.The visual content" in start("v0_mmtag")  # as trained, no blank
    assert "while being safe.  Your answers" in start("llama_2")  # as trained, two blanks
    assert start("chatml_direct").startswith("<|im_start|>system\nAnswer the questions.<|im_end|>")
    assert start("mistral_instruct") == "[INST] hi [/INST]"


def test_an_empty_system_message_leaves_the_system_text_out():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert render(messages, "vicuna_v1", open_answer=True) == "USER: hi ASSISTANT:"
    assert render(messages, "llava_llama_2") == "[INST] hi [/INST]"
    assert render(messages, "gemma_instruct") == "<start_of_turn>user\nhi<end_of_turn>\n"


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("  a <image> b  ", "<image>\na  b"),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("<image>\n<image>\n differ? ", "<image>\n<image>\n differ? "),
        ("first <image> then <image>", "first <image> then <image>"),
    ],
)
def test_a_single_image_goes_to_the_front(text, placed):
    assert render([{"role": "user", "content": text}], "mistral_instruct") == f"[INST] {placed} [/INST]"


SHORT = [("user", "a"), ("assistant", ""), ("user", ""), ("assistant", "b")]
# LLaVA's conversations leave an empty turn open (its TWO and MPT styles) or out (LLAMA_2); what formatted the data of
# the first LLaVA and of LLaVA-NeXT's Qwen and Llama 3 writes it as any other. By hand.
EMPTY = {
    "vicuna_v1": "S USER: a ASSISTANT:USER:ASSISTANT: b</s>",
    "mpt": "<|im_start|>system\nS<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant\n<|im_start|>user\n"
    "<|im_start|>assistant\nb<|im_end|>",
    "llama_2": "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s>",
    "llava_v0": "S\n\n### Human: a\n### Assistant: \n### Human: \n### Assistant: b\n### ",
    "qwen_1_5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "mistral_zephyr": "<|system|>\nS</s><|user|>\na</s><|assistant|>\n<|user|>\n<|assistant|>\nb</s>",
    "llava_llama_3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
}
for name, twins in {"vicuna_v1": ("llava_v1", "v1_mmtag", "v1_start_end"), "llava_v0": ("v0_mmtag", "v0_start_end"),
                    "qwen_1_5": ("qwen_2_5", "qwen_1_5_original"),
                    "llama_2": ("llava_llama_2", "mistral_instruct"), "mpt": ("chatml_direct", "mistral_orca")}.items():
    EMPTY |= dict.fromkeys(twins, EMPTY[name])


@pytest.mark.parametrize("name", EMPTY)
def test_empty_texts_by_hand(name):
    assert "".join(span.text for span in spans(SHORT, get(name), "S")) == EMPTY[name]
    assert {*EMPTY, "gemma_instruct", "plain"} == {*TEMPLATES}


def test_a_first_question_cannot_be_left_out():
    """The original asserts so: the system text stands in it."""
    for name in ("llama_2", "llava_llama_2", "mistral_instruct"):
        with pytest.raises(UserError, match="empty question as the first"):
            render([{"role": "user", "content": ""}], name)


def test_learned_spans_are_the_answers_and_their_ends():
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    ends = {"vicuna_v1": " {}</s>", "llama_2": " {} </s>", "qwen_2_5": "{}<|im_end|>"}
    ends |= {"gemma_instruct": "{}<end_of_turn>", "llava_llama_3": "{}<|eot_id|>", "mistral_zephyr": "{}</s>"}
    for name, answer in ends.items():
        learned = [span.text for span in spans(turns, get(name)) if span.supervised]
        assert learned == [answer.format("one"), answer.format("two")], name


def test_the_first_llava_learns_its_signs_and_the_assistants_role():
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    for name in ("llava_v0", "v0_mmtag"):
        laid_out = spans(turns, get(name), "S")
        marked = "".join(f"[{span.text}]" if span.supervised else span.text for span in laid_out).replace("][", "")
        assert marked == (
            "S\n\n[###] Human: q\n[### Assistant: one\n###] Human: r\n[### Assistant: two\n### ]"
        )


def test_content_in_parts():
    image = {"type": "image"}
    parts = [{"type": "text", "text": "Before:"}, image, {"type": "text", "text": "After:"}, image]
    turns = [("user", "Before:\n<image>\nAfter:\n<image>")]
    assert read_messages([{"role": "user", "content": parts}]) == (None, turns)
    assert render([{"role": "user", "content": parts[:2]}], "mistral_instruct") == "[INST] <image>\nBefore: [/INST]"


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0 is not"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "message 0 is not"),
        ([{"role": "user", "content": None}], "message 0 is not"),
        ([ROUNDS[1], {"role": "assistant", "content": "caf\udce9"}], r"message 1 is not UTF-8: its character 4 is"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], r"surrogate '\\ud83d'"),
        ([{"role": "assistant", "content": "hi"}], "message 0 is from 'assistant', not from 'user'"),
        ([*ROUNDS, {"role": "system", "content": "x"}], "message 4 is from 'system', not from 'assistant'"),
        ([*ROUNDS, ROUNDS[1]], "message 4 is from 'user', not from 'assistant'"),
    ],
)
def test_bad_messages_are_named(messages, line):
    with pytest.raises(UserError, match=line):
        render(messages, "vicuna_v1")


def test_bad_use_of_a_format():
    with pytest.raises(UserError, match="no place for a system text"):
        render(ROUNDS, "gemma_instruct")
    with pytest.raises(UserError, match="has no <image>"):
        render([{"role": "user", "content": "hi"}], "plain")
    with pytest.raises(UserError, match="not several rounds"):
        render(ROUNDS[1:], "plain")


def test_lookup():
    assert get("v1") is get("vicuna_v1") is get(get("vicuna_v1"))
    assert {get(alias).name for alias in ALIASES} <= {*TEMPLATES}
    with pytest.raises(UserError, match="unknown template 'vicuna_v2'; did you mean 'vicuna_v1'"):
        get("vicuna_v2")


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja_renders_the_same(name):
    """transformers' own renderer against `render`, over contents of both forms."""
    template, source = get(name), chat_template(name)
    rng = random.Random(name)
    contents = ["hi", " hi\n", "", "What is this? <image> ", "<image>\n<image> two", "<image>"]
    contents += ['quo"te\\n \u2581 한 {{ x }}', [{"type": "text", "text": "한"}]]
    contents += [[{"type": "text", "text": " look "}, {"type": "image"}, {"type": "text", "text": "why"}]]
    contents += [[{"type": "image"}, {"type": "image"}], [{"type": "text", "text": "only text"}], []]
    contents += [["hm", {"type": "image_url", "image_url": {"url": "a.png"}}, "", {"type": "image"}]]
    contents += [[{"type": "text", "text": " a\n"}, {"type": "image"}, {"type": "text", "text": ""}, {"type": "image"}]]
    compared = 0
    for _ in range(200):
        system = [{"role": "system", "content": rng.choice(["Be kind.", "", [{"type": "text", "text": "Be."}]])}]
        turns = rng.randrange(1, 3 if template.captions else 7)
        messages = [{"role": ("user", "assistant")[i % 2], "content": rng.choice(contents)} for i in range(turns)]
        messages = system * rng.randrange(2) + messages
        open_answer = bool(rng.randrange(2))
        try:
            expected = render(messages, name, open_answer)
        except ValueError:
            continue  # an empty question, or a caption without an image
        rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=open_answer)
        assert rendered == [expected]
        compared += 1
    assert compared > 40


def test_jinja_refuses_what_the_format_cannot_write():
    for name, content in (("gemma_instruct", "x"), ("llama_2", ""), ("vicuna_v1", [{"type": "video"}])):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
        with pytest.raises(Exception, match="this format"):
            render_jinja_template([messages], chat_template=chat_template(name))
