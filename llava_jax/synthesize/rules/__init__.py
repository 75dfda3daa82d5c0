"""A teacher without a model: instruction data by rules, from captions and boxes alone.

It replaces GPT-4 of the paper (Visual Instruction Tuning, section 3), which saw captions and boxes only.
`facts` reads `annotations.scene`, `phrases` says a fact in English or Korean, in sentences or shortly, and
`RulesTeacher` makes conversations, descriptions and reasoning of them. `miniature` writes the miniature's data.
"""

from llava_jax.synthesize.rules.miniature import open_split, write_captions, write_instructions, write_questions
from llava_jax.synthesize.rules.teacher import KINDS, QuestionAnswer, RulesTeacher

__all__ = [
    "KINDS",
    "QuestionAnswer",
    "RulesTeacher",
    "open_split",
    "write_captions",
    "write_instructions",
    "write_questions",
]
