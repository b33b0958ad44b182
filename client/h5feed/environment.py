"""Environment variables."""

from __future__ import annotations

import os

from .errors import BadParameter

_VALUES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def is_set(name: str, default: bool) -> bool:
    """Whether a variable is true; `default` if it is not set, or empty.

    Raises
    ------
    BadParameter
        It is neither true nor false.
    """
    text = os.environ.get(name, "").strip().lower()
    if text and text not in _VALUES:
        raise BadParameter(f"{name}={text!r} must be 1 or 0")
    return _VALUES.get(text, default)
