"""How much may be spent, so that the limit holds before a request goes and not after."""

from typing import Literal

from llava_jax.endpoint.errors import EndpointStopped
from llava_jax.endpoint.prices import Price
from llava_jax.endpoint.request import Reply, Request
from llava_jax.errors import UserError

FIRST_COMPLETION = 4096  # tokens that an answer without a limit may have, as far as is known before the first
TOKENS_PER_BYTE = 0.5  # of a prompt, likewise; more than tokenizers make of running text


class Budget:
    """What may be spent, and what was.

    A request starts only if there is room for the worst that it and those in flight can cost: as many prompt tokens
    per byte as any request so far had, and max_completion_tokens or else the longest answer so far. Tries that end
    without an answer are not seen here, though a server may bill some.

    Args:
      max_cost: USD; needs a price.
      max_requests: requests started.
      price: of the model.
      batch: whether the Batch API's price holds.
      cost: USD spent before, by an earlier run, which count.

    Attributes:
      cost, requests: so far; `requests` are those that this run started.
      reserved: USD that what is in flight can cost at most.
    """

    def __init__(
        self,
        max_cost: float | None = None,
        max_requests: int | None = None,
        price: Price | None = None,
        batch: bool = False,
        cost: float = 0.0,
    ):
        if max_cost is not None and price is None:
            raise UserError("a limit of cost needs prices: --prices FILE")
        self.max_cost, self.max_requests, self.price, self.cost, self.requests = max_cost, max_requests, price, cost, 0
        self._batch, self.reserved = batch, 0.0
        self._per_byte, self._longest = TOKENS_PER_BYTE, FIRST_COMPLETION
        self._seen = False

    def worst(self, request: Request) -> float:
        """USD that a request can cost at most."""
        if self.price is None:
            return 0.0
        completion = self._longest if request.longest is None else request.longest
        return self.price.of(request.bytes * self._per_byte, completion, batch=self._batch)

    def reserve(self, cost: float) -> Literal["max_cost", "max_requests"] | None:
        """Takes room for a request of that worst cost, or says which limit leaves none."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return "max_requests"
        if self.max_cost is not None and self.cost + self.reserved + cost > self.max_cost:
            return "max_cost"
        self.requests += 1
        self.reserved += cost
        return None

    def release(self, cost: float, sent: bool = True) -> None:
        """Gives that room back, when the request has ended, or was not even sent."""
        self.reserved -= cost
        self.requests -= not sent

    def add(self, reply: Reply) -> None:
        """Counts an answer that was paid now. Raises EndpointStopped if its cost cannot be told, but is limited."""
        if self.price is not None:
            self.cost += self.price.cost(reply)
        if self.max_cost is not None and not reply.prompt_tokens:
            raise EndpointStopped("the server does not say how many tokens an answer took, so that no limit of cost "
                                  "can be kept; take --max-requests instead of --max-cost")

    def learn(self, request: Request, reply: Reply) -> None:
        """Lets an answer, whenever it was paid, say what the next may cost."""
        per_byte = reply.prompt_tokens / max(1, request.bytes)
        self._per_byte = max(self._per_byte, per_byte) if self._seen else per_byte
        self._longest = max(self._longest, reply.completion_tokens) if self._seen else reply.completion_tokens
        self._seen = True
