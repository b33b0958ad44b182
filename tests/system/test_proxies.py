"""Reverse proxies, configured by exactly the blocks of docs/how-to/deploy.md: nginx and Caddy."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

PAGE = (Path(__file__).parents[2] / "docs/how-to/deploy.md").read_text()
ROWS = 200


def _block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without tokens that trusts proxies on this machine."""
    folder: Path = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "pictures.h5", "w") as file:
        file["images"] = np.random.default_rng(1).integers(0, 255, (ROWS, 128, 128, 3), np.uint8)
        file["labels"] = np.arange(ROWS) % 10
    process = ServerProcess(
        folder,
        tmp_path_factory.mktemp("cache"),
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
        H5FEED_ALLOWED_HOSTS="feed.example",
        H5FEED_ACCESS_LOG="0",
    )
    yield process
    assert process.stop() == 0


def _nginx(folder: Path, server: ServerProcess, port: int) -> list[str]:
    block = (
        _block("nginx").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("listen 8080", f"listen {port}")
    )
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off;\npid {folder}/pid;\nuser root;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{block}}}\n"
    )
    return ["nginx", "-c", str(config), "-p", str(folder)]


def _caddy(folder: Path, server: ServerProcess, port: int) -> list[str]:
    block = _block("caddy").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(":8080", f":{port}")
    config = folder / "Caddyfile"
    config.write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{block}")
    program = shutil.which("caddy") or str(Path(sys.executable).parent / "caddy")
    return [program, "run", "--config", str(config), "--adapter", "caddyfile"]


@pytest.fixture(params=[_nginx, _caddy], ids=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """The address of a proxy in front of the server, with the prefix."""
    port = _free_port()
    command: Callable[[Path, ServerProcess, int], list[str]] = request.param
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(tmp_path, server, port), env=environment, stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}/h5feed"
    finally:
        process.terminate()
        process.wait(60)


def test_training_through_a_proxy(server: ServerProcess, proxy: str, tmp_path: Path) -> None:
    """The same batches, over connections that are kept on both sides, and no byte on the proxy's disk."""
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "seed": 5}
    with h5feed.connect(server.url, deadline=60) as near, h5feed.connect(proxy, deadline=60) as far:
        rows: list[int] = []
        for one, two in zip(near["pictures"].batches(**options), far["pictures"].batches(**options), strict=True):
            np.testing.assert_array_equal(one["images"], two["images"])
            rows += two.rows.tolist()
        assert sorted(rows) == list(range(ROWS))
        stored = [path for kind in ("proxy", "client_body") for path in (tmp_path / kind).rglob("*") if path.is_file()]
        assert not stored and "buffered to a temporary" not in (tmp_path / "log").read_text()
    # Twenty requests in a row: one connection here, and no more than a few behind the proxy.
    with httpx.Client(timeout=60) as client:
        before = _connections(server.port)
        for _ in range(20):
            answer = client.get(f"{proxy}/v1/datasets/pictures/batches/0?batch_size=4")
            assert answer.status_code == 200 and answer.headers.get("connection", "keep-alive") != "close"
        assert len(_connections(server.port) - before) <= 4


def _connections(port: int) -> set[str]:
    """The local ends of connections to a port of this machine, those that were closed a moment ago, too."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ends = [(line.split()[1], line.split()[2]) for line in lines]
    return {near for near, far in ends if far.endswith(f":{port:04X}")}


def test_pages_through_a_proxy(proxy: str) -> None:
    """The explorer works below the prefix, and names the address of the proxy."""
    with httpx.Client(timeout=60, headers={"accept": "text/html", "host": "feed.example"}) as browser:
        root = proxy.removesuffix("/h5feed")
        for path in ("/", "/datasets/pictures", "/datasets/pictures/rows", "/docs", "/openapi.json"):
            page = browser.get(f"{proxy}{path}", follow_redirects=False)
            assert page.status_code in (200, 202), (path, page.text)
            for link in set(re.findall(r'(?:href|src)="(/[^"?#]*)', page.text)):
                assert link.startswith("/h5feed/"), (path, link)
                if "." in link:
                    assert browser.get(root + link).status_code == 200, link
        assert "http://feed.example/h5feed" in browser.get(f"{proxy}/datasets/pictures").text
        assert browser.get(f"{proxy}/simple").headers["location"].endswith("/h5feed/simple/")
