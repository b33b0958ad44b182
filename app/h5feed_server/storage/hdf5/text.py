"""Names and reasons that libhdf5 gives, as text that can be shown and sent."""

from __future__ import annotations

import json
import re
from typing import Any

from ..local_file import AWAY_ERRNOS

MAX_REASON = 300
"""Characters of a reason."""

_H5PY_TEXT = re.compile(r"(?:Unable to|Can't) .*? \((.*)\)", re.S)
"""What h5py puts around libhdf5's own words."""

_ERRNO = re.compile(r"errno = (\d+)")
"""How libhdf5 tells what the operating system has answered."""


def says_away(text: str) -> bool:
    """Whether it is by these words that the disk or the network is at fault, which may pass, and not the file."""
    return any(int(number) in AWAY_ERRNOS for number in _ERRNO.findall(text))


def decoded(name: str | bytes) -> str:
    """A name as Unicode that can be encoded; h5py gives bytes or lone surrogates where the file has no UTF-8."""
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")


def reason_of(error: Exception, path: str) -> str:
    """The reason that an exception gives, without the path of the file, which is the server's own business."""
    # str() of a KeyError is a literal.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
    text = text.replace(path, "the file").encode("utf-8", "replace").decode()
    if match := _H5PY_TEXT.fullmatch(text):
        text = match[1]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_REASON]


def json_bytes(value: Any) -> int:
    """Bytes that a value takes as JSON."""
    return len(json.dumps(value))
