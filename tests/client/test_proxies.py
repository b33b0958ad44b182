"""Proxies from the environment, CA files and client certificates."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import h5feed
import pytest
from h5feed.errors import BadParameter, ConnectionFailed
from h5feed.net.proxies import proxy_for

from tests.support.server_process import ServerProcess

NAME = "feed.example"
"""Nobody resolves it: only the proxy knows where it is."""


class _Proxy:
    """A forward proxy that leads all requests to one server, and notes what it was asked."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            received = b""
            while data := client.recv(65536):
                received += data
                while b"\r\n\r\n" in received:
                    head, _, received = received.partition(b"\r\n\r\n")
                    self.heads.append(head)
                    line, _, fields = head.partition(b"\r\n")
                    target = line.replace(f"http://{NAME}:8000".encode(), b"").replace(NAME.encode(), b"")
                    server.sendall(target + b"\r\n" + fields.replace(NAME.encode(), b"127.0.0.1") + b"\r\n\r\n")

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass


@pytest.fixture
def proxy(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Proxy]:
    opened = _Proxy(server.port)
    monkeypatch.setenv("HTTP_PROXY", f"http://ann:p%40ss@127.0.0.1:{opened.port}")
    yield opened
    opened.close()


def test_an_epoch_through_a_proxy(proxy: _Proxy, feed: h5feed.Feed) -> None:
    """Every request has the whole URL and the password, and the rows are the same."""
    with h5feed.connect(f"http://{NAME}:8000", deadline=60) as far:
        rows = [row for batch in far["tall"].batches(batch_size=7, shuffle=True) for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(40))
    password = base64.b64encode(b"ann:p@ss")
    assert proxy.heads
    for head in proxy.heads:
        assert head.startswith(f"GET http://{NAME}:8000/".encode())
        assert b"Proxy-Authorization: Basic " + password in head


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that there is one, and which variable names it; the password stays out of it."""
    monkeypatch.setenv("HTTP_PROXY", "http://ann:secret@127.0.0.1:9")
    with h5feed.connect(f"http://{NAME}:8000", deadline=1) as far, pytest.raises(ConnectionFailed) as raised:
        far["tall"].batch(0, batch_size=2)
    assert "127.0.0.1:9 (HTTP_PROXY)" in str(raised.value) and "secret" not in str(raised.value)


def test_which_servers_are_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_PROXY has names, domains, ports and networks; this machine is never asked through one."""
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "a.example, .b.example, c.example:444, 10.0.0.0/8, fd00::/8")
    for host in ("localhost", "127.0.0.9", "::1", "a.example", "x.a.example", "x.b.example", "10.9.8.7", "fd00::1"):
        assert proxy_for("https", host, 443) is None, host
    for host, port in (("za.example", 443), ("c.example", 443), ("11.0.0.1", 443)):
        found = proxy_for("https", host, port)
        assert found is not None and (found.host, found.port) == ("proxy.example", 3128), host
    assert proxy_for("https", "c.example", 444) is None and proxy_for("http", "za.example", 80) is None
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example:1080")
    with pytest.raises(BadParameter, match="socks5"):
        proxy_for("https", "za.example", 443)


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    """They are named at once."""
    other = tmp_path / "ca.pem"
    other.write_text("no certificate")
    for options in ({"verify": str(other)}, {"cert": str(other)}, {"verify": "nowhere.pem"}, {"cert": "nowhere.pem"}):
        with pytest.raises(BadParameter, match=r"\.pem"):
            h5feed.connect("https://feed.example", **options)  # type: ignore[arg-type]
