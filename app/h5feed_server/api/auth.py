"""Bearer token authentication; runs before everything else.

The OpenAPI page is served without a token, because that is where users enter it. Without one it does not reveal what
is served. The client can be installed without one, before there is anything to send it with.
"""

from __future__ import annotations

import hmac

from h5feed.errors import Unauthorized
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .problems import problem

WATCHED_PATHS = frozenset({"/healthz", "/readyz"})
"""Those who watch the server have no token."""

CLIENT_FOLDER = "/simple/"
"""The package index with the client: pip has no token, and may know the server by any name."""

_OPEN_PATHS = WATCHED_PATHS | {"/", "/docs", "/redoc", "/openapi.json", CLIENT_FOLDER.rstrip("/")}
_OPEN_FOLDERS = ("/static/", CLIENT_FOLDER)


def is_stranger(request: Request) -> bool:
    """Whether the server requires a token and this request has none."""
    return getattr(request.state, "is_stranger", False)


class BearerAuth:
    """ASGI middleware that rejects requests without one of `tokens`."""

    def __init__(self, app: ASGIApp, tokens: tuple[str, ...]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        if scope["path"] in _OPEN_PATHS or scope["path"].startswith(_OPEN_FOLDERS):
            scope.setdefault("state", {})["is_stranger"] = True
            await self._app(scope, receive, send)
            return
        sent = "the one that was sent is none of them" if token_of(scope) else "none was sent"
        answer = problem(
            Unauthorized(
                f"this server wants one of its tokens, and {sent}: give it as token= or in H5FEED_TOKEN, and without "
                "h5feed as the header 'Authorization: Bearer …'"
            )
        )
        await answer(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = token_of(scope)
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._tokens]
        return any(matches)


def token_of(scope: Scope) -> bytes:
    """The request's bearer token; empty if there is none."""
    kind, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else b""
