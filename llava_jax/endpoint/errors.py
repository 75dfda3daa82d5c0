"""Exceptions of requests that get no answer."""

from llava_jax.errors import UserError


class RequestFailed(Exception):
    """Raised if a request gets no answer, and the same request would not get one either. Other requests may.

    Attributes:
      reason: "context_length", "content_filter", "bad_request" (the server refuses it), or "no_answer" (every try
        ended in an error of the server or the network; a later run may succeed).
      detail: The server's words on one line.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EndpointStopped(UserError):
    """Raised if no request can succeed until the user fixes something: a key, the quota, the model's name."""


class BudgetExceededError(Exception):
    """Raised if a try brought no answer and the budget has no room for another try."""


class NotSentError(Exception):
    """Raised if the run is cancelled before a request is sent, or sent again."""
