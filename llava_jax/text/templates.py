"""Renders conversations as text, in the formats of the published LLaVA checkpoints.

A `Template` is data: the strings around a system text, a question and an answer. `spans` renders a conversation as
pieces of text that are supervised or not. Labels, prompts, displayed text and the Jinja template for Hugging Face all
follow from these. The strings are those of the published checkpoints, including every space.
"""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from llava_jax.errors import UserError

IMAGE, VIDEO = "<image>", "<video>"
"""Mark of an image or a video in a text, and of a video in Hugging Face's processors; never a token of its own."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """Strings of one conversation format.

    A question is `user + gap + text + after_user`, an answer `assistant + gap + text + before_end + end + after_end`.
    The answer's `gap + text + before_end + end` is supervised; `supervised_marks` add more. With `signs`, `end` is
    before every turn instead, and `end + after_end` after the last one.
    """

    name: str
    system: str | None  # default system text; None if the format has no system text
    before_system: str = ""
    after_system: str = ""
    system_in_question: bool = False  # whether the system text is inside the first question, after `user + gap`
    user: str
    after_user: str = ""
    assistant: str
    gap: str = ""
    before_end: str = ""
    end: str  # end of an answer: the text of a special token in most formats
    after_end: str = ""
    between: str = ""  # string before every question but the first
    signs: bool = False  # whether `end` starts every turn; it and the assistant's role are supervised, as in LLaVA v0
    empty: Literal["open", "closed", "omitted"] = "open"  # an empty text: role only, as any text, or none
    captions: bool = False  # whether only the images of a question are kept: image-caption pairs
    image: str = IMAGE  # form of an image's mark
    # Texts of tokens that are supervised wherever they are, as in LLaVA-NeXT's Qwen scripts. If there are any, an
    # answer's `assistant` and `after_end` are supervised too.
    supervised_marks: tuple[str, ...] = ()


class Span(NamedTuple):
    """A piece of a rendered conversation. `<image>` inside `text` marks an image."""

    text: str
    supervised: bool
    cut: bool = False  # whether no token may reach into it from before, because an answer starts


START_END = f"<im_start>{IMAGE}<im_end>"
"""An image between two tokens: a setting of the model (mm_use_im_start_end), so also in what benchmarks ask."""

CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TAGGED_IMAGES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
LLAMA_2_CHAT = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)

# vicuna_v1 is what v1 to v1.6 train and score with ("curious user"); llava_v1 is what LLaVA's demo sends them.
_VICUNA_V1 = Template(
    name="vicuna_v1",
    system=CURIOUS_USER,
    after_system=" ",
    user="USER:",
    after_user=" ",
    assistant="ASSISTANT:",
    gap=" ",
    end="</s>",
)
# The first LLaVA marked turns with a text, not with a token. It was trained on this form. LLaVA's later scripts ask
# with `###Human:` without spaces and newlines, which no training used.
_LLAVA_V0 = Template(
    name="llava_v0",
    system=CURIOUS_HUMAN,
    after_system="\n\n",
    user=" Human:",
    after_user="\n",
    assistant=" Assistant:",
    gap=" ",
    before_end="\n",
    end="###",
    after_end=" ",
    signs=True,
    empty="closed",
)
# The tokenizer adds the first <s>; later rounds have theirs in the text.
_LLAVA_LLAMA_2 = Template(
    name="llava_llama_2",
    system=LANGUAGE_AND_VISION,
    before_system="<<SYS>>\n",
    after_system="\n<</SYS>>\n\n",
    system_in_question=True,
    user="[INST]",
    after_user=" [/INST]",
    assistant="",
    gap=" ",
    before_end=" ",
    end="</s>",
    between="<s>",
    empty="omitted",
)
_MPT = Template(
    name="mpt",
    system=(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>",
    user="<|im_start|>user\n",
    after_user="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
)
# ChatML: unlike MPT's, with a newline after each turn.
_QWEN_1_5 = Template(
    name="qwen_1_5",
    system="You are a helpful assistant.",
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    user="<|im_start|>user\n",
    after_user="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    after_end="\n",
    empty="closed",
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Stage 1: an image, its caption, a newline. No system text and no end token.
        Template(name="plain", system=None, user="", assistant="", end="\n", empty="closed", captions=True),
        _VICUNA_V1,
        replace(_VICUNA_V1, name="llava_v1", system=CURIOUS_HUMAN),
        replace(_VICUNA_V1, name="v1_mmtag", system=TAGGED_IMAGES, image="<Image><image></Image>"),
        _LLAVA_V0,
        replace(_LLAVA_V0, name="v0_mmtag", system=TAGGED_IMAGES, image="<Image><image></Image>"),
        # LLaVA v0 and v1-1 were trained with mm_use_im_start_end: an image is between two tokens.
        replace(_LLAVA_V0, name="v0_start_end", image=START_END),
        replace(_VICUNA_V1, name="v1_start_end", image=START_END),
        _LLAVA_LLAMA_2,
        replace(_LLAVA_LLAMA_2, name="llama_2", system=LLAMA_2_CHAT),
        replace(_LLAVA_LLAMA_2, name="mistral_instruct", system="", between=""),
        _MPT,
        replace(_MPT, name="chatml_direct", system="Answer the questions."),
        replace(
            _MPT,
            name="mistral_orca",
            system=(
                "You are MistralOrca, a large language model trained by Alignment Lab AI. "
                "Write out your reasoning step-by-step to be sure you get the right answers!"
            ),
        ),
        Template(
            name="mistral_zephyr",
            system="You are a helpful AI assistant.",
            before_system="<|system|>\n",
            after_system="</s>",
            user="<|user|>\n",
            after_user="</s>",
            assistant="<|assistant|>\n",
            end="</s>",
        ),
        _QWEN_1_5,
        replace(
            _QWEN_1_5,
            name="qwen_2_5",
            system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
        # The same text with the labels of LLaVA-NeXT and OneVision.
        replace(_QWEN_1_5, name="qwen_1_5_original", supervised_marks=("\n", "<|im_start|>", "<|im_end|>")),
        Template(
            name="gemma_instruct",
            system=None,
            user="<start_of_turn>user\n",
            after_user="<end_of_turn>\n",
            assistant="<start_of_turn>model\n",
            end="<end_of_turn>",
            after_end="\n",
        ),
        Template(
            name="llava_llama_3",
            system=LANGUAGE_AND_VISION,
            before_system="<|start_header_id|>system<|end_header_id|>\n\n",
            after_system="<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n",
            after_user="<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
            empty="closed",
        ),
    )
}
# Other names of the same formats in LLaVA's scripts.
ALIASES = {"v1": "vicuna_v1", "v0_plain": "plain", "mistral_direct": "chatml_direct", "qwen_2": "qwen_1_5",
           "llama_3": "llava_llama_3"}


def get(template: str | Template) -> Template:
    """Returns the template of that name, or a `Template` itself. Raises UserError with the nearest name."""
    if isinstance(template, Template):
        return template
    name = ALIASES.get(template, template)
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(template, [*TEMPLATES, *ALIASES], n=1, cutoff=0)[0]
        raise UserError(f"unknown template {template!r}; did you mean {nearest!r}? There are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def spans(
    turns: Sequence[tuple[str, str]],
    template: Template,
    system: str | None = None,
    open_answer: bool = False,
    verbatim: bool = False,
    unsupervised: Collection[int] = (),
) -> list[Span]:
    """Renders a conversation as spans, whose texts join to the rendered conversation.

    Args:
      turns: (role, text) with roles "user" and "assistant", alternating from "user". In a text with exactly one
        `<image>` the mark is moved to the front, followed by a newline; a text with several keeps their positions.
      system: replaces the template's system text; "" leaves it out.
      open_answer: end with the start of an assistant turn, which the model continues.
      verbatim: write texts as they are: outer spaces stay, and an image is a bare `<image>` in every template, or
        START_END. LLaVA's benchmark scripts do so, unlike its training.
      unsupervised: indices of the answers that are not supervised.

    An empty text is written as the format's `empty` says. Raises UserError if the format cannot express the input.
    """
    if system and template.system is None:
        raise UserError(f"template {template.name!r} has no place for a system text; leave the system message out")
    system = (template.system if system is None else system) or ""
    if system:
        system = template.before_system + system + template.after_system
    before, inside = ("", system) if template.system_in_question else (system, "")

    sign = template.end if template.signs else ""
    supervised = [role == "assistant" and i not in unsupervised for i, (role, _) in enumerate(turns)]
    # A sign is supervised as the answer before it; the first one, if any answer is.
    is_supervised = any(supervised)
    rendered = [Span(before, False)]
    for i, (role, text) in enumerate(turns):
        if not verbatim:
            text = _move_image(text, template)
        elif template.image == START_END:
            text = text.replace(IMAGE, START_END)
        if role == "user":
            rendered += [Span(sign, is_supervised), Span(_question(text, template, first=i == 0, system=inside), False)]
            continue
        is_supervised = supervised[i]
        answer = template.gap + text + template.before_end
        if not text and template.empty != "closed":
            rendered.append(Span(template.assistant if template.empty == "open" else "", False))
        elif template.signs:
            rendered += [Span(sign + template.assistant, is_supervised), Span(answer, is_supervised, cut=True)]
        else:
            around = is_supervised and bool(template.supervised_marks)
            rendered += [Span(template.assistant, around), Span(answer + template.end, is_supervised, cut=True),
                         Span(template.after_end, around)]
    if open_answer:
        rendered.append(Span(sign + template.assistant, False))
    elif template.signs:
        rendered.append(Span(sign + template.after_end, is_supervised))
    return [span for span in rendered if span.text]


def _question(text: str, template: Template, first: bool, system: str) -> str:
    if template.captions:
        if not first:
            raise UserError(f"template {template.name!r} takes one image and its caption, not several rounds")
        if IMAGE not in text:
            raise UserError(f"template {template.name!r} captions an image, but the question has no {IMAGE}")
        return IMAGE * text.count(IMAGE)
    if not text and template.empty == "omitted":
        if first:
            raise UserError(f"template {template.name!r} cannot write an empty question as the first")
        return ""
    if not text and template.empty == "open":
        return template.user
    opening = template.user + template.gap + system if first else template.between + template.user + template.gap
    return opening + text + template.after_user


def _move_image(text: str, template: Template) -> str:
    if text.count(IMAGE) == 1:
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    return text.replace(IMAGE, template.image)


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    string: Callable[[str], str] = str,
    part: Callable[[str], str] = str,
) -> tuple[str | None, list[tuple[str, str]]]:
    """Checks chat messages and separates the system text from the turns.

    Args:
      messages: [{"role": "system" | "user" | "assistant", "content": ...}]; at most one system message, as the first;
        then user and assistant alternate. A content is a string or a list of {"type": "text", "text": str} (or strings)
        and {"type": "image"} (or "image_url", "video", "video_url"), which are joined by newlines in their order, as
        training data are.
      string, part: applied to a content that is a string, and to the text of a part (`literal.LiteralText.cut`).

    Returns (system text or None, [(role, text), ...]). Raises UserError that names the message.
    """
    if not messages:
        raise UserError("a conversation needs at least one message")
    turns = []
    for i, message in enumerate(messages):
        try:
            role, text = message["role"], _content_text(message["content"], string, part)
        except (KeyError, TypeError):
            expected = '{"role": ..., "content": text, or a list of text and image parts}'
            raise UserError(f"message {i} is not {expected}: {message!r:.200}") from None
        turns.append((role, check_text(text, f"message {i}")))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    offset = len(messages) - len(turns)
    for i, (role, _) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if role != expected:
            raise UserError(
                f"message {i + offset} is from {role!r}, not from {expected!r}: "
                "after at most one system message, user and assistant take turns"
            )
    return system, turns


def _content_text(content: str | Sequence[str | Mapping[str, str]], string: Callable[[str], str],
                  part: Callable[[str], str]) -> str:
    if isinstance(content, str):
        return string(content)
    return "\n".join(IMAGE if text is None else part(text) for text in map(_part_text, content))


def _part_text(part: str | Mapping[str, str]) -> str | None:
    """Returns the text of a part, or None for an image or a video."""
    if isinstance(part, str):
        return part
    if part["type"] in ("image", "image_url", "video", "video_url"):
        return None
    if part["type"] != "text":
        raise TypeError("a part of another type")
    if not isinstance(part["text"], str):
        raise TypeError("a text of another type")
    return part["text"]


def check_text(text: str, name: str) -> str:
    """Returns the text itself. Raises UserError if it contains bytes that Python could not read as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = ascii(text[error.start])
        raise UserError(f"{name} is not UTF-8: its character {error.start + 1} is the lone surrogate {wrong}") from None
    return text


def render(messages: Sequence[Mapping[str, Any]], template: str | Template, open_answer: bool = False) -> str:
    """Returns the text of a conversation, without the BOS token that a tokenizer may add.

    See `read_messages` for the messages. `open_answer` ends the text with the start of an assistant turn.
    """
    system, turns = read_messages(messages)
    return "".join(span.text for span in spans(turns, get(template), system, open_answer))


def chat_template(template: str | Template, video: str | None = None) -> str:
    """Returns the Jinja source that gives `render`'s text in Hugging Face's `apply_chat_template`.

    `add_generation_prompt` is `open_answer`. It keeps only the checks on messages that the format itself needs.
    `video`: mark of a video, if the processor takes videos.
    """
    fields = {field: "none" if value is None else json.dumps(value) for field, value in asdict(get(template)).items()
              if field != "supervised_marks"}  # it changes no text
    fields |= {"video": json.dumps(video)} if video else {}
    return "{%- set t = {" + ", ".join(f'"{field}": {value}' for field, value in fields.items()) + "} -%}" + _JINJA


# The same as `read_messages`, `spans` and `_move_image`, with the template's fields as a dict `t`.
_JINJA = """
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {{- '' if loop.first else '\\n' -}}
      {%- if part is string -%}
        {{- part -}}
      {%- elif part['type'] in ('image', 'image_url') -%}
        {{- '<image>' -}}
      {%- elif part['type'] in ('video', 'video_url') and t.video -%}
        {{- t.video -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- else -%}
        {{- raise_exception('this format has no place for a part of type ' ~ part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system = t.system or '' -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = text_of(messages[0]['content']) -%}
  {%- set messages = messages[1:] -%}
  {%- if system and t.system is none -%}
    {{- raise_exception('this format has no place for a system text') -}}
  {%- endif -%}
{%- endif -%}
{%- if system -%}{%- set system = t.before_system ~ system ~ t.after_system -%}{%- endif -%}
{%- if not t.system_in_question -%}{{- system -}}{%- endif -%}
{%- set sign = t.end if t.signs else '' -%}
{%- for message in messages -%}
  {%- set text = text_of(message['content']) -%}
  {%- set images = text.split('<image>') | length - 1 -%}
  {%- set videos = text.split(t.video) | length - 1 if t.video else 0 -%}
  {%- set mark = '<image>' if images else t.video -%}
  {%- if images + videos == 1 -%}{%- set text = (mark ~ '\\n' ~ text.replace(mark, '').strip()).strip() -%}{%- endif -%}
  {%- set text = text.replace('<image>', t.image) -%}
  {%- if videos -%}{%- set text = text.replace(t.video, t.image.replace('<image>', t.video)) -%}{%- endif -%}
  {%- if message['role'] != 'user' -%}
    {%- if text or t.empty != 'omitted' -%}{{- sign ~ t.assistant -}}{%- endif -%}
    {%- if text or t.empty == 'closed' -%}
      {{- t.gap ~ text ~ t.before_end -}}
      {%- if not t.signs -%}{{- t.end ~ t.after_end -}}{%- endif -%}
    {%- endif -%}
  {%- elif t.captions -%}
    {{- '<image>' * images -}}
  {%- elif text or t.empty == 'closed' -%}
    {{- sign -}}
    {%- if not loop.first -%}{{- t.between -}}{%- endif -%}
    {{- t.user ~ t.gap -}}
    {%- if loop.first and t.system_in_question -%}{{- system -}}{%- endif -%}
    {{- text ~ t.after_user -}}
  {%- elif t.empty == 'open' -%}
    {{- t.user -}}
  {%- elif loop.first -%}
    {{- raise_exception('this format cannot write an empty question as the first') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- sign ~ t.assistant -}}
{%- elif t.signs -%}
  {{- sign ~ t.after_end -}}
{%- endif -%}
"""
