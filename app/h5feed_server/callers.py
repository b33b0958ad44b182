"""For whom work is done. What is short – threads, room for bodies, connections – is shared out among callers."""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of whom the request at hand counts for; nothing for the server's own work. See `api.callers`."""
