"""Recognises the conversation template of a checkpoint from its files. Jinja source is never executed."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from llava_jax.errors import UserError
from llava_jax.files import json_type, read_json, read_text
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer

LLAVA_HF = ("['role'].upper() + ': '", "'ASSISTANT:'")
"""Marks of the chat templates under llava-hf/ at Hugging Face. They omit LLaVA's system text."""

# Marks that a chat template must contain, besides the default system text, to be recognised.
MARKS = {
    "vicuna_v1": ("USER:", "ASSISTANT:"),
    "llava_llama_2": ("[INST]", "[/INST]", "<<SYS>>"),
    "llama_2": ("[INST]", "[/INST]", "<<SYS>>"),
    "llava_llama_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen_2_5": ("<|im_start|>", "<|im_end|>"),  # its system text contains the next one's
    "qwen_1_5": ("<|im_start|>", "<|im_end|>"),
}
# Patterns that it must not contain: the same marks with other whitespace or signs around them.
_NOT_VICUNA = r"(USER|ASSISTANT):\s*\n(?!\Z)|###"
_NOT_CHATML = r"<\|im_end\|>(?!\n)|<\|im_start\|>\w+(?![\w\n'\"])|role(['\"]\])?\s*[+~]\s*['\"][^\n]"
OTHERS = {"vicuna_v1": _NOT_VICUNA, "qwen_2_5": _NOT_CHATML, "qwen_1_5": _NOT_CHATML}

# Templates of 1.6 and OneVision by the decoder, and marks of what transformers' conversions wrote for them: images
# before texts, and no system text, although the models were trained with one.
CONVERTED = {
    "llama": {"llava_llama_3": MARKS["llava_llama_3"], "chatml_direct": MARKS["qwen_1_5"]},
    "mistral": {"mistral_instruct": ("[INST]", "[/INST]")},
    "qwen2": {"qwen_1_5": MARKS["qwen_1_5"]},
}
BY_TEXT_MODEL = {"mistral": "mistral_instruct", "qwen2": "qwen_1_5"}


def template_name(directory: Path, text_model: str) -> str:
    """Returns the name of a checkpoint's conversation template. An uncertain choice is printed on stderr.

    1. The template that wrote the checkpoint's chat template, or one whose marks and system text it contains.
    2. Where images are parts of a message, the decoder's template of 1.6 or OneVision whose marks it contains, if it
       writes no system text of its own.
    3. Without a chat template, one of the decoder's family whose end of an answer the tokenizer has.

    Raises UserError that asks for a template if the chat template is unknown.
    """
    file, text = chat_template(directory)
    if not text:
        return _by_decoder(directory, text_model)
    if name := _exported_template(text):
        return name
    joined = _joined(text)
    for name, marks in (("vicuna_v1", LLAVA_HF), *MARKS.items()):
        if (all(mark in text for mark in marks) and not re.search(OTHERS.get(name, "(?!)"), joined)
                and (marks is LLAVA_HF or _has_system(joined, templates.get(name).system))):
            agreement.say(f"template {name}: {file} has its marks (--template chooses another)")
            return name
    for name, marks in CONVERTED.get(text_model, {}).items():
        if all(mark in text for mark in marks) and re.search("['\"]image['\"]", text) and not _own_words(text, name):
            system = ", without the system text that the model was trained with" * bool(templates.get(name).system)
            agreement.say(f"template {name}: {file} has its marks{system} (--template chooses another)")
            return name
    raise UserError(f"{file}: this chat template is none that is known here; name the format that the model was "
                    f"trained with by --template (template= in Python, model.template in a recipe): "
                    f"{', '.join(templates.TEMPLATES)}")


def _by_decoder(directory: Path, text_model: str) -> str:
    name = BY_TEXT_MODEL.get(text_model, "vicuna_v1")
    if any((directory / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        tokenizer = Tokenizer.load(directory)
        if text_model == "llama" and agreement.choose_template(tokenizer) == "qwen_1_5":
            name = "chatml_direct"  # Yi, the decoder of LLaVA-1.6-34B
        elif agreement.end_problem(name, tokenizer):
            return agreement.template_for_decoder(tokenizer, str(directory))
    agreement.say(f"template {name}: {directory} has no chat template, its decoder is a {text_model} "
                  "(--template chooses another)")
    return name


def _exported_template(text: str) -> str | None:
    """Returns the template from which `templates.chat_template` wrote a text, in this or an earlier version."""
    header = re.match(r'\{%- set t = \{"name": "(\w+)", .*?\} -%\}', text)
    if header is None or header[1] not in templates.TEMPLATES:
        return None
    for field, value in asdict(templates.get(header[1])).items():
        written = "none" if value is None else json.dumps(value)
        # An exported template may have a space after its images, and an old one lacks newer fields.
        if field != "image" and f'"{field}": ' in header[0] and f'"{field}": {written}' not in header[0]:
            return None
    return header[1]


def _joined(text: str) -> str:
    """Unescapes newlines and quotes of a Jinja text, and joins adjacent strings."""
    text = re.sub(r"(?<!\\)(['\"])\s*(?:[+~]|-?\}\}\s*\{\{-?)\s*\1", "", text.replace("\\n", "\n"))
    return re.sub(r"\\(['\"])", r"\1", text)


def _own_words(text: str, name: str) -> str:
    """Returns what a chat template writes besides marks, roles and the template's system text, without blanks."""
    text = re.sub(r"(?s)\{#.*?#\}|raise_exception\(.*?\)|\{%-?\s*(?!set\b|\s).*?%\}", "", text)  # conditions, loops
    text = re.sub(r"\[\s*(['\"])\w+\1\s*\]", "", text)  # names of fields
    strings = [match[2] for match in re.finditer(r"(?s)(['\"])((?:\\.|(?!\1).)*)\1", text)]
    written = " ".join([*strings, re.sub(r"(?s)\{\{.*?\}\}|\{%.*?%\}", "", text)]).replace("\\n", "\n")
    written = written.replace(templates.get(name).system or "\n", "")
    return re.sub(r"<+[^<>]*>+|\[/?INST\]|\b(system|user|assistant)\b|\s", "", written)


def _has_system(joined: str, system: str | None) -> bool:
    """Returns whether a text contains this system text between the bounds of strings or marks."""
    return re.search(rf"(?:^|['\"}}>]|system)\s*{re.escape(system or '')}\s*(?:['\"{{<]|USER:|$)", joined) is not None


def chat_template(directory: Path) -> tuple[Path, str]:
    """Returns the file and Jinja text of a checkpoint's chat template; the text is "" if there is none."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        return jinja, read_text(jinja)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = directory / name
        template = read_json(file).get("chat_template") if file.exists() else None
        if isinstance(template, list):  # several, by name
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str | None):
            raise UserError(f"{file}: chat_template is {json_type(template)}; it must be a text")
        if template:
            return file, template
    return jinja, ""
