"""Checks that a template, a tokenizer and a model suit each other: each may be right alone and wrong with the others.

Nothing fails by itself where they do not: JAX looks an id beyond the embedding up as another one, and an end of an
answer that is no token is learned as a few letters.
"""

import functools
import re
import sys

from llava_jax.errors import UserError
from llava_jax.text.templates import IMAGE, Template, get
from llava_jax.text.tokenizer import Tokenizer

CANDIDATES = ("vicuna_v1", "llava_llama_3", "qwen_1_5", "gemma_instruct")
"""Templates of different families, in the order in which a tokenizer is searched for their ends of an answer."""


def check(template: str | Template, tokenizer: Tokenizer, vocab_size: int, where: str, trained: bool = False,
          visual_tokens: int = 0, context: int | None = None) -> None:
    """Raises UserError, one line that begins with `where`, if the three do not suit each other.

    Args:
      vocab_size: rows of the model's embedding.
      trained: whether the model has learned this template already. An end that is no token is then told on stderr
        only: such a model answers well here, where its text is looked for.
      visual_tokens, context: tokens of an image, and of the longest conversation that the model takes.
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
    """Tokens whose ids have no row. `<image>` and a padding token need none: they are never looked up."""
    spared = () if tokenizer.pad_id in (tokenizer.bos_id, tokenizer.eos_id) else (tokenizer.pad_id,)
    return [(text, i) for text, i in tokenizer.tokens_from(vocab_size) if text != IMAGE and i not in spared]


def end_problem(template: str | Template, tokenizer: Tokenizer) -> str:
    """What is wrong if a template ends answers with a mark that is no token of the tokenizer; "" if nothing is."""
    template = get(template)
    if not re.fullmatch(r"<\S+>", template.end) or tokenizer.special_id(template.end) is not None:
        return ""
    better = choose_template(tokenizer)
    hint = f"; template {better} ends with one" if better else ""
    return f"template {template.name} ends answers with {template.end}, which is no token of the tokenizer{hint}"


def choose_template(tokenizer: Tokenizer) -> str | None:
    """The template for a decoder with this tokenizer: one that ends with its EOS, or else with any of its tokens."""
    known = {name: tokenizer.special_id(get(name).end) for name in CANDIDATES}
    known = {name: end for name, end in known.items() if end is not None}
    return next((name for name, end in known.items() if end == tokenizer.eos_id), next(iter(known), None))


def template_for_decoder(tokenizer: Tokenizer, where: str) -> str:
    """`choose_template`, which is told on stderr. Raises UserError if no template's end is a token."""
    name = choose_template(tokenizer)
    if name is None:
        raise UserError(f"{where}: no template's end of an answer is a token of this tokenizer; name a template "
                        "(--template, or model.template of a recipe)")
    say(f"template {name}: its end {get(name).end} is a token of {where}")
    return name


def check_length(asked: int, context: int, name: str) -> int:
    """The most tokens of a conversation: `asked`, or the model's context if that is shorter, which is then told."""
    if asked > context:
        say(f"{name} is {asked:,}, the model's context {context:,} tokens (max_position_embeddings): a longer "
            "conversation is too_long")
    return min(asked, context)


@functools.cache
def say(line: str) -> None:
    """Prints a line on stderr, once in a process."""
    print(line, file=sys.stderr, flush=True)
