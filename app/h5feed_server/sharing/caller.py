"""The caller that work is done for. Scarce resources (threads, body memory, connections) are shared among callers."""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of whom the request at hand counts for; nothing for the server's own work. See `api.identity`."""

KEEPS_UP: ContextVar[bool] = ContextVar("keeps_up", default=False)
"""Whether the request comes through a connection whose peer has taken an answer before, all of it.

Of one caller's requests these come first: who takes next to nothing is cut off, and has a new connection each time.
"""
