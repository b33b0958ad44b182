"""Headers that tell clients the names of the state of data, and keep caches from storing what is provisional."""

from __future__ import annotations

from h5feed.revisions import HEADER, header_of, is_provisional
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..catalog.dataset import Dataset
from ..catalog.names import TOLD, Told

_NO_STORE = "no-store"
"""``Cache-Control``: the same name might later stand for other content, however unlikely that is."""


def names_headers(dataset: Dataset, headers: dict[str, str]) -> dict[str, str]:
    """Headers of a response, from those that it would have if the dataset were called by its content."""
    if not is_provisional(dataset.revision):
        return headers
    rest = {name: value for name, value in headers.items() if name != "etag"}
    return {**rest, "cache-control": _NO_STORE, HEADER: header_of(dataset.revision, dataset.names.content)}


class Naming:
    """ASGI middleware: sets the headers of responses about provisional names. Batches set their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Told()
        TOLD.set(told)

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start" and (told.names is not None or told.is_list):
                headers = MutableHeaders(scope=message)
                del headers["etag"]
                headers["cache-control"] = _NO_STORE
                if (header := told.header) is not None:
                    headers[HEADER] = header
            await send(message)

        await self._app(scope, receive, naming)
