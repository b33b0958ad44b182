"""Requests through proxies that speak HTTP."""

from __future__ import annotations

import http.client
import re
import socket

from .exchange import Patience, SpeaksTLS, receive_head
from .http import httpx
from .proxies import Proxy


class ProxyFailed(httpx.ProxyError):
    """A proxy does not open a connection to the server; `is_final` says that it will not do so later, either."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


def through(proxy: Proxy, url: httpx.URL, request: bytes) -> bytes:
    """The request as a proxy wants it: with the whole URL as its target."""
    method, _, rest = request.partition(b" ")
    head, _, following = rest.partition(b"\r\n")
    target = b"%b://%b%b" % (url.raw_scheme, url.netloc, head)
    return b"%b %b\r\n%b%b" % (method, target, proxy.authorization, following)


def open_tunnel(connected: socket.socket, proxy: Proxy, host: str, port: int, deadline: float) -> None:
    """Ask a proxy for a connection to the server.

    Raises
    ------
    ProxyFailed
        It refuses, or is no HTTP proxy.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    asked = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n".encode("ascii")
    connected.sendall(b"%b%b\r\n" % (asked, proxy.authorization))
    try:
        received = receive_head(connected, Patience(connected, None, deadline))
    except (http.client.RemoteDisconnected, http.client.IncompleteRead):
        raise
    except http.client.HTTPException as error:
        said = "it speaks TLS" if isinstance(error, SpeaksTLS) else " ".join(str(error).split())
        raise ProxyFailed(f"{proxy.shown} is not an http:// proxy: {said}", is_final=True) from None
    line = received.split(b"\r\n", 1)[0].decode("latin-1")
    match = re.fullmatch(r"HTTP/1\.[01] ([1-9][0-9][0-9])( .*)?", line)
    if match is None or not match[1].startswith("2"):
        raise refused(proxy, int(match[1]) if match else 0, authority, line)


def refused(proxy: Proxy, status: int, authority: str, line: str) -> ProxyFailed:
    """The error for what a proxy says itself."""
    what = f"the proxy {proxy.shown} refuses to connect to {authority}: it returned {line[:100]!r}"
    if status == 407:
        what += (
            ". Its user name or password is wrong"
            if proxy.authorization
            else ". Write user name and password into its URL: http://USER:PASSWORD@HOST:PORT"
        )
    elif status < 500:
        what += ". To connect without it, name the server in NO_PROXY"
    return ProxyFailed(what, is_final=status < 500 and status not in (408, 429))
