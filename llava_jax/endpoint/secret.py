"""Removal of the API key from everything that a server says."""

import base64
import html
import json
import os
import re
import urllib.parse
from typing import Any

MIN_LENGTH = 8
"""Minimum number of characters of a secret key. Shorter keys ("EMPTY", "none") are words that local servers want."""
PART_LENGTH = 12
"""Number of consecutive characters of a key that are hidden even if other characters are missing."""
HIDDEN = "***"


class Secret:
    """Hides a key: plain, in parts, and as JSON, URLs, HTML, hexadecimal digits or base64 (Basic auth) write it."""

    def __init__(self, key: str | None):
        self.key = key or ""
        self._forms = _forms(self.key) if len(self.key) >= MIN_LENGTH else []
        pieces = {form[at : at + size] for form, size in self._forms for at in range(len(form) - size + 1)}
        self._pieces = sorted({piece.lower() for piece in pieces}, key=lambda piece: (-len(piece), piece))
        self._piece = re.compile("|".join(map(re.escape, self._pieces)), re.IGNORECASE)

    def hide(self, text: str) -> str:
        """Returns the text without the key and its parts."""
        plain = text.lower()
        if not any(piece in plain for piece in self._pieces):  # many times faster than the pattern
            return text
        shown, done = [], 0
        for match in self._piece.finditer(text):
            if match.start() >= done:
                shown += [text[done : match.start()], HIDDEN]
                done = self._end(text, match)
        return "".join([*shown, text[done:]])

    def hide_value(self, value: Any) -> Any:
        """Returns a JSON value without the key in texts and names; the same object if there is nothing to hide."""
        text = json.dumps(value, ensure_ascii=False)
        hidden = self.hide(text)
        return value if hidden == text else json.loads(hidden)

    def hide_body(self, body: bytes) -> bytes:
        """Returns the body of an answer, JSON or not, without the key; the same bytes if there is nothing to hide."""
        if not self._pieces:
            return body
        try:
            value = json.loads(body)
            hidden = self.hide_value(value)
            return body if hidden is value else json.dumps(hidden).encode()
        except (ValueError, RecursionError):
            pass
        text = body.decode("latin-1")  # keeps every byte; a key is ASCII
        hidden = self.hide(text)
        return body if hidden == text else hidden.encode("latin-1")

    def _end(self, text: str, match: re.Match) -> int:
        """Returns the end of the longest part of a form that starts with this piece."""
        end, piece = match.end(), match[0].lower()
        for form, size in self._forms:
            form = form.lower()
            at = form.find(piece) if len(piece) == size else -1
            while at >= 0:
                length = len(piece)
                after = text[match.start() + length :][: len(form)].lower()
                length += len(os.path.commonprefix([after, form[at + length :]]))
                end = max(end, match.start() + length)
                at = form.find(piece, at + 1)
        return end


def _forms(key: str) -> list[tuple[str, int]]:
    """Returns the encodings of the key, with the number of consecutive characters that are hidden."""
    plain = min(PART_LENGTH, len(key))
    raw = key.encode()
    forms = {
        key: plain,
        json.dumps(key)[1:-1]: plain,
        html.escape(key): plain,
        urllib.parse.quote(key, safe=""): plain,
        raw.hex(): 2 * plain,
        "".join(f"%{byte:02x}" for byte in raw): 3 * plain,
        "".join(f"\\u{byte:04x}" for byte in raw): 6 * plain,
        "".join(f"\\x{byte:02x}" for byte in raw): 4 * plain,
        "".join(f"&#{byte};" for byte in raw): 5 * plain,
        "".join(f"&#x{byte:x};" for byte in raw): 6 * plain,
        raw.hex(":"): 3 * plain - 1,
        raw.hex(" "): 3 * plain - 1,
    }
    for before in range(3):  # base64 of the key behind so many other bytes, such as those of "user:"
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            own = encode(b"\0" * before + raw)[-(-before * 8 // 6) :].decode().rstrip("=")
            own = own[: (8 * (len(raw) + before)) // 6 - -(-before * 8 // 6)]  # the last character may hold more
            forms[own] = min(len(own), 4 * plain // 3)
    return list(forms.items())
