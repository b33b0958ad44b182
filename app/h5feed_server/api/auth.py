"""Bearer token authentication; runs before everything else.

The OpenAPI page needs no token, because users enter their token there. Without one, it does not reveal what is served.
The package index needs no token, so that `pip` can install the client. Browsers that open another page are redirected
to a sign-in form; from then on, a cookie represents the token.

The datasets that a token gives access to are not checked here: the scope is passed on to the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlencode

from h5feed.errors import Unauthorized
from h5feed.handshake import PROOF_PATH
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..tokens.keyring import Keyring, Token
from ..tokens.scope import NOTHING, SCOPE
from ..tokens.secrets import proof_of
from .forwarded import here
from .problems import problem
from .redaction import without_secrets

WATCHED_PATHS = frozenset({"/healthz", "/readyz"})
"""Monitoring systems and load balancers have no token."""

CLIENT_FOLDER = "/simple/"
"""The package index with the client. pip has no token, and may use any host name."""

SIGN_IN, SIGN_OUT = "/sign-in", "/sign-out"

_OPEN_PATHS = WATCHED_PATHS | {
    *("/docs", "/redoc", "/openapi.json", CLIENT_FOLDER.rstrip("/"), SIGN_IN, SIGN_OUT),
    # Clients send no token over a Unix socket before it has proved whose it is.
    PROOF_PATH,
}
_OPEN_FOLDERS = ("/static/", "/explorer/", CLIENT_FOLDER)
_API = ("/v1/", "/h5grove/")

_COOKIE = "h5feed_"
"""Prefix of cookie names. The rest differs between servers, because the ports of a host share cookies."""

_MOST_COOKIES = 16
"""Maximum number of cookies that are checked."""

_SAFE_METHODS = ("GET", "HEAD")
"""Methods that accept a cookie: browsers send cookies with requests from any page."""


@dataclass(frozen=True)
class Access:
    """The token of a request.

    Attributes
    ----------
    token : Token or None
        The valid token.
    expired : Token or None
        If there is no valid token, an expired one.
    """

    token: Token | None = None
    expired: Token | None = None


def is_stranger(request: Request) -> bool:
    """Whether the server requires a token and this request has none."""
    return getattr(request.state, "is_stranger", False)


class BearerAuth:
    """ASGI middleware that rejects requests without a valid token, and passes on the scope of the token.

    Parameters
    ----------
    keyring : Keyring
    refused : callable
        Called for each refused request, with the status.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, refused: Callable[[Scope, int], None]) -> None:
        self._app = app
        self._keyring = keyring
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access = access_of(scope, self._keyring)
        # Always set the scope, because a task inherits the context of the task that created it.
        if access.token is not None:
            SCOPE.set(access.token.scope)
            scope.setdefault("state", {})["token"] = access.token
            await self._app(scope, receive, send)
            return
        SCOPE.set(NOTHING)
        path = scope["path"]
        if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS):
            scope.setdefault("state", {})["is_stranger"] = True
            await self._app(scope, receive, send)
            return
        if scope["method"] == "GET" and not path.startswith(_API) and _is_browser(scope):
            page = here(path) + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            following = urlencode({"next": without_secrets(page)})
            form = RedirectResponse(here(f"{SIGN_IN}?{following}"), 303, {"cache-control": "no-store"})
            await form(scope, receive, send)
            return
        self._refused(scope, 401)
        await problem(Unauthorized(_refusal(scope, access)))(scope, receive, send)


def access_of(scope: Scope, keyring: Keyring) -> Access:
    """The token that a request has sent, or that one of its cookies represents."""
    given = token_of(scope)
    found = [keyring.by_token(given)] if given else [keyring.by_cookie(*cookie) for cookie in _sessions_of(scope)]
    expired = None
    for token in found:
        if token is not None:
            if not token.has_expired():
                return Access(token)
            expired = token
    return Access(None, expired)


def expiry_of(token: Token) -> str:
    """A sentence that says when a token expired."""
    return f"the token {token.name!r} expired on {token.expires:%Y-%m-%d at %H:%M UTC}"


def token_of(scope: Scope) -> bytes:
    """The request's bearer token; empty if there is none."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = value.partition(b" ")
            return token.strip() if kind.lower() == b"bearer" else b""
    return b""


def session_cookie(token: Token, text: str) -> tuple[str, str]:
    """Name and value of the cookie that represents a token."""
    return f"{_COOKIE}{token.id}", proof_of(text.encode())


def session_cookies_of(scope: Scope) -> list[str]:
    """Names of all session cookies in the request."""
    return [f"{_COOKIE}{name}" for name, _ in _sessions(scope)]


def own_cookies_of(scope: Scope, keyring: Keyring) -> list[str]:
    """Names of the session cookies of this server, without those of other servers on this host."""
    return [f"{_COOKIE}{name}" for name, proof in _sessions(scope)[:_MOST_COOKIES] if keyring.by_cookie(name, proof)]


def _sessions_of(scope: Scope) -> list[tuple[str, str]]:
    """Ids and proofs in the session cookies of the request; none if the method is not safe."""
    return _sessions(scope)[:_MOST_COOKIES] if scope["method"] in _SAFE_METHODS else []


def _sessions(scope: Scope) -> list[tuple[str, str]]:
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"]
    cookies = [cookie.strip().partition("=") for line in lines for cookie in line.split(";")]
    return [(name.removeprefix(_COOKIE), value) for name, _, value in cookies if name.startswith(_COOKIE)]


def _refusal(scope: Scope, access: Access) -> str:
    """Why the request is refused, and what to do."""
    if access.expired is not None:
        return f"{expiry_of(access.expired)}: ask whoever runs the server for a new one"
    sent = "the one that was sent is wrong" if token_of(scope) else "none was sent"
    return (
        f"this server requires a token, and {sent}: pass token= or set H5FEED_TOKEN; other programs send the header "
        "'Authorization: Bearer TOKEN'"
    )


def _is_browser(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
