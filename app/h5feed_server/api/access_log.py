"""Logs requests, if enabled."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .peer import peer_of
from .redaction import without_secrets

logger = logging.getLogger("h5feed.access")


class AccessLog:
    """Outermost ASGI middleware; writes one line per request to standard output.

    Each line has the client's address, the request, the status (``-`` if none was sent), ``gone`` if the client
    disconnected early, and the duration in milliseconds.

    Parameters
    ----------
    secrets : sequence of str
        What no line may have.
    """

    def __init__(self, app: ASGIApp, address: Callable[[Scope], str], secrets: Sequence[str] = ()) -> None:
        self._app = app
        self._secrets = secrets
        self._address = address
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = None

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        finally:
            peer = peer_of(scope)
            if status is None and peer is not None and peer.has_begun():
                # A thread wrote the answer itself; only whole batches are.
                status = 200
            query = b"?" + scope["query_string"] if scope["query_string"] else b""
            # A URL may hold any byte: none may look like another line.
            url = (scope["raw_path"] + query).decode("latin-1").encode("unicode_escape").decode("ascii")
            # A token does not belong into a URL, but some put it there.
            url = without_secrets(url, self._secrets)
            logger.info(
                '%s "%s %s" %s%s %.1f ms',
                self._address(scope),
                scope["method"],
                url,
                status or "-",
                " gone" if peer is not None and not peer.has_all() else "",
                (time.perf_counter() - began) * 1e3,
            )
