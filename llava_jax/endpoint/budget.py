"""How much may be spent, so that the limit holds before a request goes and not after."""

from collections import Counter
from typing import Literal

from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import ChatRequest, Response
from llava_jax.errors import UserError

FIRST_COMPLETION = 4096  # tokens that an answer without a limit may have, as far as is known before the first
TOKENS_PER_BYTE = 0.5  # of a prompt, likewise; more than tokenizers make of running text


class Budget:
    """What may be spent, and what was.

    A request starts only if there is room for the worst that it and those in flight can cost: as many prompt tokens
    per byte as any request so far had, and max_completion_tokens, or the longest answer so far if that is longer.
    Before the first answer, which tells both, one request goes alone (but not in batches).

    What came counts: tokens as the server counts them, or as `Response` estimates them where it does not. A try that
    brought no answer counts as its worst, or as what came if that is more, unless the server refused it or was not
    reached. The bill is so at most `max_cost`, and what the requests in flight when the last was sent cost beyond
    their worst: more prompt tokens per byte than any before, or more than max_completion_tokens. Not seen are tokens
    that a server neither sends nor counts, and requests in flight at a kill.

    Args:
      max_cost: USD; needs a price.
      max_requests: requests started.
      price: of the model.
      batch: whether the Batch API's price holds.
      cost: USD spent before on answers, by an earlier run, which count.
      lost: USD that earlier runs' tries without an answer may have cost, likewise.

    Attributes:
      cost, lost, requests: so far; `requests` are those that this run started.
      reserved: USD that what is in flight can cost at most.
      seen: whether an answer has told what the next may cost.
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
        self.max_cost, self.max_requests, self.price, self.cost, self.requests = max_cost, max_requests, price, cost, 0
        self.lost, self._batch, self.reserved = lost, batch, 0.0
        self._per_byte, self._longest, self._beyond = TOKENS_PER_BYTE, FIRST_COMPLETION, 0
        self.seen = False

    def worst(self, request: ChatRequest) -> float:
        """USD that a request can cost at most."""
        if self.price is None:
            return 0.0
        completion = self._longest if request.longest is None else max(request.longest, self._beyond)
        return self.price.of(request.bytes * self._per_byte, completion, batch=self._batch)

    def reserve(self, cost: float) -> Literal["max_cost", "max_requests"] | None:
        """Takes room for a request of that worst cost, or says which limit leaves none."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "max_requests"
        if self._spent + cost > self._most:
            return "max_cost"
        self.requests += 1
        self.reserved += cost
        return None

    def release(self, cost: float, sent: bool = True) -> None:
        """Gives that room back, when the request has ended, or was not even sent."""
        self.reserved -= cost
        self.requests -= not sent

    def lose(self, request: ChatRequest, came: int = 0) -> bool:
        """Counts a try that was sent and brought no answer, but so many bytes; says whether another has room."""
        if self.price is None:
            return True
        # A token is a byte at least.
        self.lost += max(self.worst(request), self.price.of(request.bytes * self._per_byte, came, batch=self._batch))
        return self._spent <= self._most

    def add(self, reply: Response) -> None:
        """Counts an answer that was paid now."""
        if self.price is not None:
            self.cost += self.price.cost(reply)

    def learn(self, request: ChatRequest, reply: Response) -> None:
        """Lets an answer, whenever it was paid, say what the next may cost."""
        per_byte = reply.prompt_tokens / max(1, request.bytes)
        self._per_byte = max(self._per_byte, per_byte) if self.seen else per_byte
        self._longest = max(self._longest, reply.completion_tokens) if self.seen else reply.completion_tokens
        self._beyond = max(self._beyond, reply.completion_tokens)
        self.seen = True

    def summary(self, rejects: Counter[str] | None = None) -> str:
        """Returns the cost so far, if there is a price, and the number of rejected answers by reason."""
        cost = [f"${self.cost + self.lost:.2f}"] if self.price is not None else []
        return ", ".join(cost + [f"{count} {reason}" for reason, count in (rejects or Counter()).most_common()])

    @property
    def _spent(self) -> float:
        return self.cost + self.lost + self.reserved

    @property
    def _most(self) -> float:
        return float("inf") if self.max_cost is None else self.max_cost
