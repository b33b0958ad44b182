"""A fast path to batches: queries that were valid before are not validated again.

Within an epoch only the index in the path changes. Routing, validation and dependency injection cost more than
everything except the bytes, so a request with a known query string is answered before it reaches the application.
The response is the same; anything unusual takes the normal path.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from fastapi import Request
from h5feed.errors import BadParameter, FeedError
from h5feed.wire import MEDIA_TYPE
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from ..services import Services
from .batch_stream import BatchStream, body_plan_of
from .counting import note
from .problems import problem
from .queries import BatchQuery, StreamQuery

MAX_REMEMBERED = 256
"""Query strings kept, of at most `MAX_LENGTH` bytes each."""

MAX_LENGTH = 2048

MAX_PARAMETERS = 100
"""In a query: none has so many, and each that is unknown would be an error to put into words."""

_PATH = re.compile(rb"/v1/datasets/([^/]+)/batches(?:/([0-9]{1,18}))?")
_WINDOW = re.compile(rb"(.*)&start=([0-9]{1,18})&stop=([0-9]{1,18})")
"""A stream's query as our client writes it: what comes before the window is the same for all streams of an epoch."""

_ACCEPTED = (b"*/*", MEDIA_TYPE.encode())


@dataclass(frozen=True)
class _Known:
    """A query that was found good, without the window of a stream; and its items for the ETag."""

    query: BatchQuery
    items: list[str]


class KnownQueries:
    """What was asked for lately, by the text of its query."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def remember(self, request: Request, query: BatchQuery) -> None:
        """Called by the endpoints: this request is valid."""
        text = request.scope["query_string"]
        window = _WINDOW.fullmatch(text)
        if window is not None:
            text = window[1]
            if b"start=" in text or b"stop=" in text:
                return
        elif isinstance(query, StreamQuery):
            return
        if text in self._known or len(text) > MAX_LENGTH:
            return
        if len(self._known) >= MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        items = request.query_params.multi_items()
        self._known[text] = _Known(query, [f"{key}={value}" for key, value in items if key not in ("start", "stop")])

    def answer(self, services: Services, scope: Scope) -> BatchStream | None:
        """The answer to a request for batches whose query is known; None: go the long way."""
        path = _PATH.fullmatch(scope["raw_path"])
        if path is None or not _wants_the_usual(scope):
            return None
        name, index = path.groups()
        text, window = scope["query_string"], []
        if index is None:
            match = _WINDOW.fullmatch(text)
            if match is None:
                return None
            text, start, stop = match[1], int(match[2]), int(match[3])
            window = [f"start={start}", f"stop={stop}"]
        else:
            start, stop = int(index), int(index) + 1
        known = self._known.get(text)
        if known is None or start >= stop:
            return None
        plan = partial(body_plan_of, services, unquote(name.decode("ascii")), known.query, scope)
        return BatchStream(services, plan, start, stop, path=scope["path"], items=[*known.items, *window])


def _wants_the_usual(scope: Scope) -> bool:
    """Safetensors, whether or not the caller has it already."""
    if scope["method"] != "GET":
        return False
    for name, value in scope["headers"]:
        if name == b"if-none-match" or (name == b"accept" and value not in _ACCEPTED):
            return False
    return True


class BatchShortcut:
    """ASGI middleware in front of an application with ``state.queries`` and ``state.services``."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http":
            queries: KnownQueries = self._state.queries
            answer = queries.answer(self._state.services, scope)
            if answer is None and scope["query_string"].count(b"&") >= MAX_PARAMETERS:
                error = BadParameter(f"the query has more than {MAX_PARAMETERS} parameters")
                await problem(error)(scope, receive, send)
                return
        if answer is None:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        try:
            await answer(scope, receive, send)
        except FeedError as error:
            refused = problem(error)
            services: Services = self._state.services
            endpoint = services.metrics.catalogue.batches[scope["path"].endswith("/batches")]
            seconds = time.perf_counter() - began
            note(services, endpoint, scope, refused.status_code, seconds, len(refused.body))
            await refused(scope, receive, send)
