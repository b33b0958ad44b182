"""Serves the list of servers to clients, at ``/v1/servers``: plain HTTP with the tokens and limits of a server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.types import Scope

from .. import __version__
from ..api import problems
from ..api.auth import BearerAuth
from ..api.hosts import HostCheck
from ..serve.connection import Connection
from ..serve.http1 import Host
from ..serve.worker import Tls
from ..settings import Settings
from ..tokens.keyring import Keyring

MAX_CONNECTIONS = 1000
"""Maximum number of open connections. Beyond it, new ones are closed; clients try again after a second."""

_LOOK_SECONDS = 0.5
"""Interval between checks of the connections."""

_STOP_SECONDS = 5.0


class ServerListing(BaseModel):
    """The servers that clients may use now."""

    servers: list[str] = Field(description="Their URLs.", examples=[["http://10.0.0.4:8000", "http://10.0.0.5:8000"]])


class ServerListPublisher:
    """Serves the list in a thread, until it is closed.

    Parameters
    ----------
    settings : Settings
        Which tokens and host names are accepted, and which limits apply.
    keyring : Keyring
    listener : socket
    tls : Tls, optional

    Attributes
    ----------
    urls : sequence of str
        The list.
    """

    def __init__(self, settings: Settings, keyring: Keyring, listener: socket.socket, tls: Tls | None = None) -> None:
        self.urls: Sequence[str] = ()
        self._watch = keyring.watch()
        self._owner = _Owner(self._app(settings, keyring), settings)
        self._listener = listener
        self._tls = None if tls is None else tls.context()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="h5feed-server-list", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        if self._watch is not None:
            self._watch.close()
        self._listener.close()

    def _app(self, settings: Settings, keyring: Keyring) -> FastAPI:
        app = FastAPI(title="h5feed servers", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
        problems.install(app)

        @app.get("/v1/servers")
        async def servers() -> ServerListing:
            return ServerListing(servers=[*self.urls])

        @app.get("/healthz")
        async def healthz() -> Response:
            return PlainTextResponse("ok")

        if keyring.is_guarding:
            app.add_middleware(BearerAuth, keyring=keyring, refused=_ignore)
        else:
            app.add_middleware(HostCheck, settings=settings, refused=_ignore)
        return app

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(
            self._loop.create_server(lambda: Connection(self._owner), sock=self._listener, ssl=self._tls)
        )
        self._loop.call_soon(self._owner.look, self._loop)
        try:
            self._loop.run_forever()
        finally:
            for connection in self._owner.connections():
                connection.abort()
            # Connections that were aborted are closed in the next turn.
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()


class _Owner:
    """What connections know of the process; see `serve.connection.Owner`."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.host = Host(app)
        self.patience = settings.read_timeout
        self.min_rate = settings.min_rate

    def connections(self) -> list[Connection]:
        return [connection for connection in self.host.connections if isinstance(connection, Connection)]

    def look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close connections of slow clients, and the oldest ones of too many."""
        loop.call_later(_LOOK_SECONDS, self.look, loop)
        open_ones = sorted(self.connections(), key=lambda connection: connection.number)
        crowded = set(open_ones[: max(0, len(open_ones) - MAX_CONNECTIONS)])
        for connection in open_ones:
            if connection in crowded or connection.look(loop.time()):
                connection.abort()

    def say_closed(self) -> None:
        """Nobody counts them."""

    def trusts(self, address: str) -> bool:
        return False


def _ignore(scope: Scope, status: int) -> None:
    """Refusals are not counted: there are no metrics."""
