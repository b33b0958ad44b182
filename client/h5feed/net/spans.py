"""Spans of OpenTelemetry for requests and for blocks of batches. Without traces, none of this runs."""

from __future__ import annotations

import atexit
import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..otel import end, is_wanted, new_provider
from ..version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from .exchange import Answer
    from .servers import Server

EXIT_SECONDS = 2.0
"""How long the interpreter waits at exit until the last spans are sent."""

_DATASET = re.compile(r"^/v1/datasets/[^/]+")
_NUMBER = re.compile(r"/[0-9]+(?=/|$)")


class Spans:
    """Makes spans.

    Parameters
    ----------
    tracer : Tracer
    """

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._client = SpanKind.CLIENT
        self._error = Status(StatusCode.ERROR)
        self._inject = TraceContextTextMapPropagator().inject

    @contextlib.contextmanager
    def block(self, **attributes: str | int) -> Iterator[None]:
        """The span of everything that fetches one block of batches, with its retries."""
        named = {f"h5feed.{name}": value for name, value in attributes.items()}
        with self._tracer.start_as_current_span("fetch block", attributes=named):
            yield

    def sender(self, server: Server) -> Callable[..., Answer]:
        """``server.send``, with a span for the request. The server continues the trace."""
        return partial(self._send, server)

    def _send(
        self, server: Server, method: str, target: str, accept: str, *, more: Mapping[str, str], **options: Any
    ) -> Answer:
        path = target.partition("?")[0]
        template = _NUMBER.sub("/{index}", _DATASET.sub("/v1/datasets/{name}", path))
        address = urlsplit(server.url)
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "url.path": path,
            "server.address": address.hostname or address.path,
        }
        if server.address is not None:
            attributes["network.peer.address"] = server.address
        if address.port is not None:
            attributes["server.port"] = address.port
        name = f"{method} {template}"
        with self._tracer.start_as_current_span(name, kind=self._client, attributes=attributes) as span:
            headers = dict(more)
            self._inject(headers)
            answer = server.send(method, target, accept, more=headers, **options)
            span.set_attribute("http.response.status_code", answer.status)
            if (request_id := answer.header("x-request-id")) is not None:
                span.set_attribute("h5feed.request_id", request_id)
            if answer.status >= 400:
                span.set_status(self._error)
            return answer


def spans() -> Spans | None:
    """The spans of this process; None if no traces are wanted or possible.

    A program that has set up OpenTelemetry itself gets them with its own.
    """
    global _spans, _is_known
    with _lock:
        if not _is_known and is_wanted():
            _spans, _is_known = _new_spans(), True
        return _spans if is_wanted() else None


def _new_spans() -> Spans | None:
    with contextlib.suppress(ImportError):
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider

        if isinstance(trace.get_tracer_provider(), TracerProvider):
            return Spans(trace.get_tracer("h5feed", __version__))
    provider = new_provider("h5feed")
    if provider is None:
        return None
    atexit.register(end, provider, EXIT_SECONDS)
    return Spans(provider.get_tracer("h5feed", __version__))


_lock = threading.Lock()
_spans: Spans | None = None
_is_known = False
