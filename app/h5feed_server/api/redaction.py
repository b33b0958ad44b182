"""URLs as they may be logged and repeated: who puts a token into one does not want it there."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "[hidden]"

_PARAMETER = re.compile(
    r"((?:[?&;]|%3f|%26|^)(?:(?:access|auth|api|bearer|h5feed|id|session)[_-]?)?"
    r"(?:token|tokens|auth|authorization|bearer|key|apikey|password|secret)(?:=|%3d))[^&;#]+?(?=[&;#]|%26|$)",
    re.IGNORECASE,
)
"""A parameter named like a secret, also in a URL that is a parameter itself."""

_TOKEN = re.compile(r"h5feed_[0-9a-f]{8}_[\w-]+", re.ASCII)

_LEAST_CHARS = 8
"""Of a token that is looked for wherever it may be; shorter ones are parts of words."""


def without_secrets(url: str, secrets: Sequence[str] = ()) -> str:
    """The path and query of a URL, with tokens and what is named like one hidden.

    Parameters
    ----------
    secrets : sequence of str
        Tokens that are known as such.
    """
    for secret in secrets:
        if len(secret) >= _LEAST_CHARS:
            url = url.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, _PARAMETER.sub(rf"\1{HIDDEN}", url))
