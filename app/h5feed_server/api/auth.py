"""Bearer tokens, checked before anything else is."""

from __future__ import annotations

import hmac

from h5feed.errors import Unauthorized
from starlette.types import ASGIApp, Receive, Scope, Send

from .problems import problem

OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no token: those who watch the server have none."""


class BearerAuth:
    """ASGI middleware that lets a request through only with one of `tokens`."""

    def __init__(self, app: ASGIApp, tokens: tuple[str, ...]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        answer = problem(Unauthorized("send one of the server's tokens as 'Authorization: Bearer TOKEN'"))
        await answer(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        return kind.lower() == b"bearer" and any(matches)
