"""A list of servers that changes, such as those of a Ray cluster: see docs/how-to/ray.md.

Whoever keeps the list serves it as JSON, ``{"servers": ["http://10.0.0.4:8000", "http://10.0.0.5:8000"]}``, at
``/v1/servers``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from ..answers import ServerListing
from ..errors import BadAnswer, ConnectionFailed, FeedError
from ..schema import checked, read_json
from .http import httpx
from .refreshing import Refreshing
from .retries import error_of, final_error, reason_of
from .servers import LOOK_SECONDS, Server

PREFIX = "servers+"
"""Of the URL of a list: ``servers+http://head:8001``."""

_PATH = "/v1/servers"


class ServerList(Refreshing):
    """The URLs in a list of servers, safe to use from any thread.

    Parameters
    ----------
    server : Server
        Serves the list.

    Attributes
    ----------
    error : FeedError or None
        Why the last look-up failed.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.error: FeedError | None = None

    def after_fork(self) -> None:
        super().after_fork()
        self.server.after_fork()

    def _find(self, is_urgent: bool) -> Iterable[str]:
        try:
            urls = self._ask()
        except FeedError as error:
            self.error = error
            return ()
        self.error = None if urls else ConnectionFailed(f"the list of servers at {self.server.url} is empty")
        return urls

    def _ask(self) -> list[str]:
        server = self.server
        try:
            answer = server.send("GET", _PATH, "application/json", deadline=time.monotonic() + LOOK_SECONDS)
        except httpx.TransportError as error:
            failed = f"cannot read the list of servers at {server.name}: {reason_of(error)}"
            raise final_error(error, server) or ConnectionFailed(failed) from None
        if answer.status != 200:
            raise error_of(answer, server, several=True)
        try:
            urls = checked(read_json(answer.content), ServerListing, "list of servers")["servers"]
        except ValueError as error:
            raise BadAnswer(f"{server.url}{_PATH} did not return a list of servers ({error})") from None
        # A token for servers behind TLS must not be sent without.
        schemes = ("https://",) if server.url.startswith("https://") else ("http://", "https://")
        for url in urls:
            if not url.startswith(schemes):
                raise BadAnswer(f"{server.url}{_PATH} lists {url[:80]!r}, which does not begin with {schemes[0]}")
        return urls
