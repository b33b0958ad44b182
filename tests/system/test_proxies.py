"""Reverse proxies, configured by exactly the blocks of docs/how-to/deploy.md: nginx and Caddy, with https, too."""

from __future__ import annotations

import functools
import os
import re
import ssl
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
from playwright.sync_api import Browser, expect

from tests.support.authority import Authority
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until
from tests.system.programs import ROOT, below_h5feed, blocks_of, caddy, caddy_with, free_port, nginx, running
from tests.system.visits import TIMEOUT_MS

ROWS = 200
TOKEN = "a-token-of-a-test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server without tokens that trusts proxies on this machine."""
    folder: Path = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "pictures.h5", "w") as file:
        file["images"] = np.random.default_rng(1).integers(0, 255, (ROWS, 128, 128, 3), np.uint8)
        file["labels"] = np.arange(ROWS) % 10
    return serve_module(
        folder,
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
        H5FEED_ALLOWED_HOSTS="feed.example",
        H5FEED_ACCESS_LOG="0",
    )


def _caddy(folder: Path, server_port: int, port: int) -> list[str]:
    block = blocks_of("caddy")[0].replace("127.0.0.1:8000", f"127.0.0.1:{server_port}").replace(":8080", f":{port}")
    return caddy(folder, block)


@pytest.fixture(params=[below_h5feed, _caddy], ids=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, server: ServerProcess, tmp_path: Path) -> Iterator[str]:
    """The address of a proxy in front of the server, with the prefix."""
    port = free_port()
    command: Callable[[Path, int, int], list[str]] = request.param
    with running(command(tmp_path, server.port, port), tmp_path, port):
        yield f"http://127.0.0.1:{port}/h5feed"


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


@pytest.fixture(scope="module")
def guarded(server: ServerProcess, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with a token, which trusts proxies on this machine."""
    return serve_module(server.folder, H5FEED_TRUSTED_PROXIES="127.0.0.1", H5FEED_TOKENS=TOKEN)


@pytest.fixture
def https(guarded: ServerProcess, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The Caddy of the compose file's profile `tls`, and the certificate of the authority that it has made itself."""
    port = free_port()
    text = (ROOT / "deploy/caddy/tls.Caddyfile").read_text().replace("h5feed:8000", f"127.0.0.1:{guarded.port}")
    # Nothing on this machine is to trust its authority.
    text = text.replace("admin off", f"admin off\n\tskip_install_trust\n\thttp_port {free_port()}")
    config = tmp_path / "Caddyfile"
    config.write_text(text)
    with running(caddy_with(config), tmp_path, port, H5FEED_DOMAIN=f"localhost:{port}"):
        root = tmp_path / "caddy/pki/authorities/local/root.crt"
        wait_until(root.exists)
        yield f"https://localhost:{port}", root


def test_training_over_https(server: ServerProcess, https: tuple[str, Path]) -> None:
    """The batches are the same, and pip finds the client."""
    url, root = https
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "seed": 5}
    with (
        h5feed.connect(server.url, deadline=60) as near,
        h5feed.connect(url, token=TOKEN, verify=root, deadline=60) as far,
    ):
        for one, two in zip(near["pictures"].batches(**options), far["pictures"].batches(**options), strict=True):
            np.testing.assert_array_equal(one["images"], two["images"])
    context = ssl.create_default_context(cafile=root)
    with httpx.Client(base_url=url, verify=context, timeout=60) as client:
        line = client.get("/simple/h5feed/requirements.txt").text
        assert f"{url}/simple/h5feed/h5feed-" in line
        assert client.get("/simple").headers["location"] == "/simple/"
        # As it stands in the description of /docs, into an empty environment.
        said = client.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}).json()["info"]["description"]
    command = re.search(r"^pip (install \S+)$", said, re.MULTILINE)
    assert command is not None and f" {url}/" in command[0]
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--cert", str(root)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CA_BUNDLE")}
    done = subprocess.run(
        [*pip, *command[1].split(), "--no-deps", "--target", str(root.parent / "to")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and (root.parent / "to/h5feed/net/proxies.py").exists(), done.stderr


def test_pages_over_https(https: tuple[str, Path], chromium: Browser) -> None:
    """Who signs in gets a cookie that is sent over TLS alone, and sees pages that name the address of Caddy."""
    url, _ = https
    context = chromium.new_context(ignore_https_errors=True)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/datasets/pictures")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("section.code").first).to_contain_text(f"{url}")
    assert page.url == f"{url}/datasets/pictures"
    (cookie,) = context.cookies()
    assert cookie["secure"] and cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert not context.cookies()
    context.close()
    assert all(one.startswith((f"{url}/", "data:")) for one in asked), asked


@pytest.fixture
def mutual(guarded: ServerProcess, tmp_path: Path) -> Iterator[tuple[str, Authority]]:
    """The nginx of the documentation with its lines for https, which lets only those in who have a certificate."""
    authority, port = Authority(tmp_path / "authority"), free_port()
    files = authority.issue("localhost")
    block, lines = blocks_of("nginx")
    for path, file in (
        ("/etc/ssl/feed.pem", files.cert), ("/etc/ssl/feed.key", files.key), ("/etc/ssl/clients.pem", authority.cert)
    ):  # fmt: skip
        assert path in lines
        lines = lines.replace(path, str(file))
    assert "listen 8080;" in block and "listen 8443 ssl;" in lines
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{guarded.port}").replace("listen 8080;", lines)
    command = nginx(tmp_path, block.replace("listen 8443", f"listen {port}"))
    with running(command, tmp_path, port):
        yield f"https://localhost:{port}/h5feed", authority


def test_client_certificates(server: ServerProcess, mutual: tuple[str, Authority], tmp_path: Path) -> None:
    """With one that nginx accepts, the batches are the same; without, and with others, the error says what to pass."""
    url, authority = mutual
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "seed": 5}
    connect = functools.partial(h5feed.connect, url, token=TOKEN, verify=authority.cert, deadline=300)
    files = authority.issue("trainer")
    both = tmp_path / "both.pem"
    both.write_text(files.cert.read_text() + files.key.read_text())
    for cert in (files, both):
        with h5feed.connect(server.url, deadline=60) as near, connect(cert=cert) as far:
            for one, two in zip(near["pictures"].batches(**options), far["pictures"].batches(**options), strict=True):
                np.testing.assert_array_equal(one["images"], two["images"])
    stranger = Authority(tmp_path / "stranger").issue("trainer")
    for wrong in (None, stranger, authority.issue("trainer", days=-1)):
        with connect(cert=wrong) as far, pytest.raises(h5feed.FeedError, match=r"SSL certificate.*cert="):
            far.datasets()
