"""Spans of OpenTelemetry, if they are wanted. Each request continues the trace of its ``traceparent`` header.

The path of a batch knows nothing of it: it measures its phases anyway, and spans are made of them afterwards.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from h5feed.otel import end, new_provider
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..sharing.caller import CALLER
from ..sharing.metrics import BATCHES
from ..sharing.metrics import PHASES as PHASE_NAMES
from ..sharing.request_id import REQUEST_ID
from .counting import PHASES
from .peer import peer_of
from .redaction import without_secrets

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

END_SECONDS = 2.0
"""How long a worker that ends tries to send its last spans."""

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")


class Tracers:
    """The tracer of a worker. Create it in the worker: its threads do not survive a fork."""

    def __init__(self) -> None:
        self._provider: TracerProvider | None = new_provider("h5feed-server")
        self.tracer: Tracer | None = None
        if self._provider is not None:
            self.tracer = self._provider.get_tracer("h5feed-server", __version__)

    def close(self) -> None:
        """Send the last spans."""
        if self._provider is not None:
            end(self._provider, END_SECONDS)


class Tracing:
    """ASGI middleware that makes a span for each request, and one for each phase of those for batches.

    It is behind authentication: strangers make no spans.

    Parameters
    ----------
    state : State
        Of the application; has ``tracers``.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracer: Tracer | None = self._state.tracers.tracer if scope["type"] == "http" else None
        if tracer is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, use_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        carried = {
            name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT_HEADERS
        }
        parent = TraceContextTextMapPropagator().extract(carried)
        clock, began = time.time_ns(), time.perf_counter()
        span = tracer.start_span(scope["method"], parent, SpanKind.SERVER, start_time=clock)
        try:
            with use_span(span, record_exception=True, set_status_on_exception=True):
                await self._app(scope, receive, noting)
        finally:
            peer = peer_of(scope)
            if status is None and peer is not None and peer.has_begun():
                status = 200
            phases = scope.get("extensions", {}).get(PHASES)
            if span.is_recording():
                _describe(span, scope, status, is_batch=phases is not None)
                if status is None or status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                if phases is not None:
                    _phases(tracer, span, clock + round((phases[0] - began) * 1e9), phases[1:])
            span.end()


def _describe(span: Span, scope: Scope, status: int | None, *, is_batch: bool) -> None:
    route = getattr(scope.get("route"), "path_format", None)
    if route is None and is_batch:
        route = BATCHES if scope["path"].endswith("/batches") else f"{BATCHES}/{{index}}"
    attributes: dict[str, str | int] = {
        "http.request.method": scope["method"],
        "url.path": without_secrets(scope["path"]),
        "url.scheme": scope["scheme"],
        "h5feed.caller": CALLER.get(),
        "h5feed.request_id": REQUEST_ID.get(),
    }
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        attributes["http.route"] = route
    if status is not None:
        attributes["http.response.status_code"] = status
    span.set_attributes(attributes)


def _phases(tracer: Tracer, span: Span, begin: int, seconds: tuple[float, ...]) -> None:
    """Spans of the phases. Several blocks of a body, which are read and sent in turn, are shown as one each."""
    from opentelemetry.trace import set_span_in_context

    inside = set_span_in_context(span)
    for name, spent in zip(PHASE_NAMES, seconds, strict=True):
        after = begin + round(spent * 1e9)
        tracer.start_span(name, inside, start_time=begin).end(after)
        begin = after
