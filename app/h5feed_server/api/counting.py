"""Counts requests for what is no batch; batches count themselves, where their bytes are known."""

from __future__ import annotations

import time

from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..services import Services
from ..sharing.metrics import OTHER
from .auth import WATCHED_PATHS

PHASES = "h5feed.phases"
"""Key in the scope's extensions: when a request for batches came, by ``time.perf_counter``, and the seconds of each of
`sharing.metrics.PHASES`. Requests that have it have counted themselves."""


class Counting:
    """ASGI middleware behind `BatchShortcut`, which answers most requests for batches."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        extensions = scope.setdefault("extensions", {})
        status: int | None = None
        nbytes = 0

        async def noting(message: Message) -> None:
            nonlocal status, nbytes
            status = message.get("status", status)
            nbytes += len(message.get("body", b""))
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        except BaseException:
            status = 500
            raise
        finally:
            if PHASES not in extensions:
                endpoint = endpoint_of(self._state.services, scope)
                note(self._state.services, endpoint, scope, status or 200, time.perf_counter() - began, nbytes)


def note(services: Services, endpoint: int, scope: Scope, status: int, seconds: float, nbytes: int) -> None:
    """Count a response that is not a body with batches."""
    services.metrics.note_request(endpoint, status, seconds, nbytes)
    # Those who look every few seconds would be the most frequent callers of many servers.
    if scope["path"] not in WATCHED_PATHS:
        services.traffic.note_request(status, seconds, scope["path"])


def endpoint_of(services: Services, scope: Scope) -> int:
    """Number of the endpoint that has answered."""
    catalogue = services.metrics.catalogue
    template = getattr(scope.get("route"), "path_format", OTHER)
    known = catalogue.endpoints.get((scope["method"], template))
    return catalogue.endpoints[OTHER, OTHER] if known is None else known
