"""Traces: one from the client's fetch of a block to the phases of the server, as a collector receives them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

_CLIENT = """
import sys, h5feed
with h5feed.connect(sys.argv[1], deadline=60) as feed:
    for batch in feed["mixed"].batches(batch_size=8, shuffle=True):
        pass
"""


@dataclass
class Received:
    """A span, and which program has sent it."""

    service: str
    span: Span

    def value(self, name: str) -> str | int:
        found = next(item.value for item in self.span.attributes if item.key == name)
        value: str | int = found.int_value if found.HasField("int_value") else found.string_value
        return value


class Collector:
    """Receives OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def named(self, name: str) -> list[Received]:
        return [one for one in list(self.spans) if one.span.name == name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = next(
                item.value.string_value for item in resource.resource.attributes if item.key == "service.name"
            )
            self.spans += [Received(service, span) for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.close()


STREAM = "GET /v1/datasets/{name}/batches"


def test_one_trace_from_block_to_phases(
    collector: Collector, serve: Callable[..., ServerProcess], folder: Path
) -> None:
    """The spans of both processes share a trace, each with the right parent, and the phases lie within the request."""
    server = serve(folder, "--workers", "2", **collector.environment)
    command = [sys.executable, "-c", _CLIENT, server.url]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, **collector.environment})

    def is_complete() -> bool:
        return len([one for one in collector.named(STREAM) if one.service == "h5feed-server"]) > 0 and bool(
            collector.named("fetch block")
        )

    wait_until(is_complete)
    block = collector.named("fetch block")[0]
    assert block.service == "h5feed" and not block.span.parent_span_id
    assert (block.value("h5feed.dataset"), block.value("h5feed.epoch")) == ("mixed", 0)

    def inside(parent: Received) -> list[Received]:
        return [one for one in collector.spans if one.span.parent_span_id == parent.span.span_id]

    wait_until(lambda: bool(inside(block)) and bool(inside(inside(block)[0])))
    (request,) = inside(block)
    assert (request.service, request.span.kind) == ("h5feed", Span.SPAN_KIND_CLIENT)
    assert request.span.name.startswith(STREAM) and request.value("http.response.status_code") == 200
    (answer,) = inside(request)
    assert (answer.service, answer.span.kind) == ("h5feed-server", Span.SPAN_KIND_SERVER)
    assert str(answer.value("http.route")).startswith("/v1/datasets/{name}/batches")
    assert answer.value("h5feed.request_id") == request.value("h5feed.request_id")
    phases = inside(answer)
    assert [one.span.name for one in phases] == ["queue", "plan", "read", "send"]
    family = [block, request, answer, *phases]
    assert len({one.span.trace_id for one in family}) == 1 and len({one.span.span_id for one in family}) == len(family)
    for one, other in pairwise(phases):
        assert one.span.end_time_unix_nano == other.span.start_time_unix_nano
    # Phases are measured by another clock than the span around them, which is read a moment earlier or later.
    assert phases[0].span.start_time_unix_nano >= answer.span.start_time_unix_nano - 1_000_000
    assert phases[-1].span.end_time_unix_nano <= answer.span.end_time_unix_nano + 1_000_000


def test_a_trace_from_elsewhere_goes_on(
    collector: Collector, serve: Callable[..., ServerProcess], folder: Path
) -> None:
    """Any client's traceparent is continued; one that is not sampled makes no spans; errors are marked."""
    server = serve(folder, **collector.environment, OTEL_SERVICE_NAME="feeder", H5FEED_TOKENS="secret")
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": "Bearer secret"}) as client:
        unsampled = {"traceparent": f"00-{'b' * 32}-{'c' * 16}-00"}
        assert client.get("/v1/datasets/nothing", headers=unsampled).status_code in (404, 503)
        # Strangers are refused before a span is made.
        assert httpx.get(f"{server.url}/v1/datasets", timeout=60).status_code == 401
        sampled = {"traceparent": f"00-{'a' * 32}-{'d' * 16}-01"}
        assert client.get("/v1/datasets", headers=sampled).status_code == 200
    wait_until(lambda: bool(collector.spans))
    (one,) = collector.spans
    assert (one.service, one.span.name) == ("feeder", "GET /v1/datasets")
    assert (one.span.trace_id.hex(), one.span.parent_span_id.hex()) == ("a" * 32, "d" * 16)


def test_the_last_spans_are_sent(collector: Collector, serve: Callable[..., ServerProcess], folder: Path) -> None:
    """A server that is stopped sends what it has, and a collector that is gone does not keep it from ending."""
    server = serve(folder, **{**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "100000"})
    assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    assert server.stop() == 0
    assert [one.span.name for one in collector.spans] == ["GET /healthz"]
    collector.close()
    server = serve(folder, **collector.environment)
    assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin is not supported"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/json is not supported"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "HIDDEN": "opentelemetry.sdk.trace"}, "pip install"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "proto-grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({}, ""),
    ],
)
def test_what_cannot_be_traced_is_said(variables: dict[str, str], says: str, server: ServerProcess) -> None:
    """The client works without traces, and says once why there are none; without the variables it imports nothing."""
    code = (
        "import os, sys\n"
        "if 'HIDDEN' in os.environ: sys.modules[os.environ['HIDDEN']] = None\n"
        "import h5feed\n"
        "for _ in range(2):\n"
        "    with h5feed.connect(sys.argv[1], deadline=60) as feed: feed.datasets()\n"
        "print('opentelemetry' in str(list(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, server.url],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )
    if says:
        assert done.stderr.count(says) == 1, done.stderr
    else:
        assert done.stderr == "" and done.stdout.strip() == "False"


def test_spans_join_those_of_the_program(collector: Collector, server: ServerProcess) -> None:
    """A program that has set up OpenTelemetry itself gets the client's spans with its own provider."""
    code = (
        "import sys\n"
        "from opentelemetry import trace\n"
        "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter\n"
        "from opentelemetry.sdk.resources import Resource\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import SimpleSpanProcessor\n"
        "provider = TracerProvider(resource=Resource.create({'service.name': 'training'}))\n"
        "provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))\n"
        "trace.set_tracer_provider(provider)\n"
        "import h5feed\n"
        "with trace.get_tracer('mine').start_as_current_span('step'):\n"
        "    with h5feed.connect(sys.argv[1], deadline=60) as feed: feed['mixed'].batch(0, batch_size=4)\n"
    )
    environment = {**os.environ, **collector.environment}
    subprocess.run([sys.executable, "-c", code, server.url], check=True, timeout=120, env=environment)
    (step,) = collector.named("step")
    requests = [one for one in collector.spans if one.span.name.startswith("GET /v1/datasets/{name}")]
    assert requests and {one.service for one in requests} == {"training"}
    assert {one.span.parent_span_id for one in requests} == {step.span.span_id}
