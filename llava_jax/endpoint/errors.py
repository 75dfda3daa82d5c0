"""How asking can end without an answer."""

from llava_jax.errors import UserError


class RequestFailed(Exception):
    """This request got no answer, and asking again in the same way would not bring one. Others may go on.

    Attributes:
      reason: "context_length", "content_filter", "bad_request" (the server refuses it), or "no_answer" (every try
        ended in an error of the server's or the network's; a later run may have more luck).
      detail: one line, the server's words.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EndpointStopped(UserError):
    """No further request has a chance until the user mends something: a key, the quota, the model's name."""


class BudgetExceededError(Exception):
    """A try brought no answer, and the budget has no room for another."""


class NotSentError(Exception):
    """The run was asked to stop before this request was sent, or sent again."""
