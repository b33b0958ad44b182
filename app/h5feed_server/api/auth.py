"""Bearer token authentication; runs before everything else.

The OpenAPI page is served without a token, because that is where users enter it. Without one it does not reveal what
is served. The client can be installed without one, before there is anything to send it with. People who open another
page are sent to a form that takes a token; a cookie represents it from then on.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlencode

from h5feed.errors import Unauthorized
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .forwarded import here
from .problems import problem

WATCHED_PATHS = frozenset({"/healthz", "/readyz"})
"""Those who watch the server have no token."""

CLIENT_FOLDER = "/simple/"
"""The package index with the client: pip has no token, and may know the server by any name."""

SIGN_IN, SIGN_OUT = "/sign-in", "/sign-out"

_OPEN_PATHS = WATCHED_PATHS | {"/docs", "/redoc", "/openapi.json", CLIENT_FOLDER.rstrip("/"), SIGN_IN, SIGN_OUT}
_OPEN_FOLDERS = ("/static/", "/explorer/", CLIENT_FOLDER)
_API = "/v1/"

_COOKIE = "h5feed_"
"""How names of cookies begin; their ends differ from server to server, for browsers tell no ports apart."""

_MOST_COOKIES = 16
"""That are looked at."""

_SAFE_METHODS = ("GET", "HEAD")
"""What a cookie opens: a browser sends it whoever wrote the page."""


def is_stranger(request: Request) -> bool:
    """Whether the server requires a token and this request has none."""
    return getattr(request.state, "is_stranger", False)


class BearerAuth:
    """ASGI middleware that rejects requests without one of `tokens`."""

    def __init__(self, app: ASGIApp, tokens: tuple[str, ...]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]
        self._cookies = sessions(tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS):
            scope.setdefault("state", {})["is_stranger"] = True
            await self._app(scope, receive, send)
            return
        if scope["method"] == "GET" and not path.startswith(_API) and _is_browser(scope):
            page = here(path) + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            form = RedirectResponse(here(f"{SIGN_IN}?{urlencode({'next': page})}"), 303, {"cache-control": "no-store"})
            await form(scope, receive, send)
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
        given, known = [token_of(scope)], self._tokens
        if not given[0]:
            given, known = sessions_of(scope), self._cookies
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(one, other) for one in given for other in known]
        return any(matches)


def token_of(scope: Scope) -> bytes:
    """The request's bearer token; empty if there is none."""
    kind, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else b""


def session_cookie(token: str, tokens: Sequence[str]) -> tuple[str, str] | None:
    """Name and value of the cookie that stands for a token; None where it is none of `tokens`."""
    matches = [hmac.compare_digest(token.encode(), known.encode()) for known in tokens]
    if not any(matches):
        return None
    name, _, value = _cookie(token).decode().partition("=")
    return name, value


def sessions_of(scope: Scope) -> list[bytes]:
    """The request's cookies of that kind, as ``name=value``; none where the method is not safe."""
    if scope["method"] not in _SAFE_METHODS:
        return []
    found = [cookie for cookie in _cookies(scope) if cookie.startswith(_COOKIE.encode())]
    return found[:_MOST_COOKIES]


def session_cookies_of(scope: Scope) -> list[str]:
    """Names of all cookies of that kind."""
    names = [cookie.partition(b"=")[0].decode("latin-1") for cookie in _cookies(scope)]
    return [name for name in names if name.startswith(_COOKIE)]


def sessions(tokens: Sequence[str]) -> list[bytes]:
    """The cookie that stands for each token, as ``name=value``."""
    return [_cookie(token) for token in tokens]


def _cookie(token: str) -> bytes:
    value = hmac.new(token.encode(), b"h5feed: a cookie of the explorer", hashlib.sha256).hexdigest()
    return f"{_COOKIE}{value[:8]}={value}".encode()


def _cookies(scope: Scope) -> list[bytes]:
    lines = [value for name, value in scope["headers"] if name == b"cookie"]
    return [cookie.strip() for line in lines for cookie in line.split(b";")]


def _is_browser(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
