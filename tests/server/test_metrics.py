"""/metrics: correct numbers, summed over all workers, in which counters never go backwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed_server.main import metrics_catalogue
from h5feed_server.sharing.metrics import Everywhere, Metrics, pack_batches
from h5feed_server.sharing.scoreboard import SUPERVISOR, Scoreboard
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

BATCHES = "/v1/datasets/mixed/batches"
QUERY = "batch_size=8"


def families(url: str, **headers: str) -> list[Metric]:
    # The worker that has the connection may be the one that ends: connect again, as a client does.
    for attempt in (1, 2, 3):
        try:
            answer = httpx.get(f"{url}/metrics", headers=headers, timeout=60).raise_for_status()
            break
        except httpx.ReadError:
            if attempt == 3:
                raise
    parse = parse_openmetrics if "openmetrics" in answer.headers["content-type"] else parse_text
    return list(parse(answer.text))


def samples(url: str, **headers: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(url, **headers)
        for sample in family.samples
    }


def one(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"h5feed_{name}", tuple(sorted(labels.items()))), 0.0)


def counters(url: str) -> Samples:
    """All samples that may only grow."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(url)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def fetch(url: str, times: int, path: str = f"{BATCHES}/0?{QUERY}", **headers: str) -> int:
    """Send requests over separate connections, which go to different workers; returns the total size of the bodies."""
    nbytes = 0
    for _ in range(times):
        answer = httpx.get(url + path, headers=headers, timeout=60)
        assert answer.status_code == 200
        nbytes += len(answer.content)
    return nbytes


@pytest.fixture
def own(serve: Callable[..., ServerProcess], folder: Path) -> ServerProcess:
    """A server of two workers that has inspected its files."""
    server = serve(folder, "--workers", "2")
    wait_until(lambda: httpx.get(f"{server.url}{BATCHES}/0?{QUERY}", timeout=60).status_code == 200)
    return server


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_counts_are_those_of_all_workers(own: ServerProcess, accept: str) -> None:
    """Batches, rows, bytes and requests are exactly what clients got, whichever workers sent them."""

    def now() -> tuple[float, ...]:
        found = samples(own.url, accept=accept)
        single = {"method": "GET", "endpoint": "/v1/datasets/{name}/batches/{index}"}
        many = {"method": "GET", "endpoint": "/v1/datasets/{name}/batches"}
        return (
            one(found, "batches_total"),
            one(found, "batch_rows_total"),
            one(found, "batch_bytes_total"),
            one(found, "http_requests_total", **single, status="2xx"),
            one(found, "http_requests_total", **many, status="2xx"),
            one(found, "http_request_duration_seconds_count", **single),
            one(found, "batch_phase_seconds_count", phase="send"),
            one(found, "http_response_bytes_total", **many),
        )

    time.sleep(1.1)  # what was counted before is published
    before = now()
    single = fetch(own.url, 6)
    several = fetch(own.url, 4, f"{BATCHES}?{QUERY}&start=0&stop=3")
    expected = [6 + 12, 8 * (6 + 12), single + several, 6, 4, 6, 10, several]
    wait_until(lambda: [after - was for after, was in zip(now(), before, strict=True)] == expected)


def test_gauges_cover_all_workers(own: ServerProcess) -> None:
    """Sizes, limits and processes cover both workers. Every metric has a type and a help text."""
    wait_until(lambda: one(samples(own.url), "connections_limit") == 4000)
    found = samples(own.url)
    assert one(found, "workers") == 2
    assert one(found, "inflight_limit_bytes") == 2 * (256 << 20)
    assert one(found, "cache_limit_bytes", cache="fields") == 2 * (64 << 20)
    statuses = Counter(line["status"] for line in httpx.get(f"{own.url}/v1/datasets", timeout=60).json()["datasets"])
    assert {status: one(found, "datasets", status=status) for status in statuses} == statuses
    assert one(found, "inspections_total", result="ok") >= 2 and one(found, "inspections_total", result="failed") >= 2
    assert abs(time.time() - one(found, "server_start_time_seconds")) < 600
    sizes = {labels[0][1]: value for (name, labels), value in found.items() if name.endswith("resident_memory_bytes")}
    assert set(sizes) == {"supervisor", "worker 1", "worker 2"} and min(sizes.values()) > 10 << 20
    assert all(family.documentation and family.type != "unknown" for family in families(own.url))


def test_labels_name_neither_data_nor_callers(own: ServerProcess) -> None:
    """No request adds an unexpected series, so their number is bounded."""
    fetch(own.url, 1)
    for path in ("/v1/datasets/nothing-of-that-name", "/somewhere/else", "/v1/datasets/mixed/batches/999999"):
        assert httpx.get(own.url + path, timeout=60).status_code == 404
    httpx.request("BREW", f"{own.url}/v1/datasets/mixed", timeout=60)
    wait_until(lambda: one(samples(own.url), "problems_total", code="batch_out_of_range") == 1)
    text = httpx.get(f"{own.url}/metrics", timeout=60).text
    for word in ("mixed", "nothing-of-that-name", "somewhere", "127.0.0.1", "BREW"):
        assert word not in text
    catalogue = metrics_catalogue()
    assert 1000 < catalogue.count < 8190


def test_a_known_query_that_fails_is_counted(own: ServerProcess) -> None:
    """Requests that are answered before they reach the application are counted, too."""
    labels = {"method": "GET", "endpoint": "/v1/datasets/{name}/batches/{index}", "status": "4xx"}
    with httpx.Client(base_url=own.url, timeout=60) as client:
        assert client.get(f"{BATCHES}/0?{QUERY}").status_code == 200
        assert client.get(f"{BATCHES}/999999?{QUERY}").status_code == 404
    wait_until(lambda: one(samples(own.url), "http_requests_total", **labels) == 1)


def test_loops_report_their_waits(own: ServerProcess) -> None:
    """The waiting times that clients report are added up."""
    for report in ("waited=0.250, of=1.000", "waited=0.500, of=2.000", "nonsense"):
        fetch(own.url, 1, **{"h5feed-wait": report})
    wait_until(lambda: one(samples(own.url), "client_loop_seconds_total") == 3)
    assert one(samples(own.url), "client_wait_seconds_total") == 0.75


def test_metrics_require_a_token_if_the_server_does(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """If the server has tokens, /metrics requires one. Requests without one are refused and counted."""
    server = serve(folder, H5FEED_TOKENS="secret")
    assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 401
    found = samples(server.url, authorization="Bearer secret")
    assert one(found, "http_requests_total", method="other", endpoint="other", status="4xx") == 1
    assert one(found, "problems_total", code="unauthorized") == 1


def test_refusals_by_exhausted_resource(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """If a client that reads nothing holds all memory, others get 503, and the metrics show the reason."""
    (data := tmp_path / "data").mkdir()
    with h5py.File(data / "long.h5", "w") as file:
        file["value"] = np.zeros((2_000_000, 40), np.uint8)
    server = serve(data, H5FEED_INFLIGHT_BYTES=str(1 << 20), H5FEED_ADMIT_TIMEOUT="0", H5FEED_MIN_RATE="1")
    wait_until(lambda: httpx.get(f"{server.url}/v1/datasets/long", timeout=60).status_code == 200)
    path = "/v1/datasets/long/batches?batch_size=20000&start=0&stop=100&shuffle=true"
    with socket.create_connection(("127.0.0.1", server.port)) as stuck:
        stuck.settimeout(60)
        stuck.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        # It has the memory, and not the one that comes next.
        assert stuck.recv(1, socket.MSG_PEEK)
        wait_until(lambda: httpx.get(f"{server.url}{path}", timeout=60).status_code == 503, 30)
    wait_until(lambda: one(samples(server.url), "overloads_total", lacking="memory") >= 1)
    assert one(samples(server.url), "overloads_total", lacking="connections") == 0


@pytest.mark.slow
def test_counters_survive_a_worker(own: ServerProcess) -> None:
    """If a worker is killed, its counts remain and its gauges disappear. The restart is counted."""
    for round_ in (1, 2):
        fetch(own.url, 8)
        wait_until(lambda: one(samples(own.url), "workers") == 2)
        time.sleep(1.1)  # every worker has published
        before = counters(own.url)
        os.kill(own.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: one(samples(own.url), "worker_restarts_total", reason="ended") == round_)  # noqa: B023
        wait_until(lambda: one(samples(own.url), "connections_limit") == 4000)
        after = counters(own.url)
        assert not {key: (value, after.get(key)) for key, value in before.items() if after.get(key, -1) < value}
    assert one(samples(own.url), "batches_total") >= 16


@pytest.mark.slow
def test_counters_survive_a_reload(own: ServerProcess) -> None:
    """Counts remain after SIGHUP, which replaces all workers and does not count as a restart."""
    fetch(own.url, 8)
    before = counters(own.url)
    for _ in range(2):
        pids = set(own.worker_pids())
        own.process.send_signal(signal.SIGHUP)
        wait_until(lambda pids=pids: len(set(own.worker_pids()) - pids) == 2 == len(own.worker_pids()))  # type: ignore[misc]
        wait_until(lambda: one(samples(own.url), "connections_limit") == 4000)
    after = counters(own.url)
    assert not {key: (value, after.get(key)) for key, value in before.items() if after.get(key, -1) < value}
    assert one(after, "batches_total") >= 8
    assert one(after, "worker_restarts_total", reason="ended") == 0


@pytest.mark.slow
def test_workers_that_a_reload_adds_are_counted(
    serve: Callable[..., ServerProcess],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Reloads with more workers than at the start, while old workers are still ending, and with fewer again."""
    monkeypatch.setattr(ServerProcess, "new_session", True)
    file = tmp_path / "env"
    file.write_text("H5FEED_WORKERS=1\n")
    server = serve(folder, "--env-file", str(file))
    for workers in (6, 2):
        file.write_text(f"H5FEED_WORKERS={workers}\n")
        before = set(server.worker_pids())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(set(server.worker_pids()) - before) == workers == len(server.worker_pids()))  # noqa: B023
        wait_until(lambda: one(samples(server.url), "workers") == workers)  # noqa: B023
        # Each has published.
        wait_until(lambda: one(samples(server.url), "connections_limit") == 2000 * workers)  # noqa: B023
    assert "/metrics" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_hung_worker_is_counted_as_hung(own: ServerProcess) -> None:
    """A suspended worker is replaced, and counted as hung."""
    psutil.Process(own.worker_pids()[0]).suspend()

    def is_counted() -> bool:
        try:
            return one(samples(own.url), "worker_restarts_total", reason="hung") == 1
        except httpx.TransportError:
            # The suspended worker had this connection.
            return False

    wait_until(is_counted)


def test_places_are_reused() -> None:
    """A new process continues with the counts of the process before it, but not with its gauges."""
    board, catalogue = Scoreboard(1), metrics_catalogue()
    for pid in (11, 12, 13, 14, 15):
        place = board.take()
        assert place == 1
        board.occupy(place, pid)
        worker = Metrics(catalogue, board, place)
        worker.watch(lambda: {("decoded_chunks_total", None): 5, ("connections", None): 7})
        worker.add("connections_opened_total", None, 2)
        worker.publish()
        found = Everywhere.of(catalogue, board)
        assert found.value("connections") == 7 and found.workers.keys() == {1}
        board.leave(pid)
    found = Everywhere.of(catalogue, board)
    assert found.value("decoded_chunks_total") == 25 and found.value("connections_opened_total") == 10
    assert found.value("connections") == 0 and not found.workers
    taken = [board.take()]
    board.occupy(1, 1)
    taken.append(board.take())
    board.occupy(2, 2)
    board.occupy(3, 3)
    assert taken == [1, 2] and board.take() is None
    assert SUPERVISOR not in taken


def test_batches_are_added_up() -> None:
    """However many records are added up at once, sums and buckets are correct."""
    board, catalogue = Scoreboard(1), metrics_catalogue()
    worker = Metrics(catalogue, board, 1)
    single, several = catalogue.batches
    for number in range(1000):
        endpoint = single if number % 4 else several
        worker.note_batches(pack_batches(endpoint, 2, 16, 100, 0.0, 1e-4, 0.02, 40.0, 0.5, 1.0))
    found = worker.everywhere()
    assert found.value("batches_total") == 2000 and found.value("batch_rows_total") == 16000
    assert found.value("client_wait_seconds_total") == 500
    phases = next(metric for metric in catalogue.metrics if metric.name == "batch_phase_seconds")
    by_phase = {labels[0][1]: numbers for labels, numbers in found.series(phases)}
    assert by_phase["queue"][0] == 1000 and by_phase["plan"][0] == 1000  # a bound belongs to its bucket
    assert by_phase["send"][-2] == 1000 and by_phase["send"][-1] == pytest.approx(40000)
    requests = next(metric for metric in catalogue.metrics if metric.name == "http_requests_total")
    shown = {(labels[1][1], labels[2][1]): numbers[0] for labels, numbers in found.series(requests)}
    assert shown["/v1/datasets/{name}/batches", "2xx"] == 250
    assert shown["/v1/datasets/{name}/batches/{index}", "2xx"] == 750


def test_every_request_has_an_id(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Every response and every problem has a request id. Only a trusted proxy may choose it."""
    paths = ("/healthz", f"{BATCHES}/0?{QUERY}", f"{BATCHES}/0?{QUERY}", "/nowhere", f"{BATCHES}/0?{QUERY}&format=npz")
    server = serve(folder)
    wait_until(lambda: httpx.get(f"{server.url}{BATCHES}/0?{QUERY}", timeout=60).status_code == 200)
    with httpx.Client(base_url=server.url, timeout=60, headers={"x-request-id": "mine"}) as client:
        answers = [client.get(path) for path in paths]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-f]{16}", one_id) for one_id in ids)
    assert answers[3].json()["request_id"] == ids[3]
    with socket.create_connection(("127.0.0.1", server.port)) as connected:
        connected.sendall(b"nonsense\r\n\r\n")
        said = connected.makefile("rb").read().decode()
    assert re.search(r"x-request-id: ([0-9a-f]{16})\r\n(?s:.*)\"request_id\":\"\1\"", said)

    proxied = serve(folder, H5FEED_TRUSTED_PROXIES="127.0.0.0/8")
    for given, taken in (("Abc-1.2/3", True), ("two words", False), ("x" * 129, False), ("", False)):
        answer = httpx.get(f"{proxied.url}/nowhere", headers={"x-request-id": given}, timeout=60)
        assert (answer.headers["x-request-id"] == given) == taken
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
