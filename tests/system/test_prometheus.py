"""Debian's Prometheus with the files in deploy/, a real server, and a training run."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import httpx
import pytest
from h5feed_server.api.exposition import EXTRA
from h5feed_server.main import metrics_catalogue

from tests.support.object_store import copy_files, serve_folder
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus/alerts.yml"
TOKEN = "a-token-for-prometheus"


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: run `make setup-system`"
    return path


def _names() -> set[str]:
    """What every metric is called in samples."""
    names = set()
    for metric in (*metrics_catalogue().metrics, *EXTRA):
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {f"h5feed_{metric.name}{end}" for end in ends}
    return names


def _dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/h5feed.json").read_text())
    return board


def _queries() -> list[str]:
    found = [target["expr"] for panel in _dashboard()["panels"] for target in panel["targets"]]
    return [query.replace("$instance", ".+").replace("$__rate_interval", "30s") for query in found]


class Prometheus:
    """One that scrapes a server every half second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        assert "h5feed:8000" in config and "15s" in config
        config = config.replace("h5feed:8000", f"'{target}'").replace("15s", "500ms")
        uncommented = re.sub(r"# (authorization:)\n( +)#(   credentials_file:) .*", rf"\1\n\2\3 {folder}/token", config)
        assert "credentials_file" in uncommented and uncommented != config
        (folder / "token").write_text(TOKEN)
        (folder / "prometheus.yml").write_text(uncommented)
        shutil.copy(ALERTS, folder)
        subprocess.run([_program("promtool"), "check", "config", folder / "prometheus.yml"], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        listen = f"--web.listen-address={self.url.removeprefix('http://')}"
        self.process = subprocess.Popen([_program("prometheus"), *options, listen, "--log.level=error"])

    def ask(self, path: str, **parameters: str) -> Any:
        try:
            answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == 200 else None

    def query(self, expression: str) -> list[dict[str, Any]]:
        found = self.ask("query", query=expression)
        return found["result"] if found else []


@pytest.fixture
def prometheus(
    serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path
) -> Iterator[tuple[Prometheus, ServerProcess]]:
    # From a store, because only then all metrics have numbers.
    copy_files(folder, tmp_path / "buckets" / "data")
    store = serve_folder(tmp_path / "buckets")
    server = serve("s3://data", "--workers", "2", H5FEED_TOKENS=TOKEN, **store.environment)
    started = Prometheus(tmp_path, f"127.0.0.1:{server.port}")
    yield started, server
    started.process.terminate()
    started.process.wait(30)
    store.stop()


def test_the_files_name_metrics_that_are_there() -> None:
    """The dashboard and the alerts use no other metrics, and the dashboard shows nearly all of them."""
    names = _names()
    text = "\n".join([*_queries(), ALERTS.read_text()])
    used = set(re.findall(r"h5feed_[a-z_]+", text))
    assert used and used <= names
    unused = {name for name in names - used if not name.endswith(("_sum", "_count"))}
    assert not unused
    subprocess.run([_program("promtool"), "check", "rules", ALERTS], check=True)


def test_promtool_finds_nothing(server: ServerProcess) -> None:
    """Names, types, units and texts are as Prometheus wants them."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    done = subprocess.run(
        [_program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_query_returns_data(prometheus: tuple[Prometheus, ServerProcess]) -> None:
    """While somebody trains, all panels have data, and all alerts can be evaluated; none fires."""
    found, server = prometheus
    with h5feed.connect(server.url, token=TOKEN, deadline=60) as feed:
        loader = feed["mixed"].loader(batch_size=4, shuffle=True)
        left = list(dict.fromkeys(_queries()))

        def all_have_data() -> bool:
            for _ in loader:
                pass
            httpx.get(f"{server.url}/v1/datasets/nothing", headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)
            left[:] = [query for query in left if not found.query(query)]
            return not left

        try:
            wait_until(all_have_data, 120)
        except AssertionError:
            raise AssertionError(f"no data for {left}") from None
        assert float(found.query("h5feed_batches_total")[0]["value"][1]) > 0
        assert found.query('up{job="h5feed"}')[0]["value"][1] == "1"

    rules = found.ask("rules")["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} >= {"H5feedDown", "H5feedTrainingWaits", "H5feedOverloaded"}
    wait_until(lambda: all(rule["health"] == "ok" for rule in found.ask("rules")["groups"][0]["rules"]))
    for rule in rules:
        # Without its threshold, an alert that does not fire has data all the same.
        measured = re.sub(r" (?:>|==) [0-9.]+$", "", rule["query"].strip())
        assert measured != rule["query"] and found.query(measured), rule["query"]
        # These two depend on how fast this machine is.
        assert rule["state"] == "inactive" or rule["name"] in ("H5feedTrainingWaits", "H5feedSlow"), rule


def test_an_alert_fires_when_the_server_is_gone(prometheus: tuple[Prometheus, ServerProcess]) -> None:
    """The expression of H5feedDown finds a server that was stopped."""
    found, server = prometheus
    wait_until(lambda: bool(found.query('up{job="h5feed"} == 1')))
    server.stop()
    wait_until(lambda: bool(found.query('up{job="h5feed"} == 0')))
    wait_until(
        lambda: any(
            r["name"] == "H5feedDown" and r["state"] != "inactive" for r in found.ask("rules")["groups"][0]["rules"]
        )
    )
