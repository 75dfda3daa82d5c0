"""A teacher without a model: instruction data by rules, from captions and boxes alone.

It stands in for GPT-4 of the paper (Visual Instruction Tuning, section 3), which never saw the picture either.
`short` writes the miniature's records of short answers; `RulesTeacher` answers as a language model would, in sentences.
"""

from llava_jax.synthesize.rules.short import (
    KINDS,
    Annotation,
    GridObject,
    QuestionAnswer,
    ask,
    caption,
    conversation,
    detail,
    read_box,
    read_coco,
    reasoning,
    write_captions,
    write_instructions,
    write_questions,
)
from llava_jax.synthesize.rules.teacher import RulesTeacher

__all__ = [
    "KINDS",
    "Annotation",
    "QuestionAnswer",
    "RulesTeacher",
    "GridObject",
    "ask",
    "caption",
    "conversation",
    "detail",
    "read_box",
    "read_coco",
    "reasoning",
    "write_captions",
    "write_instructions",
    "write_questions",
]
