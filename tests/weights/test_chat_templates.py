"""Which conversation template a checkpoint's files tell, and what is refused instead of guessed."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from llava_jax.errors import UserError
from llava_jax.text import agreement, templates
from llava_jax.weights.chat_templates import template_name

GOLDEN = Path(__file__).parents[1] / "golden"
LOOP = "{% for m in messages %}{{ '[M]' ~ m['content'] ~ '[E]' }}{% endfor %}"
LLAVA_HF = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}
{% endif %}{# images #}{{ '<image>' }}{{ message['content'] + ' '}}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@pytest.fixture(autouse=True)
def say_again():
    agreement.say.cache_clear()


def chat(directory, text):
    (directory / "chat_template.jinja").write_text(text)
    return directory


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_our_own_are_recognised_without_a_word(tmp_path, capsys, name):
    assert template_name(chat(tmp_path, templates.chat_template(name)), "llama") == name
    # An older version wrote fewer fields, and an export may write a blank behind images.
    text = templates.chat_template(name).replace('"captions": false, ', "").replace('"<image>"}', '"<image> "}')
    assert template_name(chat(tmp_path, text), "llama") == name
    assert capsys.readouterr().err == ""
    changed = templates.chat_template(name).replace('"end": "', '"end": "!')
    with pytest.raises(UserError, match="chat_template.jinja: this chat template is none that is known"):
        template_name(chat(tmp_path, changed.replace("USER", "X").replace("<", "(").replace("[INST]", "")), "llama")


def jinja_of(name, opening, end):
    system = json.dumps(templates.get(name).system)
    return f"{{{{ {system} }}}}" + LOOP.replace("[M]", opening).replace("[E]", end)


CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>\\n' }}{% endif %}{{
'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
VICUNA = jinja_of("vicuna_v1", "USER: ", " ASSISTANT: ")


@pytest.mark.parametrize("text, old, new", [
    (CHATML, "assistant.<", "assistant. Answer in French.<"), (CHATML, "You are", "Good day. You are"),
    (CHATML, "'<|im_end|>' + '\\n'", "'<|im_end|>'"), (CHATML, "m['role'] + '\\n'", "m['role'] + ' '"),
    (CHATML, "<|im_start|>assistant\\n", "<|im_start|>assistant "), (CHATML, "assistant\\n'", "assistant:\\n'"),
    (VICUNA, "questions.", "questions. Be brief."), (VICUNA, "USER: ", "USER:\\n"),
    (VICUNA, " ASSISTANT", "### ASSISTANT"),
    (LLAVA_HF, "'ASSISTANT:' }}", "'ASSISTANT:' }}{{ '\\n' }}"),
])
def test_small_changes_are_not_taken_for_the_format(tmp_path, text, old, new):
    assert template_name(chat(tmp_path, text), "llama") in ("qwen_1_5", "vicuna_v1")
    assert template_name(chat(tmp_path, text.replace("\\n", "\n")), "llama") in ("qwen_1_5", "vicuna_v1")
    assert old in text
    with pytest.raises(UserError, match="by --template"):
        template_name(chat(tmp_path, text.replace(old, new)), "llama")


def test_a_system_text_with_escaped_quotes(tmp_path):
    system = templates.get("vicuna_v1").system.replace("'", "\\'")
    text = f"{{% set s = '{system}' %}}{{{{ s + ' ' }}}}{{{{ 'USER: ' + q + ' ' }}}}{{{{ 'ASSISTANT:' }}}}"
    assert template_name(chat(tmp_path, text), "llama") == "vicuna_v1"


@pytest.mark.parametrize("text, expected", [
    (LLAVA_HF, "vicuna_v1"),
    (jinja_of("vicuna_v1", "USER: ", "ASSISTANT: "), "vicuna_v1"),
    (jinja_of("qwen_1_5", "<|im_start|>user\\n", "<|im_end|>\\n"), "qwen_1_5"),
    (jinja_of("qwen_2_5", "<|im_start|>user\\n", "<|im_end|>\\n"), "qwen_2_5"),
    (jinja_of("llava_llama_2", "[INST] <<SYS>>", "[/INST]"), "llava_llama_2"),
    (jinja_of("llama_2", "[INST] <<SYS>>", "[/INST]"), "llama_2"),
    (jinja_of("llava_llama_3", "<|start_header_id|><|end_header_id|>", "<|eot_id|>"), "llava_llama_3"),
])
def test_marks_and_system_text_are_taken_and_told(tmp_path, capsys, text, expected):
    assert template_name(chat(tmp_path, text), "llama") == expected
    assert capsys.readouterr().err == (
        f"template {expected}: {tmp_path}/chat_template.jinja has its marks (--template chooses another)\n")


@pytest.mark.parametrize("text", [
    LOOP, "[INST]", "USER: ", "<|im_start|><|im_end|>",  # no system text, or marks alone
    LOOP.replace("[M]", "<|user|>\\n").replace("[E]", "</s>"),
    LOOP.replace("[M]", "<|start_header_id|>user<|end_header_id|>").replace("[E]", "<|eot_id|>"),
    LOOP.replace("[M]", "USER: ").replace("[E]", "\\nASSISTANT:"),
    "{% set t = {'name': 'vicuna_v1'} %}", '{%- set t = {"name": "vicuna_v9", } -%}',
])
def test_what_is_not_known_asks_for_a_template(tmp_path, text):
    with pytest.raises(UserError, match="chat_template.jinja: .* by --template") as error:
        template_name(chat(tmp_path, text), "llama")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text_model, expected", [
    ("llama", "vicuna_v1"), ("mistral", "mistral_instruct"), ("qwen2", "qwen_1_5")])
def test_without_a_chat_template_the_decoder_decides(tmp_path, capsys, text_model, expected):
    assert template_name(tmp_path, text_model) == expected
    assert capsys.readouterr().err.startswith(f"template {expected}: {tmp_path} has no chat template")
    # The golden tokenizer knows </s>, but no <|im_end|>.
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    assert template_name(tmp_path, text_model) == ("vicuna_v1" if text_model == "qwen2" else expected)


@pytest.mark.parametrize("text_model, end, expected", [
    ("llama", "<|im_end|>", "chatml_direct"), ("llama", "<|eot_id|>", "llava_llama_3"),
    ("qwen2", "<|im_end|>", "qwen_1_5")])
def test_without_a_chat_template_the_end_of_an_answer_decides(tmp_path, text_model, end, expected):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert template_name(tmp_path, text_model) == expected


@pytest.mark.parametrize("name, content", [
    ("chat_template.json", {"chat_template": 7}), ("processor_config.json", {"chat_template": {"a": "b"}}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 1}]}), ("chat_template.json", []),
])
def test_wrong_types_name_the_file(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=name):
        template_name(tmp_path, "llama")


IMAGES = "{%- for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
LOOP_WITH_IMAGES = "{% for m in messages %}{{ [M] }}" + IMAGES + "{{ m['content'][0]['text'] }}{{ [E] }}{% endfor %}"


@pytest.mark.parametrize("text_model, opening, end, expected", [
    ("llama", "'<|im_start|>' + m['role'] + '\\n'", "'<|im_end|>'", "chatml_direct"),
    ("llama", "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'", "'<|eot_id|>'", "llava_llama_3"),
    ("mistral", "'<<SYS>>\\n' if m.role == 'system' else '[INST] '", "' [/INST]'", "mistral_instruct"),
    ("qwen2", "'<|im_start|>' + m['role'] + ' '", "'<|im_end|>'", "qwen_1_5"),
    ("qwen2", "'<|im_start|>' + m['role'] + '\\n'", "'<|im_end|>\\n'", "qwen_1_5"),
])
def test_converted_templates_by_decoder(tmp_path, capsys, text_model, opening, end, expected):
    text = LOOP_WITH_IMAGES.replace("[M]", opening).replace("[E]", end)
    assert template_name(chat(tmp_path, text), text_model) == expected
    said = capsys.readouterr().err
    assert said.startswith(f"template {expected}: {tmp_path}/chat_template.jinja has its marks")
    assert ("without the system text" in said) is bool(templates.get(expected).system)
    for other in (text + "{{ 'Answer in French.' }}", "Be brief. " + text, text.replace("'image'", "'picture'")):
        with pytest.raises(UserError, match="by --template"):
            template_name(chat(tmp_path, other), text_model)
    with pytest.raises(UserError, match="by --template"):
        template_name(chat(tmp_path, text), "qwen2" if text_model == "mistral" else "mistral")
