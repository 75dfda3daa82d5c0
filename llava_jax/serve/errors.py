"""Defines the errors that a client is told, in OpenAI's form."""


class ApiError(Exception):
    """Raised for a request that is not answered. A client gets its text, so it has no path, address or exception.

    Args:
      status: HTTP status.
      message: one sentence for the client.
      param: the field that is wrong, such as `messages[1].content[0].image_url.url`.
      code: OpenAI's code, such as `context_length_exceeded`.
      retry_after: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict:
        """Returns the JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
