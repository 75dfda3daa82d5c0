"""Defines the limits of what a client may send. Each is an option of the command."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a request, its images and the server's queue."""

    body_bytes: int = 32 * 2**20
    """Maximum number of bytes of a request, counted while they arrive."""
    header_bytes: int = 16 * 2**10
    """Maximum number of bytes of a request's headers."""
    connections: int = 1024
    """Maximum number of open connections."""
    total_body_bytes: int = 2**30
    """Maximum number of bytes of all requests that are being received. A request beyond it gets status 429."""
    receive_seconds: float = 60.0
    """Maximum number of seconds for receiving a request's headers, and again for its body."""
    send_seconds: float = 30.0
    """Maximum number of seconds that a client may not read its answer. Its connection is then closed."""
    messages: int = 256
    """Maximum number of messages of a request."""
    images: int = 8
    """Maximum number of images of a request."""
    image_bytes: int = 20 * 2**20
    """Maximum number of bytes of an image's file."""
    image_pixels: int = 50_000_000
    """Maximum number of pixels of an image."""
    image_side: int = 16_384
    """Maximum number of pixels of an image's longer side."""
    image_aspect: int = 200
    """Maximum ratio of an image's longer side to its shorter side."""
    decode_processes: int = 2
    """Number of processes that decode images."""
    decode_seconds: float = 10.0
    """Maximum number of seconds for decoding an image."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts, exactly as in the URL, that images are fetched from by https. None by default: data URLs only."""
    fetch_seconds: float = 5.0
    """Maximum number of seconds for fetching an image."""
    answer_tokens: int = 1024
    """Maximum number of tokens of an answer if the request has no `max_tokens`."""
    choices: int = 4
    """Maximum `n`."""
    stop_strings: int = 4
    """Maximum number of stop strings."""
    stop_characters: int = 64
    """Maximum number of characters of a stop string."""
    queue: int = 256
    """Maximum number of answers that wait for a slot. A request beyond it gets status 429."""
    queue_bytes: int = 2 * 2**30
    """Maximum number of bytes of decoded images that wait for a slot. A request beyond it gets status 429."""
    request_seconds: float = 600.0
    """Maximum number of seconds from a request's arrival to its last token."""
    drain_seconds: float = 30.0
    """Maximum number of seconds that answers in progress get after SIGTERM."""
