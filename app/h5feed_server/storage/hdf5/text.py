"""Names and error messages from libhdf5 as valid Unicode that can be shown to clients."""

from __future__ import annotations

import json
import re
from typing import Any

from h5feed.stored.local_file import AWAY_ERRNOS

MAX_REASON = 300
"""Maximum number of characters of a reason."""

_H5PY_TEXT = re.compile(r"(?:Unable to|Can't) .*? \((.*)\)", re.S)
"""h5py's wrapper around libhdf5's own message."""

_ERRNO = re.compile(r"errno = (\d+)")
"""How libhdf5 reports an error of the operating system."""


def says_away(text: str) -> bool:
    """Whether an error message shows that the disk or network is unavailable, rather than the file damaged."""
    return any(int(number) in AWAY_ERRNOS for number in _ERRNO.findall(text))


def decoded(name: str | bytes) -> str:
    """A name as valid Unicode. For names that are not UTF-8, h5py gives bytes or lone surrogates."""
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")


def reason_of(error: Exception, path: str) -> str:
    """The message of an exception, at most `MAX_REASON` characters, without `path`, which clients must not see."""
    # str() of a KeyError adds quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
    text = text.replace(path, "the file").encode("utf-8", "replace").decode()
    if match := _H5PY_TEXT.fullmatch(text):
        text = match[1]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_REASON]


def json_bytes(value: Any) -> int:
    """Size of a value as JSON."""
    return len(json.dumps(value))
