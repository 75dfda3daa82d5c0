"""Limits the cost of a run before a request is sent, not after."""

from collections import Counter
from typing import Literal

from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.errors import UserError

FIRST_COMPLETION = 4096
"""Number of tokens that an answer without a limit is assumed to have, before the first answer."""
TOKENS_PER_BYTE = 0.5
"""Number of prompt tokens per byte before the first answer. Tokenizers make fewer of running text."""


class Budget:
    """Counts what requests cost, and reserves their worst cost before they are sent.

    The worst cost assumes as many prompt tokens per byte as in any request so far, and max_completion_tokens, or the
    longest answer so far if that is longer. Before the first answer, only one request may be sent (except in batches).

    Answers cost what the server counts, or what `Response` estimates if the server does not count. A try without an
    answer costs its worst, or what was received if that is more, unless the server refused it or was not reached. The
    bill exceeds `max_cost` only by what requests in flight cost beyond their worst. Not counted are tokens that a
    server neither sends nor counts, and requests in flight when the process is killed.

    Args:
      max_cost: USD; needs a price.
      max_requests: Number of requests that this run may send.
      price: Price of the model.
      batch: Whether the Batch API's price applies.
      cost: USD that earlier runs have spent on answers.
      lost: USD that tries without an answer may have cost in earlier runs.

    Attributes:
      cost, lost, requests: The sums so far; `requests` counts those of this run.
      reserved: USD that requests in flight can cost.
      seen: Whether an answer has shown the tokens per byte and per answer.
    """

    def __init__(
        self,
        max_cost: float | None = None,
        max_requests: int | None = None,
        price: Price | None = None,
        batch: bool = False,
        cost: float = 0.0,
        lost: float = 0.0,
    ):
        if max_cost is not None and price is None:
            raise UserError("a limit of cost needs prices: --prices FILE")
        self.max_cost, self.max_requests, self.price, self.cost, self.lost = max_cost, max_requests, price, cost, lost
        self.requests, self.reserved, self.seen = 0, 0.0, False
        self._batch, self._tokens_per_byte, self._longest = batch, TOKENS_PER_BYTE, 0

    def worst_cost(self, request: ChatRequest) -> float:
        """Returns the USD that a request can cost."""
        if request.max_tokens is not None:
            return self._cost(request, max(request.max_tokens, self._longest))
        return self._cost(request, self._longest if self.seen else FIRST_COMPLETION)

    def reserve(self, cost: float) -> Literal["max_cost", "max_requests"] | None:
        """Reserves the worst cost of a request. Returns the limit that forbids it, or None."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "max_requests"
        if not self._has_room(cost):
            return "max_cost"
        self.requests += 1
        self.reserved += cost
        return None

    def release(self, cost: float, sent: bool = True) -> None:
        """Releases a reservation when the request has ended, or was not sent."""
        self.reserved -= cost
        self.requests -= not sent

    def add_lost(self, request: ChatRequest, received_bytes: int = 0) -> bool:
        """Counts a try that was sent and brought no answer. Returns whether another try has room."""
        # A token has at least one byte.
        self.lost += max(self.worst_cost(request), self._cost(request, received_bytes))
        return self._has_room()

    def add(self, response: Response) -> None:
        """Counts the cost of a new answer."""
        if self.price is not None:
            self.cost += self.price.cost(response)

    def learn(self, request: ChatRequest, response: Response) -> None:
        """Updates the worst cost of later requests by an answer, new or from the log."""
        per_byte = response.prompt_tokens / max(1, request.bytes)
        self._tokens_per_byte = max(self._tokens_per_byte, per_byte) if self.seen else per_byte
        self._longest = max(self._longest, response.completion_tokens)
        self.seen = True

    def summary(self, rejects: Counter[str] | None = None) -> str:
        """Returns the cost so far, if there is a price, and the number of rejected answers by reason."""
        cost = [f"${self.cost + self.lost:.2f}"] if self.price is not None else []
        return ", ".join(cost + [f"{count} {reason}" for reason, count in (rejects or Counter()).most_common()])

    def _cost(self, request: ChatRequest, completion: float) -> float:
        if self.price is None:
            return 0.0
        return self.price.of(request.bytes * self._tokens_per_byte, completion, batch=self._batch)

    def _has_room(self, cost: float = 0.0) -> bool:
        return self.max_cost is None or self.cost + self.lost + self.reserved + cost <= self.max_cost
