"""A teacher without a model: instruction data by rules, from captions and boxes alone.

It replaces GPT-4 of the paper (Visual Instruction Tuning, section 3), which saw captions and boxes only.
`RulesTeacher` answers as a language model would, in sentences; `short` writes the miniature's short answers.
Both read `annotations.scene` and one table of phrases.
"""

from llava_jax.synthesize.rules.short import (
    KINDS,
    QuestionAnswer,
    ask,
    caption,
    conversation,
    detail,
    open_split,
    reasoning,
    write_captions,
    write_instructions,
    write_questions,
)
from llava_jax.synthesize.rules.teacher import RulesTeacher

__all__ = [
    "KINDS",
    "QuestionAnswer",
    "RulesTeacher",
    "ask",
    "caption",
    "conversation",
    "detail",
    "open_split",
    "reasoning",
    "write_captions",
    "write_instructions",
    "write_questions",
]
