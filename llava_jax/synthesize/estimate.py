"""Estimates the requests, tokens and cost of a run before anything is spent."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import Message, Response
from llava_jax.synthesize.synthesis import Synthesis, SynthesisTask
from llava_jax.text.tokenizer import Tokenizer

SAMPLE_TASKS = 1000
"""Number of tasks of a kind that are measured. The estimate assumes that other tasks are similar."""
BYTES_PER_TOKEN = 4.3
"""Number of bytes per token of the paper's English prompts with LLaMA's and OpenAI's tokenizers."""
DEFAULT_COMPLETION = 300
"""Number of tokens of an answer if the prompts have no examples and the log has no answers."""
TOKENS_PER_MESSAGE = 4
"""Number of tokens that a chat format adds to a message."""


@dataclasses.dataclass(frozen=True)
class KindEstimate:
    """The estimate for one kind of record.

    Attributes:
      tasks, answered: Number of tasks, and of those with an answer in the log.
      requests: Number of remaining requests, repeated ones included.
      shared, own: Prompt tokens of a request: the part that all requests share, and the image.
      completion: Tokens of an answer.
      measured: Number of the log's answers that `completion` and the size of a token come from. If 0, they come from
        the examples' answers, and from a tokenizer or BYTES_PER_TOKEN.
      rejected: Fraction of the log's answers that were rejected, whose tasks are asked again.
    """

    kind: str
    tasks: int
    answered: int
    requests: int
    shared: float
    own: float
    completion: float
    measured: int
    rejected: float

    @property
    def prompt(self) -> float:
        return self.shared + self.own


class Cost(NamedTuple):
    """USD without caching, with the shared part cached, and by the Batch API without caching."""

    full: float
    cached: float
    batch: float


def estimate(synthesis: Synthesis, log: AnswerLog | dict, tokenizer: Tokenizer | None = None) -> list[KindEstimate]:
    """Returns an estimate for every kind. `log` maps keys to responses; it is {} before the first request."""
    return [_estimate_kind(synthesis, kind, log, tokenizer) for kind in synthesis.settings.kinds]


def cost(kinds: Sequence[KindEstimate], price: Price) -> Cost:
    """Returns the cost of the remaining requests."""
    full = sum(price.of(k.requests * k.prompt, k.requests * k.completion) for k in kinds)
    cached = sum(price.of(k.requests * k.prompt, k.requests * k.completion, k.requests * k.shared) for k in kinds)
    batch = sum(price.of(k.requests * k.prompt, k.requests * k.completion, batch=True) for k in kinds)
    return Cost(full, cached, batch)


def describe(kinds: Sequence[KindEstimate], price: Price | None, attempts: int) -> str:
    """Returns requests, tokens, cost and the source of these figures as text."""
    lines = [f"{'kind':20}{'tasks':>10}{'requests':>10}{'prompt tokens':>16}{'of it shared':>14}{'completion':>12}"]
    for k in kinds:
        figures = (k.tasks, k.requests, round(k.requests * k.prompt), round(k.requests * k.shared),
                   round(k.requests * k.completion))
        widths = (10, 10, 16, 14, 12)
        lines.append(f"{k.kind:20}" + "".join(f"{n:>{width},}" for n, width in zip(figures, widths, strict=True)))
    for k in kinds:
        done = f"; {k.answered:,} of {k.tasks:,} are answered" if k.answered else ""
        source = "by the examples' answers, and no rejects"
        if k.measured:
            source = f"measured on {k.measured:,} answers of the log, {k.rejected:.1%} of them rejected"
        lines.append(f"{k.kind}: {k.shared:,.0f} + {k.own:,.0f} prompt tokens a request, "
                     f"{k.completion:,.0f} completion tokens ({source}){done}")
    lines.append(f"A rejected answer is asked again, {attempts} times in all. A reasoning model's hidden tokens are in "
                 "these figures only once the log has answers: preview -n 5 first.")
    if price is not None:
        usd = cost(kinds, price)
        lines.append(f"cost      {usd.full:,.2f} USD; {usd.cached:,.2f} if the server caches what requests share; "
                     f"{usd.batch:,.2f} by the Batch API")
    return "\n".join(lines)


def _estimate_kind(synthesis: Synthesis, kind: str, log: AnswerLog | dict, tokenizer: Tokenizer | None) -> KindEstimate:
    requests = [task.request(0) for task in itertools.islice(synthesis.drawn(0, (kind,)), SAMPLE_TASKS)]
    *shared, _ = requests[0].messages  # all requests share every message but the last, which is the image
    answered, measured = _answered(synthesis, kind, log)
    rejected = 1 - statistics.fmean(task.verdict(response).accepted for task, response in measured) if measured else 0.0
    counted = [(task.request(0), response) for task, response in measured
               if response.prompt_tokens and not response.estimated]  # some servers count nothing
    size = 1 / BYTES_PER_TOKEN
    if counted:
        size = sum(response.prompt_tokens for _, response in counted) / sum(request.bytes for request, _ in counted)

    def tokens(messages: Sequence[Message]) -> float:
        texts = [message["content"] for message in messages]
        if tokenizer is not None and not counted:
            return sum(len(tokenizer.encode(text)) + TOKENS_PER_MESSAGE for text in texts)
        return sum(len(text.encode()) for text in texts) * size

    if counted:
        completion = statistics.fmean(response.completion_tokens for _, response in counted)
    else:
        examples = [message for message in shared if message["role"] == "assistant"]
        completion = tokens(examples) / len(examples) if examples else DEFAULT_COMPLETION
    # A task is asked once, and once more after every reject, up to `attempts` times.
    times = sum(rejected**attempt for attempt in range(synthesis.attempts))
    tasks = synthesis.count(kind)
    return KindEstimate(
        kind, tasks, answered, round((tasks - answered) * times), tokens(shared),
        statistics.fmean(tokens(request.messages[-1:]) for request in requests), completion, len(counted), rejected,
    )


def _answered(synthesis: Synthesis, kind: str, log: AnswerLog | dict
              ) -> tuple[int, list[tuple[SynthesisTask, Response]]]:
    """Returns the number of tasks with an answer in the log, and up to SAMPLE_TASKS of them with their first answer."""
    count, some = 0, []
    for task in synthesis if len(log) else ():
        if task.kind == kind and (key := task.key(0)) in log:
            count += 1
            if len(some) < SAMPLE_TASKS:
                some.append((task, log[key]))
    return count, some
