"""Checks that a template, a tokenizer and a model match.

A mismatch causes no error by itself. JAX clamps an id beyond the embedding to another one. If the end of an answer is
no token, the model learns it as a few letters.
"""

import functools
import re
import sys

from llava_jax.errors import UserError
from llava_jax.text.templates import IMAGE, Template, get
from llava_jax.text.tokenizer import Tokenizer

CANDIDATES = ("vicuna_v1", "llava_llama_3", "qwen_1_5", "gemma_instruct")
"""Templates of different families, in the order in which `choose_template` tries them."""


def check(template: str | Template, tokenizer: Tokenizer, vocab_size: int, where: str, trained: bool = False,
          visual_tokens: int = 0, context: int | None = None) -> None:
    """Raises UserError, one line that starts with `where`, if the three do not match.

    Args:
      vocab_size: number of rows of the model's embedding.
      trained: whether the model was trained on this template. An end that is no token is then reported on stderr only,
        because this project's inference also searches for the text of the end.
      visual_tokens: number of visual tokens of a tile.
      context: maximum number of tokens of the model's context.
    """
    if context is not None and visual_tokens >= context:
        raise UserError(f"{where}: an image takes {visual_tokens:,} tokens, and the model's context is {context:,} "
                        "(max_position_embeddings); no conversation about it fits")
    if beyond := tokens_beyond(tokenizer, vocab_size):
        named = ", ".join(f"{text!r} = {i}" for text, i in beyond[:4]) + (", ..." if len(beyond) > 4 else "")
        raise UserError(f"{where}: the tokenizer has ids up to {beyond[-1][1]}, the embedding has {vocab_size} rows; "
                        f"resize the embedding, or take out of the tokenizer's files: {named}")
    if problem := end_problem(template, tokenizer):
        if not trained:
            raise UserError(f"{where}: {problem}")
        say(f"{where}: {problem}; transformers and servers will not stop there")


def tokens_beyond(tokenizer: Tokenizer, vocab_size: int) -> list[tuple[str, int]]:
    """Returns tokens whose ids have no row. `<image>` and a padding token need none: they are never looked up."""
    exempt = () if tokenizer.pad_id in (tokenizer.bos_id, tokenizer.eos_id) else (tokenizer.pad_id,)
    return [(text, i) for text, i in tokenizer.tokens_from(vocab_size) if text != IMAGE and i not in exempt]


def end_problem(template: str | Template, tokenizer: Tokenizer) -> str:
    """Describes the problem if a template ends answers with a mark that is no token of the tokenizer, else ""."""
    template = get(template)
    if not re.fullmatch(r"<\S+>", template.end) or tokenizer.special_id(template.end) is not None:
        return ""
    better = choose_template(tokenizer)
    hint = f"; template {better} ends with one" if better else ""
    return f"template {template.name} ends answers with {template.end}, which is no token of the tokenizer{hint}"


def choose_template(tokenizer: Tokenizer) -> str | None:
    """Chooses a template for a decoder: one that ends with the tokenizer's EOS, else with any of its tokens."""
    ends = {name: tokenizer.special_id(get(name).end) for name in CANDIDATES}
    ends = {name: end for name, end in ends.items() if end is not None}
    first = next(iter(ends), None)
    return next((name for name, end in ends.items() if end == tokenizer.eos_id), first)


def template_for_decoder(tokenizer: Tokenizer, where: str) -> str:
    """Chooses a template and reports it on stderr. Raises UserError if no template's end is a token."""
    name = choose_template(tokenizer)
    if name is None:
        raise UserError(f"{where}: no template's end of an answer is a token of this tokenizer; name a template "
                        "(--template, or model.template of a recipe)")
    say(f"template {name}: its end {get(name).end} is a token of {where}")
    return name


def check_length(length: int, context: int, name: str) -> int:
    """Returns `length`, or the model's context if that is shorter, which is then reported on stderr."""
    if length > context:
        say(f"{name} is {length:,}, the model's context {context:,} tokens (max_position_embeddings): a longer "
            "conversation is too_long")
    return min(length, context)


@functools.cache
def say(line: str) -> None:
    """Prints a line on stderr, once in a process."""
    print(line, file=sys.stderr, flush=True)
