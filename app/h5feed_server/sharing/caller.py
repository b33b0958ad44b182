"""The caller for whom work is done. Scarce resources (threads, body memory, connections) are shared among callers."""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of the caller of the current request; empty for the server's own work. See `api.identity`."""

KEEPS_UP: ContextVar[bool] = ContextVar("keeps_up", default=False)
"""Whether the current request's connection has already taken a whole response.

Among the requests of one caller, these come first. Peers that take almost nothing are disconnected, so their requests
always come through new connections, and have to wait.
"""
