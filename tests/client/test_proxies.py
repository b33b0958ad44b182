"""Proxies from the environment: for http and https servers, with a password, and those that refuse or hang."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter, ConnectionFailed
from h5feed.net.proxies import proxy_for

from tests.support.authority import Authority
from tests.support.listener import Listener
from tests.support.proxies import ForwardProxy, ReverseProxy
from tests.support.server_process import ServerProcess

NAME = "feed.example"
"""Nobody resolves it: only the proxy knows where it is."""

HTTP, HTTPS = f"{NAME}:8000", f"{NAME}:443"

TOKEN, PASSWORD = "a-token-of-a-test", "p@ss wörd"

CREDENTIALS = base64.b64encode(f"ann:{PASSWORD}".encode())

ORDER = {"batch_size": 7, "shuffle": True, "seed": 3}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def servers(
    authority: Authority, folder: Path, serve_module: Callable[..., ServerProcess]
) -> tuple[ServerProcess, ServerProcess]:
    """The same data over http and over https, for whoever has the token."""
    files = authority.issue(NAME)
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    return serve_module(folder, H5FEED_TOKENS=TOKEN), serve_module(folder, *tls, H5FEED_TOKENS=TOKEN)


@pytest.fixture
def proxy(servers: tuple[ServerProcess, ServerProcess]) -> Iterator[ForwardProxy]:
    opened = ForwardProxy({HTTP: servers[0].port, HTTPS: servers[1].port})
    yield opened
    opened.close()


def _url(proxy: ForwardProxy, user: str = "ann:p%40ss%20w%C3%B6rd@") -> str:
    return f"http://{user}127.0.0.1:{proxy.port}"


def _is_alike(one: h5feed.Feed, other: h5feed.Feed) -> None:
    """An epoch has the same batches."""
    rows = []
    for near, far in zip(one["tall"].batches(**ORDER), other["tall"].batches(**ORDER), strict=True):  # type: ignore[arg-type]
        rows += far.rows.tolist()
        for name in near:
            np.testing.assert_array_equal(near[name], far[name])
    assert sorted(rows) == list(range(40))


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_an_epoch_through_a_proxy(
    proxy: ForwardProxy, feed: h5feed.Feed, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Every request has the whole URL and the password, and the rows are the same; so is what is posted."""
    monkeypatch.setenv(variable, _url(proxy))
    with h5feed.connect(f"http://{HTTP}", token=TOKEN, deadline=60) as far:
        _is_alike(feed, far)
        np.testing.assert_array_equal(far["tall"].take([5, 3]).rows, [5, 3])
    assert proxy.heads and not proxy.tunnels
    for head in proxy.heads:
        assert head.partition(b" ")[2].startswith(f"http://{HTTP}/".encode())
        assert b"Proxy-Authorization: Basic " + CREDENTIALS in head.split(b"\r\n")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_an_epoch_through_a_tunnel(
    proxy: ForwardProxy, feed: h5feed.Feed, authority: Authority, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A server on https: the proxy is asked for a connection and sees nothing else; connections are used again."""
    monkeypatch.setenv(variable, _url(proxy))
    with h5feed.connect(f"https://{NAME}", token=TOKEN, verify=authority.cert, deadline=60) as far:
        _is_alike(feed, far)
        opened = len(proxy.tunnels)
        for index in range(10):
            far["tall"].batch(index % 4, batch_size=7)
        assert len(proxy.tunnels) == opened
    assert set(proxy.tunnels) == {HTTPS} and len(proxy.heads) == len(proxy.tunnels)
    for head in proxy.heads:
        lines = head.split(b"\r\n")
        assert lines[:2] == [f"CONNECT {HTTPS} HTTP/1.1".encode(), f"Host: {HTTPS}".encode()]
        assert lines[2:] == [b"Proxy-Authorization: Basic " + CREDENTIALS]


def test_the_password_is_for_the_proxy_alone(
    servers: tuple[ServerProcess, ServerProcess], authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server behind a tunnel is sent the token, and nothing that is meant for the proxy; the proxy no token."""
    behind = ReverseProxy(servers[0].port, authority.issue(NAME).context())
    proxy = ForwardProxy({HTTPS: behind.port})
    monkeypatch.setenv("HTTPS_PROXY", _url(proxy))
    with h5feed.connect(f"https://{NAME}", token=TOKEN, verify=authority.cert, deadline=60) as far:
        assert len(far["tall"].batch(0, batch_size=7).rows) == 7
    proxy.close()
    behind.close()
    assert behind.heads and proxy.heads
    for head in behind.heads:
        assert b"proxy-" not in head.lower() and CREDENTIALS not in head and TOKEN.encode() in head
    assert not any(TOKEN.encode() in head for head in proxy.heads)


def test_upper_and_lower_case(
    proxy: ForwardProxy, servers: tuple[ServerProcess, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower case comes first, and turns a variable off where it is empty; that of the scheme comes before ALL_PROXY."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", _url(proxy, ""))
    with h5feed.connect(f"http://{HTTP}", token=TOKEN, deadline=60) as far:
        assert len(far["tall"].batch(0, batch_size=7).rows) == 7
    assert proxy.heads and not any(b"proxy-authorization" in head.lower() for head in proxy.heads)
    monkeypatch.setenv("ALL_PROXY", "")
    monkeypatch.setenv("http_proxy", "")
    assert proxy_for("http", NAME, 8000) is None
    monkeypatch.setenv("http_proxy", _url(proxy))
    monkeypatch.setenv("NO_PROXY", f"other.example,{NAME}:8000")
    assert proxy_for("http", NAME, 8000) is None and proxy_for("http", NAME, 8001) is not None
    monkeypatch.setenv("no_proxy", "other.example")
    assert proxy_for("http", NAME, 8000) is not None


REFUSALS = {
    "a password is needed": (b"407 Proxy Authentication Required", "", "USER:PASSWORD@HOST:PORT"),
    "a wrong password": (b"407 Proxy Authentication Required", "ann:secret@", "user name or password is wrong"),
    "forbidden": (b"403 Forbidden", "ann:secret@", "NO_PROXY"),
}


@pytest.mark.parametrize(("status", "user", "hint"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses(
    proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, scheme: str, status: bytes, user: str, hint: str
) -> None:
    """It is said at once, with its name and what to do, and without the password."""
    proxy.refusal = b"HTTP/1.1 " + status + b"\r\nContent-Length: 13\r\nContent-Type: text/html\r\n\r\n<b>Denied</b>"
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", _url(proxy, user))
    began = time.monotonic()
    with (
        h5feed.connect(f"{scheme}://{HTTP if scheme == 'http' else NAME}", deadline=300) as far,
        pytest.raises(Exception, match=f"127.0.0.1:{proxy.port} .{scheme.upper()}_PROXY.") as raised,
    ):
        far.datasets()
    assert isinstance(raised.value, h5feed.FeedError) and time.monotonic() - began < 60
    said = str(raised.value)
    assert status[:3].decode() in said and "secret" not in said and said.isprintable()
    if scheme == "https" or status.startswith(b"407"):
        assert type(raised.value) is ConnectionFailed and hint in said
    else:
        assert "Denied" in said


def test_a_proxy_that_cannot_reach_the_server(
    proxy: ForwardProxy, feed: h5feed.Feed, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """502 may be over in a moment: asked again, until the deadline."""
    proxy.refusal = b"HTTP/1.1 502 Bad Gateway\r\n\r\n"
    monkeypatch.setenv("HTTPS_PROXY", _url(proxy))
    with h5feed.connect(f"https://{NAME}", token=TOKEN, verify=authority.cert, deadline=1) as far:
        with pytest.raises(ConnectionFailed, match="502 Bad Gateway"):
            far.datasets()
        assert len(proxy.heads) > 1
        proxy.refusal = b""
        assert len(far["tall"].batch(0, batch_size=7).rows) == 7


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_hangs(proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """It is given up when the deadline has passed, and named."""
    proxy.is_silent = True
    monkeypatch.setenv("ALL_PROXY", _url(proxy, "ann:secret@"))
    url = f"{scheme}://{HTTP if scheme == 'http' else NAME}"
    with h5feed.connect(url, deadline=1) as far, pytest.raises(ConnectionFailed) as raised:
        far.datasets()
    said = str(raised.value)
    assert f"through the proxy 127.0.0.1:{proxy.port} (ALL_PROXY)" in said and "secret" not in said


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\x15\x03\x01\x00\x02\x02\x46"], ids=["SSH", "TLS"])
def test_what_is_no_proxy(monkeypatch: pytest.MonkeyPatch, greeting: bytes) -> None:
    """The message is about the proxy, not about the server."""

    def greet(client: socket.socket) -> None:
        client.recv(1 << 16)
        client.sendall(greeting)

    listener = Listener(greet)
    monkeypatch.setenv("HTTPS_PROXY", f"ann:secret@127.0.0.1:{listener.port}")
    with h5feed.connect(f"https://{NAME}", deadline=300) as far, pytest.raises(ConnectionFailed) as raised:
        far.datasets()
    listener.close()
    assert f"127.0.0.1:{listener.port} (HTTPS_PROXY) is not an http:// proxy: it" in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["socks5://ann:secret@p:1", "http://ann:secret@:3128", "http://ann:secret@p:x", "http://ann:secret@[p:1"]
)
def test_what_is_no_url_of_a_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It is said before anything is sent, without the password."""
    monkeypatch.setenv("HTTPS_PROXY", url)
    with (
        h5feed.connect(f"https://{NAME}", deadline=60) as far,
        pytest.raises(BadParameter, match="HTTPS_PROXY") as raised,
    ):
        far.datasets()
    assert "secret" not in str(raised.value)


def test_the_command_line(
    proxy: ForwardProxy, servers: tuple[ServerProcess, ServerProcess], authority: Authority
) -> None:
    """`h5feed ls` uses the same variables; where the proxy is not there, it says so."""
    command = [sys.executable, "-m", "h5feed.cli", "ls", "--json", f"https://{NAME}"]
    environment = {
        **os.environ,
        "HTTPS_PROXY": _url(proxy),
        "SSL_CERT_FILE": str(authority.cert),
        "H5FEED_TOKEN": TOKEN,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "tall" in json.dumps(json.loads(done.stdout)) and set(proxy.tunnels) == {HTTPS}
    environment["HTTPS_PROXY"] = "http://ann:secret@127.0.0.1:9"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "127.0.0.1:9 (HTTPS_PROXY)" in done.stderr and "secret" not in done.stderr


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that there is one, and which variable names it; the password stays out of it."""
    monkeypatch.setenv("HTTP_PROXY", "http://ann:secret@127.0.0.1:9")
    with h5feed.connect(f"http://{NAME}:8000", deadline=1) as far, pytest.raises(ConnectionFailed) as raised:
        far["tall"].batch(0, batch_size=2)
    assert "127.0.0.1:9 (HTTP_PROXY)" in str(raised.value) and "secret" not in str(raised.value)


def test_which_servers_are_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_PROXY has names, domains, ports and networks; this machine is never asked through one."""
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
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
