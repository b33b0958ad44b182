"""Texts as they may be logged and repeated: who puts a token into a URL does not want it there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_plus

_HIDDEN = "[hidden]"

_PARAMETER = re.compile(
    r"((?:[?&;]|%3f|%26|^)(?:(?:access|auth|api|bearer|h5feed|id|session)[_-]?)?"
    r"(?:token|tokens|auth|authorization|bearer|key|apikey|password|secret)(?:=|%3d))[^&;#]+?(?=[&;#]|%26|$)",
    re.IGNORECASE,
)
"""A parameter named like a secret, also in a URL that is a parameter itself."""

_TOKEN = re.compile(r"h5feed_[0-9a-f]{8}_[\w-]+", re.ASCII)

_LEAST_CHARS = 8
"""Of a token that is looked for wherever it may be; shorter ones are parts of words."""

_ESCAPED = {"&": "&amp;|&#38;", "<": "&lt;", ">": "&gt;", '"': "&#34;|&quot;", "'": "&#39;|&#x27;"}
"""What some characters are in a page."""

_known: re.Pattern[str] | None = None
_tokens: frozenset[str] = frozenset()

_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|signature|^(key|auth|sig)$|api[-_]?key|session|^code$", re.I
)
"""Names of query parameters whose values are not shown. No endpoint has one; people try them nevertheless."""


def keep_secret(tokens: Iterable[str]) -> None:
    """Have `without_tokens` hide these, too, for as long as this process lives."""
    global _known, _tokens
    _tokens |= {token for token in tokens if len(token) >= _LEAST_CHARS}
    _known = re.compile("|".join(map(_however_written, sorted(_tokens)))) if _tokens else None


def without_tokens(text: str) -> str:
    """A text in which the tokens of this server, and all that look like tokens of a file, are hidden."""
    if _known is not None:
        text = _known.sub(_HIDDEN, text)
    return _TOKEN.sub(_HIDDEN, text) if "h5feed_" in text else text


def _however_written(token: str) -> str:
    """A pattern for a token as it is, and with any of its characters as in a URL, in a string or in a page."""
    return "".join(
        rf"(?:\\?{re.escape(char)}|%(?:25)*(?i:{ord(char):02x}){'|' + _ESCAPED[char] if char in _ESCAPED else ''})"
        for char in token
    )


def without_secrets(url: str, secrets: Sequence[str] = ()) -> str:
    """The path and query of a URL, with tokens and what is named like one hidden.

    Parameters
    ----------
    secrets : sequence of str
        Tokens that are known as such.
    """
    for secret in secrets:
        if len(secret) >= _LEAST_CHARS:
            url = url.replace(secret, _HIDDEN)
    return without_tokens(_PARAMETER.sub(rf"\1{_HIDDEN}", url))


def without_named_secrets(query: bytes) -> bytes:
    """A query without the values of parameters whose names sound like secrets."""
    items = query.split(b"&")
    for number, item in enumerate(items):
        name, equals, _ = item.partition(b"=")
        if equals and _NAME.search(unquote_plus(name.decode("latin-1"))):
            items[number] = name + b"=" + _HIDDEN.encode()
    return b"&".join(items)
