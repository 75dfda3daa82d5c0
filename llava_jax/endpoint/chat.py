"""Client of one chat: streams the answers of a server with OpenAI's chat API. It needs the standard library alone."""

import http.client
import itertools
import json
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.cli import one_line
from llava_jax.endpoint.client import read_key, without_password
from llava_jax.endpoint.limits import retry_after
from llava_jax.endpoint.secret import Secret
from llava_jax.errors import UserError

KEY_VARIABLE = "LLAVA_JAX_API_KEY"
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 600.0
"""Seconds for connecting, and between two pieces of an answer."""
MAX_LINE_BYTES, MAX_REPLY_BYTES = 2**20, 2**16
"""Maximum number of bytes of a streamed line, and of a reply that is no stream."""
MAX_TRIES, MAX_WAIT = 10, 120.0
"""Number of tries while a server is busy, and the longest Retry-After in seconds that is waited for."""


class AnswerLost(UserError):
    """Raised if an answer breaks off. The pieces before have been yielded."""


@dataclass
class StreamedAnswer:
    """A whole answer. The numbers of tokens are the server's, 0 if it sends none."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatClient:
    """One model of a server. `stream` and `generate` are like `Llava`'s, with data URLs as images.

    Args:
      url: address such as http://127.0.0.1:8000, with or without /v1. The key is in LLAVA_JAX_API_KEY.
      model: name of the model on the server; "" is the server's first.

    Raises UserError, one line, if the server does not answer, wants another key, or has no such model.
    """

    def __init__(self, url: str, model: str = ""):
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or not url.isprintable():
                raise ValueError
            self._port = parts.port
        except ValueError:
            raise UserError(f"--server {without_password(url)}: not an address such as http://127.0.0.1:8000") from None
        self.url, self._https, self._host = url, parts.scheme == "https", parts.hostname
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = read_key(KEY_VARIABLE)
        self._secret = Secret(self._key)
        names = self._models()
        if model and names and model not in names:
            raise UserError(f"{url} has no model {model!r}; it has {', '.join(names[:10])}")
        if not model and not names:
            raise UserError(f"{url} names no model; name one by --model")
        self.model = model or names[0]

    def generate(self, messages: Sequence[Mapping[str, Any]], images: Sequence[str] = (), **settings) -> StreamedAnswer:
        """Returns the answer to the last message. Raises as `stream` does."""
        answer = StreamedAnswer()
        for _ in self.stream(messages, images, answer=answer, **settings):
            pass
        return answer

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[str] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        answer: StreamedAnswer | None = None,
    ) -> Iterator[str]:
        """Yields the text in pieces, as it is written, and fills in `answer`.

        Closing the iterator closes the connection, which ends the answer on the server too. If the server is busy (429)
        it is asked again after the time that it names.

        Args:
          messages: contents are lists of {"type": "text", "text": str} and {"type": "image"}.
          images: data URLs, one for each {"type": "image"}, in order.

        Raises UserError, one line, if the server refuses the request, and AnswerLost if an answer breaks off.
        """
        answer = StreamedAnswer() if answer is None else answer
        remaining = iter(images)
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "seed": seed, "stream": True, "stream_options": {"include_usage": True},
                "messages": [{**message, "content": _content(message["content"], remaining)} for message in messages]}
        if stop:
            body["stop"] = list(stop)
        connection, response = self._request("POST", "/chat/completions", json.dumps(body).encode())
        try:
            for event in self._events(response):
                for choice in event.get("choices") or ():
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    if piece := choice["delta"].get("content"):
                        answer.text += piece
                        yield piece
                if usage := event.get("usage"):
                    answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLost(f"{self.url}: the connection broke off ({_words(error)})") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise AnswerLost(f"{self.url}: the server sent what is no chat completion") from None
        finally:
            response.close()
            connection.close()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        while line := response.readline(MAX_LINE_BYTES):
            field, _, value = line.decode().strip().partition(":")
            if field != "data":
                continue
            if value.strip() == "[DONE]":
                return
            event = json.loads(value)
            if "error" in event:
                raise AnswerLost(f"{self.url}: the answer broke off: {self._message(value)}")
            yield event
        raise AnswerLost(f"{self.url}: the connection was closed in the middle of the answer")

    def _models(self) -> list[str]:
        connection, response = self._request("GET", "/models")
        try:
            return [str(model["id"]) for model in json.loads(response.read(MAX_REPLY_BYTES))["data"]]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            raise UserError(f"{self.url}: {self._path}/models is no list of models, as in OpenAI's API") from None
        finally:
            connection.close()

    def _request(self, method: str, path: str, body: bytes | None = None):
        """Returns a connection and its response of status 200; waits while the server is busy."""
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for tries in itertools.count(1):
            make = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
            connection = make(self._host, self._port, timeout=CONNECT_TIMEOUT)
            try:
                connection.connect()
                connection.sock.settimeout(READ_TIMEOUT)
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
                if response.status == 200:
                    return connection, response
                reply = response.read(MAX_REPLY_BYTES).decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise UserError(f"{self.url} does not answer ({_words(error)}); is the server running?") from None
            except BaseException:
                connection.close()
                raise
            connection.close()
            wait = retry_after({name.lower(): value for name, value in response.getheaders()}, time.time())
            if response.status not in (429, 503) or wait is None or wait > MAX_WAIT or tries == MAX_TRIES:
                raise UserError(self._refusal(response.status, reply))
            state = "busy" if response.status == 429 else "not ready"
            print(f"note: the server is {state}; asking again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)

    def _refusal(self, status: int, reply: str) -> str:
        if status == 401:
            return f"{self.url} {'refuses the key in' if self._key else 'wants an API key; set'} {KEY_VARIABLE}"
        return f"{self.url} answers {status}: {self._message(reply)}"

    def _message(self, reply: str) -> str:
        """Returns the message of an error in OpenAI's form, or the start of another reply; never the key."""
        try:
            reply = str(json.loads(reply)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            pass
        return one_line(self._secret.hide(reply))[:500] or "no reason given"


def _content(content: Sequence[Mapping[str, str]], images: Iterator[str]) -> str | list[dict[str, Any]]:
    if [part["type"] for part in content] == ["text"]:
        return content[0]["text"]  # not every server reads parts of an assistant
    return [{"type": "image_url", "image_url": {"url": next(images)}} if part["type"] == "image" else dict(part)
            for part in content]


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
