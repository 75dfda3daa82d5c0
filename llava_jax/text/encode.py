"""Turns conversations into tokens and labels, for training and for prompts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from llava_jax.errors import UserError
from llava_jax.text.literal import LiteralText
from llava_jax.text.templates import IMAGE, Span, Template, check_text, get, read_messages, spans
from llava_jax.text.tokenizer import Tokenizer, Tokens

IMAGE_TOKEN_ID = -200
"""Id at the position of every visual token; never looked up in an embedding table."""
IGNORE = -100
"""Label of a token that is not supervised."""


class NoSupervisedTokens(UserError):
    """Raised for a conversation without supervised tokens."""


class TooLong(UserError):
    """Raised for a conversation with more tokens than allowed. It is never cut, because a cut could split an image."""


class PromptTooLong(UserError):
    """Raised for a prompt that leaves no room for an answer in the model's context.

    `tokens` is a lower bound for a text that is longer than any that fits.
    """

    def __init__(self, tokens: int, visual: int, limit: int):
        super().__init__(f"the prompt has {tokens} tokens, {visual} of them for images, and the model's context holds "
                         f"{limit}: no room is left for an answer; shorten the conversation")
        self.tokens, self.limit = tokens, limit


class ImageCount(UserError):
    """Raised if the number of `<image>` marks differs from the number of images."""


class Example(NamedTuple):
    """One conversation. `labels[t]` is `tokens[t]` if that token is supervised (not shifted), else IGNORE."""

    tokens: Int32[np.ndarray, "T"]
    labels: Int32[np.ndarray, "T"]


def encode_conversation(
    turns: Sequence[Mapping[str, Any]],
    template: str | Template,
    tokenizer: Tokenizer,
    visual_tokens: int | Sequence[int] = 576,
    max_length: int | None = None,
) -> Example:
    """Returns tokens and labels of one conversation. Answers and the text that ends them are supervised, nothing else.

    As in LLaVA, a first turn that is not human is dropped, and the text is cut at each `<image>` into pieces that are
    tokenized separately. Labels follow from the offsets of tokens in the text, so they do not depend on how a tokenizer
    merges characters. The formats of the first LLaVA supervise a little more (`Template.signs`), and so do those with
    `Template.supervised_marks`.

    Args:
      turns: [{"from": "human" | "gpt", "value": str}, ...], alternating. In a value with exactly one `<image>` the mark
        is moved to the front, followed by a newline; a value with several keeps their positions. A first turn from
        "system" replaces the template's system text. An answer with "loss": False is not supervised.
      template: a name of `templates.TEMPLATES`, or a template.
      visual_tokens: number of visual tokens of every image, or a sequence with one number for each `<image>`.
      max_length: largest number of tokens allowed.

    Raises NoSupervisedTokens, TooLong, ImageCount, and UserError that names an invalid turn.
    """
    example = _encode(conversation_spans(turns, template), tokenizer, visual_tokens)
    if not (example.labels != IGNORE).any():
        masked = " that is not masked" if any(turn.get("loss") is False for turn in turns) else ""
        raise NoSupervisedTokens(f"nothing to learn: the conversation has no answer with text{masked}")
    if max_length is not None and len(example.tokens) > max_length:
        over = len(example.tokens) - max_length
        raise TooLong(f"{len(example.tokens)} tokens, {over} more than max_length {max_length}")
    marks = _mark_ids(get(template).supervised_marks, tokenizer)
    return example._replace(labels=np.where(np.isin(example.tokens, marks), example.tokens, example.labels))


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    template: str | Template,
    tokenizer: Tokenizer,
    visual_tokens: int | Sequence[int] = 576,
    assistant_prefix: str = "",
    verbatim: bool = False,
    literal: LiteralText | None = None,
) -> Int32[np.ndarray, "T"]:
    """Returns the tokens of a chat that ends with the assistant tag and `assistant_prefix`.

    They are the first tokens of the same conversation in training, unless `literal` has cut a mark in the messages.

    Args:
      messages: see `templates.read_messages`; the last one is the user's.
      visual_tokens: number of visual tokens of every image, or a sequence with one number for each `<image>`.
      assistant_prefix: text right after the template's assistant tag (`ASSISTANT:`); include a leading space if you
        need one.
      verbatim: write the texts as they are, as LLaVA's benchmark scripts do (`templates.spans`).
      literal: what has cut the marks in the messages.

    Raises ImageCount, and UserError that names an invalid message.
    """
    system, turns = read_messages(messages)
    if not turns or turns[-1][0] != "user":
        raise UserError("a prompt ends with a user message, for the assistant to answer")
    if IMAGE in assistant_prefix:
        raise UserError(f"assistant_prefix contains {IMAGE}, but an answer has no images")
    answer = Span(check_text(assistant_prefix, "assistant_prefix"), False, cut=True)
    rendered = [*spans(turns, get(template), system, True, verbatim), answer]
    return _encode(rendered, tokenizer, visual_tokens, literal).tokens


def _mark_ids(marks: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    ids = []
    for mark in marks:
        tokens = tokenizer.tokenize(mark).ids
        if len(tokens) != 1:
            raise UserError(f"the template supervises {mark!r} everywhere, which is {len(tokens)} tokens of this "
                            "tokenizer; name another template")
        ids += tokens
    return ids


def eos_ids_and_texts(template: str | Template, tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """Returns what ends a generated answer: token ids, and a text if the template's end is no token of its own."""
    template = get(template)
    end = tokenizer.special_id(template.end)
    ids = frozenset(token for token in (tokenizer.eos_id, end) if token is not None)
    return ids, () if end is not None else (template.end,)


def _read_turns(turns: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[tuple[str, str]], set[int]]:
    """Returns the system text if there is one, the turns from the first human one on, and the unsupervised of these."""
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


def conversation_spans(turns: Sequence[Mapping[str, Any]], template: str | Template) -> list[Span]:
    """Returns the spans of a training conversation. Raises as `encode_conversation` does for an invalid one."""
    system, read, unsupervised = _read_turns(turns)
    return spans(read, get(template), system, unsupervised=unsupervised)


def tokenize_spans(rendered: Sequence[Span], tokenizer: Tokenizer) -> Tokens:
    """Tokenizes a conversation. An image is one token; a BOS token has the offsets (-1, -1).

    The text is cut at each `<image>`, as in LLaVA, and where an answer starts. So no token reaches from the prompt into
    the answer, and a prompt is a prefix of its training sequence. LLaMA's tokenizers need no cut at answers, because
    none of their tokens reaches across; each cut would add a space.
    """
    text = "".join(span.text for span in rendered)
    starts = np.cumsum([0, *(len(span.text) for span in rendered)]).tolist()
    cuts = [] if tokenizer.adds_prefix_space else [at for at, span in zip(starts, rendered, strict=False) if span.cut]
    ids, offsets = [tokenizer.bos_id] * tokenizer.adds_bos, [(-1, -1)] * tokenizer.adds_bos
    start = 0
    for i, piece in enumerate(text.split(IMAGE)):
        if i:
            ids.append(IMAGE_TOKEN_ID)
            offsets.append((start - len(IMAGE), start))
        end = start + len(piece)
        for first, last in itertools.pairwise([start, *(cut for cut in cuts if start < cut < end), end]):
            tokens = tokenizer.tokenize(text[first:last])
            ids += tokens.ids
            offsets += [(first + a, first + b) for a, b in tokens.offsets]
        start = end + len(IMAGE)
    return Tokens(ids, offsets)


def _encode(rendered: Sequence[Span], tokenizer: Tokenizer, visual_tokens: int | Sequence[int],
            literal: LiteralText | None = None) -> Example:
    ids, offsets = tokenize_spans(rendered, tokenizer)
    if literal is not None:
        ids, offsets = literal.drop_cuts(Tokens(ids, offsets), "".join(span.text for span in rendered))
    tokens = np.array(ids, np.int32)
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    ends = np.cumsum([len(span.text) for span in rendered])
    ranges = [(end - len(span.text), end) for span, end in zip(rendered, ends, strict=True) if span.supervised]
    edges = np.array(ranges, np.int64).ravel()
    # A token that reaches into a supervised span belongs to it.
    supervised = _inside(first, edges) | (_inside(last - 1, edges) & (last > first))
    images = tokens == IMAGE_TOKEN_ID
    labels = np.where(supervised & ~images, tokens, np.int32(IGNORE))
    if not isinstance(visual_tokens, int) and len(visual_tokens) != images.sum():
        raise ImageCount(f"{len(visual_tokens)} images, but {images.sum()} in the turns that are used")
    counts = np.ones(len(tokens), np.int64)
    counts[images] = visual_tokens
    return Example(np.repeat(tokens, counts), np.repeat(labels, counts))


def _inside(positions: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns whether each position is in [edges[0], edges[1]), [edges[2], edges[3]), ...; the edges ascend."""
    return np.searchsorted(edges, positions, side="right") % 2 == 1
