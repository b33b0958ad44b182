"""Request ids: sent as ``X-Request-ID``, and part of every log line about a request."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from itertools import count

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the current request; empty for the server's own work."""

HEADER = b"x-request-id"

_VALID = re.compile(rb"[\w.~+/=:@-]{1,128}", re.ASCII)


_prefix, _numbers = os.urandom(4).hex(), count()


def new_request_id() -> str:
    """A new id that is unique on this server."""
    return f"{_prefix}{next(_numbers):08x}"


def valid_id(value: bytes) -> str | None:
    """The id from a proxy; None if it contains characters that would be ambiguous in a log."""
    return value.decode("ascii") if _VALID.fullmatch(value) else None


def _begin() -> None:
    global _prefix, _numbers
    _prefix, _numbers = os.urandom(4).hex(), count()


# Workers are forked, so each needs a new prefix.
os.register_at_fork(after_in_child=_begin)
