"""Conversations to tokens and labels, for training and for prompts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from llava_jax.errors import UserError
from llava_jax.text.templates import IMAGE, Span, Template, check_text, get, read_messages, spans
from llava_jax.text.tokenizer import Tokenizer, Tokens

IMAGE_TOKEN_ID = -200  # stands at every visual token's place; never looked up in an embedding table
IGNORE = -100  # label of what is not learned


class NoSupervisedTokens(UserError):
    """A conversation from which nothing is learned."""


class TooLong(UserError):
    """A conversation with more tokens than allowed. It is never cut: a cut could fall inside an image."""


class ImageCount(UserError):
    """A conversation whose number of `<image>` marks differs from the number of images."""


class Example(NamedTuple):
    """One conversation. `labels[t]` is `tokens[t]` where that token is to be learned (not shifted), else IGNORE."""

    tokens: Int32[np.ndarray, "T"]
    labels: Int32[np.ndarray, "T"]


def encode_conversation(
    turns: Sequence[Mapping[str, Any]],
    template: str | Template,
    tokenizer: Tokenizer,
    visual_tokens: int | Sequence[int] = 576,
    max_length: int | None = None,
) -> Example:
    """Tokens and labels of one conversation: answers and what ends them are learned, nothing else.

    As LLaVA does: a first turn that is not human is dropped; the text is cut at each `<image>` and the pieces are
    tokenized apart. Labels are told from where a token stands in the text, so no answer is lost to a tokenizer that
    merges differently in another context. The formats of the first LLaVA learn a little more (`Template.signs`).

    Args:
      turns: [{"from": "human" | "gpt", "value": str}, ...], alternating. A value with exactly one `<image>` gets it
        moved to its front, followed by a newline; a value with several keeps each where it stands. A first turn from
        "system" replaces the template's system text. An answer with "loss": False is read and not learned.
      template: a name of `templates.TEMPLATES`, or a template.
      visual_tokens: number of visual tokens of every image, or a sequence with one number for each `<image>`.
      max_length: the most tokens allowed.

    Raises NoSupervisedTokens, TooLong, ImageCount, and UserError that names an invalid turn.
    """
    example = _encode(lay_out(turns, template), tokenizer, visual_tokens)
    if not (example.labels != IGNORE).any():
        left_out = " that is to be learned" if any(turn.get("loss") is False for turn in turns) else ""
        raise NoSupervisedTokens(f"nothing to learn: the conversation has no answer with text{left_out}")
    if max_length is not None and len(example.tokens) > max_length:
        over = len(example.tokens) - max_length
        raise TooLong(f"{len(example.tokens)} tokens, {over} more than max_length {max_length}")
    return example


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    template: str | Template,
    tokenizer: Tokenizer,
    visual_tokens: int | Sequence[int] = 576,
    assistant_prefix: str = "",
    verbatim: bool = False,
) -> Int32[np.ndarray, "T"]:
    """Returns the tokens of a chat that ends with the assistant tag and `assistant_prefix`.

    They are the first tokens of the same conversation in training.

    Args:
      messages: as `templates.read_messages` takes them; the last one is the user's.
      visual_tokens: number of visual tokens of every image, or a sequence with one number for each `<image>`.
      assistant_prefix: text right after the template's assistant tag (`ASSISTANT:`); include a leading space if you
        need one.
      verbatim: write the texts as they are, as LLaVA's benchmark scripts do (`templates.spans`).

    Raises ImageCount, and UserError that names an invalid message.
    """
    system, turns = read_messages(messages)
    if not turns or turns[-1][0] != "user":
        raise UserError("a prompt ends with a user message, for the assistant to answer")
    if IMAGE in assistant_prefix:
        raise UserError(f"assistant_prefix contains {IMAGE}, but an answer has no images")
    answer = Span(check_text(assistant_prefix, "assistant_prefix"), False, cut=True)
    laid_out = [*spans(turns, get(template), system, True, verbatim), answer]
    return _encode(laid_out, tokenizer, visual_tokens).tokens


def answer_ends(template: str | Template, tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """What ends an answer when the model writes one: token ids, and texts where the end is no token of its own."""
    template = get(template)
    end = tokenizer.special_id(template.end)
    ids = frozenset(token for token in (tokenizer.eos_id, end) if token is not None)
    return ids, () if end is not None else (template.end,)


def _read_turns(turns: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[tuple[str, str]], set[int]]:
    """The system text, if there is one; the turns from the first human one on; which of these are not learned."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    read = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise UserError(f'turn {i} is not {{"from": "human" or "gpt", "value": text}}: {turn!r:.200}')
        if turn["from"] not in roles or i and turn["from"] == "system":
            raise UserError(f"turn {i} is from {turn['from']!r}; expected 'human' or 'gpt'")
        read.append((roles[turn["from"]], check_text(turn["value"], f"turn {i}")))
    system = read.pop(0)[1] if read and read[0][0] == "system" else None
    if read and read[0][0] == "assistant":
        read.pop(0)
    if not read:
        raise UserError("the conversation has no human turn" if turns else "the conversation has no turns")
    dropped = len(turns) - len(read)
    for i, (role, _) in enumerate(read):
        if role != ("assistant" if i % 2 else "user"):
            raise UserError(f"turn {i + dropped} is from {turns[i + dropped]['from']!r}, as the turn before it is")
    return system, read, {i for i, turn in enumerate(turns[dropped:]) if turn.get("loss") is False}


def lay_out(turns: Sequence[Mapping[str, Any]], template: str | Template) -> list[Span]:
    """The spans of a conversation in training. Raises as `encode_conversation` does where it is none."""
    system, read, unlearned = _read_turns(turns)
    return spans(read, get(template), system, unlearned=unlearned)


def place_tokens(laid_out: Sequence[Span], tokenizer: Tokenizer) -> Tokens:
    """Tokens of a conversation and their places in its text; of an image one token, of a BOS the place (-1, -1).

    The text is cut at each `<image>`, as in LLaVA, and also where an answer starts: whatever it starts with, no token
    of the opening changes, so that a prompt is the beginning of what is trained on. LLaMA's tokenizers need no such
    cut: none of their tokens reaches across that place, and each cut would cost a blank.
    """
    text = "".join(span.text for span in laid_out)
    starts = np.cumsum([0, *(len(span.text) for span in laid_out)]).tolist()
    cuts = [] if tokenizer.puts_blank else [at for at, span in zip(starts, laid_out, strict=False) if span.cut]
    ids, places = [tokenizer.bos_id] * tokenizer.adds_bos, [(-1, -1)] * tokenizer.adds_bos
    begin = 0
    for i, piece in enumerate(text.split(IMAGE)):
        if i:
            ids.append(IMAGE_TOKEN_ID)
            places.append((begin - len(IMAGE), begin))
        end = begin + len(piece)
        for start, stop in itertools.pairwise([begin, *(cut for cut in cuts if begin < cut < end), end]):
            tokens = tokenizer.tokenize(text[start:stop])
            ids += tokens.ids
            places += [(start + first, start + last) for first, last in tokens.places]
        begin = end + len(IMAGE)
    return Tokens(ids, places)


def _encode(laid_out: Sequence[Span], tokenizer: Tokenizer, visual_tokens: int | Sequence[int]) -> Example:
    ids, places = place_tokens(laid_out, tokenizer)
    tokens = np.array(ids, np.int32)
    first, last = np.array(places, np.int64).reshape(-1, 2).T
    ends = np.cumsum([len(span.text) for span in laid_out])
    stretches = [(end - len(span.text), end) for span, end in zip(laid_out, ends, strict=True) if span.learned]
    edges = np.array(stretches, np.int64).ravel()
    # A token that reaches into what is learned belongs to it.
    learned = _inside(first, edges) | (_inside(last - 1, edges) & (last > first))
    labels = np.where(learned & (tokens != IMAGE_TOKEN_ID), tokens, np.int32(IGNORE))
    images = tokens == IMAGE_TOKEN_ID
    if not isinstance(visual_tokens, int) and len(visual_tokens) != images.sum():
        raise ImageCount(f"{len(visual_tokens)} images, but {images.sum()} in the turns that are used")
    counts = np.ones(len(tokens), np.int64)
    counts[images] = visual_tokens
    return Example(np.repeat(tokens, counts), np.repeat(labels, counts))


def _inside(positions: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Whether each position lies in [edges[0], edges[1]), [edges[2], edges[3]), ...; the edges ascend."""
    return np.searchsorted(edges, positions, side="right") % 2 == 1
