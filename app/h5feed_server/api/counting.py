"""Counts requests for what is no batch; batches count themselves, where their bytes are known."""

from __future__ import annotations

import time

from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import WATCHED_PATHS

_API, _BATCHES = "/v1/", "/batches"


class Counting:
    """ASGI middleware behind `BatchShortcut`, which answers most requests for batches."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in WATCHED_PATHS:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        except BaseException:
            status = 500
            raise
        finally:
            # Nothing is said of what a thread writes itself: batches.
            if (status or 200) >= 400 or not scope["path"].startswith(_API) or _BATCHES not in scope["path"]:
                seconds = time.perf_counter() - began
                self._state.services.traffic.note_request(status or 200, seconds, scope["path"])
