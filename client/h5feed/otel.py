"""OpenTelemetry, if its environment variables ask for traces. Otherwise, nothing of it is imported."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("h5feed")

_INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http (or the extra 'otel')"
_HTTP, _GRPC = "http/protobuf", "grpc"
_EXPORTERS = {
    _HTTP: "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    _GRPC: "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


def is_wanted() -> bool:
    """Whether the environment asks for traces."""
    if _variable("OTEL_SDK_DISABLED").lower() == "true":
        return False
    exporter = _variable("OTEL_TRACES_EXPORTER").lower()
    if exporter:
        return exporter != "none"
    return bool(_variable("OTEL_EXPORTER_OTLP_ENDPOINT") or _variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def new_provider(service: str) -> TracerProvider | None:
    """A provider of tracers that exports as the environment says; None, with a warning, if that is impossible.

    Call it after forking, and `end` it at last.

    Parameters
    ----------
    service : str
        ``service.name`` if the environment does not set it.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces are sent, although OTEL_… variables ask for them: %s; %s", error, _INSTALL)
        return None
    named = _variable("OTEL_SERVICE_NAME") or "service.name=" in _variable("OTEL_RESOURCE_ATTRIBUTES")
    resource = Resource.create({} if named else {"service.name": service})
    # At exit, it would wait for a collector that does not answer.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in (_variable("OTEL_TRACES_EXPORTER") or "otlp").lower().split(","):
        exporter = _exporter(name.strip())
        if exporter is None:
            return None
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def end(provider: TracerProvider, seconds: float) -> None:
    """Send what is left, for at most so many seconds."""
    ending = threading.Thread(target=provider.shutdown, name="h5feed-traces", daemon=True)
    ending.start()
    ending.join(seconds)


def _exporter(name: str) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        logger.warning("no traces are sent: OTEL_TRACES_EXPORTER=%s is not supported: use otlp, console or none", name)
        return None
    protocol = _variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or _variable("OTEL_EXPORTER_OTLP_PROTOCOL") or _HTTP
    if protocol not in _EXPORTERS:
        logger.warning("no traces are sent: OTEL_EXPORTER_OTLP_PROTOCOL=%s is not supported: use %s", protocol, _HTTP)
        return None
    try:
        return importlib.import_module(_EXPORTERS[protocol]).OTLPSpanExporter()
    except ImportError as error:
        install = "pip install opentelemetry-exporter-otlp-proto-grpc" if protocol == _GRPC else _INSTALL
        logger.warning("no traces are sent, although OTEL_… variables ask for them: %s; %s", error, install)
        return None


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()
