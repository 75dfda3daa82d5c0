"""Keeps what users write text: only the template writes control tokens, and only parts are images.

A tokenizer reads `</s>` inside a text as the end of an answer, and a chat reads `<image>` as an image. Training does so
as well, as the published runs did. For a prompt, `LiteralText` cuts such a mark in two. Its characters then become
ordinary tokens, and no other token changes.
"""

import re
from dataclasses import astuple

from llava_jax.errors import UserError
from llava_jax.text.templates import IMAGE, TEMPLATES, VIDEO, Template, get
from llava_jax.text.tokenizer import Tokenizer, Tokens

CUT = "\ufdd0"
"""Character that cuts a mark in two, and becomes no token. Unicode keeps it free for such uses."""


class LiteralText:
    """Cuts the marks of a template and a tokenizer.

    Marks are `<image>`, `<video>`, the texts of control tokens, and strings of any template that are tokens. Words of a
    template that are ordinary text, such as `USER:`, are none.
    """

    def __init__(self, template: str | Template, tokenizer: Tokenizer):
        written = (value for format in (get(template), *TEMPLATES.values()) for value in astuple(format))
        strings = "\n".join(value for value in written if isinstance(value, str))
        control = tokenizer.control_tokens(re.findall(r"<[^\s<>]+>", strings))
        self._control = _first_characters(control.keys() - {IMAGE})
        self._all = _first_characters(control.keys() | {IMAGE, VIDEO})
        self._texts = {i: text for text, i in control.items() if i != tokenizer.unk_id}

    def cut(self, text: str, keep_images: bool = False) -> str:
        """Returns the text with its marks cut; `keep_images` leaves `<image>`. Raises UserError for a CUT in it."""
        if CUT in text:
            raise UserError("a text contains U+FDD0, which is no character")
        return (self._control if keep_images else self._all).sub(rf"\g<0>{CUT}", text)

    def drop_cuts(self, tokens: Tokens, text: str) -> Tokens:
        """Returns the tokens of a rendered chat without those of CUT.

        Raises UserError if a control token comes from another text than its mark, because the tokenizer normalises it,
        and if the tokenizer joins CUT with another character.
        """
        cuts, kept = {i for i, character in enumerate(text) if character == CUT}, Tokens([], [])
        for token, (first, last) in zip(*tokens, strict=True):
            if first in cuts and last <= first + 1:
                continue
            is_other = first >= 0 and text[first:last].strip() != self._texts.get(token, text[first:last].strip())
            if is_other or not cuts.isdisjoint(range(first, last)):
                raise UserError(f"this tokenizer cannot write {text[first:last].replace(CUT, '')!r} as ordinary text")
            kept.ids.append(token)
            kept.offsets.append((first, last))
        return kept


def _first_characters(marks: set[str]) -> re.Pattern:
    """Returns a pattern of the first character of each mark, also of marks that overlap."""
    return re.compile(r"(?=" + "|".join(re.escape(mark) for mark in sorted(marks) if len(mark) > 1) + r")[\s\S]")
