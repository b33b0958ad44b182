"""URLs as they may be logged and repeated: who puts a token into one does not want it there."""

from __future__ import annotations

import re
from collections.abc import Sequence
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

_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|signature|^(key|auth|sig)$|api[-_]?key|session|^code$", re.I
)
"""Names of query parameters whose values are not shown. No endpoint has one; people try them nevertheless."""


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
    return _TOKEN.sub(_HIDDEN, _PARAMETER.sub(rf"\1{_HIDDEN}", url))


def without_named_secrets(query: bytes) -> bytes:
    """A query without the values of parameters whose names sound like secrets."""
    items = query.split(b"&")
    for number, item in enumerate(items):
        name, equals, _ = item.partition(b"=")
        if equals and _NAME.search(unquote_plus(name.decode("latin-1"))):
            items[number] = name + b"=" + _HIDDEN.encode()
    return b"&".join(items)
