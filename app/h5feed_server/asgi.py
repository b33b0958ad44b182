"""The application for any ASGI server: ``uvicorn h5feed_server.asgi:app``, configured by ``H5FEED_*`` variables.

`h5feed-server serve` is faster, and only it protects the server from slow clients. See docs/how-to/deploy.md.
"""

from __future__ import annotations

import ipaddress
import logging
import os

from h5feed.errors import Unauthorized
from starlette.types import ASGIApp, Receive, Scope, Send

from .api.problems import problem
from .main import create_app
from .settings import Settings, unknown_variables

logger = logging.getLogger(__name__)


class _LoopbackOnly:
    """Answers only connections to the loopback address and to Unix sockets.

    The application does not know the listening address before the first request, so it cannot create a token at the
    start, as `h5feed-server serve` does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_local(scope.get("server")):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "this server has no tokens, so it answers only on the loopback address and on Unix sockets: set "
            "H5FEED_TOKENS, or set H5FEED_PUBLIC=1 to serve everybody without tokens"
        )
        await problem(error)(scope, receive, send)


def _is_local(server: tuple[str, int | None] | None) -> bool:
    # For Unix sockets, ASGI servers give no address, or a path without a port.
    if server is None or server[1] is None:
        return True
    try:
        address = ipaddress.ip_address(server[0].partition("%")[0])
    except ValueError:
        return server[0] == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _made() -> ASGIApp:
    settings = Settings().for_file()
    for line in unknown_variables(os.environ):
        logger.warning("%s", line)
    app = create_app(settings, behind_any_server=True)
    return app if settings.is_guarded or settings.public else _LoopbackOnly(app)


app = _made()
