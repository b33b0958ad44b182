"""Proxies of both kinds: one that clients are told to use, and one that stands before a server."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from .listener import SECONDS, Listener, hand_on


class ForwardProxy:
    """An HTTP proxy, which leads names to ports of this machine.

    Parameters
    ----------
    ports : mapping of str to int
        Of each ``NAME:PORT`` that it is asked for, the port on the loopback.

    Attributes
    ----------
    refusal : bytes
        What it returns instead of a connection; empty for none.
    is_silent : bool
        Whether it never answers.
    tunnels : list of str
        The ``NAME:PORT`` of each CONNECT.
    heads : list of bytes
        Heads of all requests that it was sent.
    port : int
    """

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = ports
        self.refusal = b""
        self.is_silent = False
        self.tunnels: list[str] = []
        self.heads: list[bytes] = []
        self._over = threading.Event()
        self._listener = Listener(self._serve)
        self.port = self._listener.port

    def close(self) -> None:
        self._over.set()
        self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as stream, contextlib.ExitStack() as connections:
            servers: dict[str, socket.socket] = {}
            for head, body in _requests(stream):
                self.heads.append(head)
                if self.is_silent:
                    self._over.wait(SECONDS)
                    return
                if self.refusal:
                    client.sendall(self.refusal)
                    return
                method, target, *_ = head.split(b"\r\n", 1)[0].decode().split(" ")
                if method == "CONNECT":
                    self.tunnels.append(target)
                    server = connections.enter_context(self._connected(target))
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    _join(client, server)
                    return
                host = urlsplit(target).netloc
                if host not in servers:
                    servers[host] = connections.enter_context(self._connected(host))
                    threading.Thread(target=hand_on, args=(servers[host], client), daemon=True).start()
                servers[host].sendall(_without(head, "proxy-authorization").replace(f"http://{host}".encode(), b"", 1))
                servers[host].sendall(b"\r\n\r\n" + body)

    def _connected(self, host: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._ports[host]), SECONDS)


class ReverseProxy:
    """A proxy before a server, which ends TLS if it has a context for it.

    Parameters
    ----------
    port : int
        Of the server.
    context : ssl.SSLContext, optional
        With the certificate that it shows.
    headers : mapping of str to str
        That it adds to each request.

    Attributes
    ----------
    heads : list of bytes
        Heads of all requests, as they came.
    handshakes : int
        Connections on which TLS was agreed on.
    port : int
    """

    def __init__(
        self, port: int, context: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._port, self._context = port, context
        self._more = "".join(f"\r\n{name}: {value}" for name, value in (headers or {}).items()).encode()
        self.heads: list[bytes] = []
        self.handshakes = 0
        self._listener = Listener(self._serve)
        self.port = self._listener.port

    def close(self) -> None:
        self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(SECONDS)
        with contextlib.suppress(OSError):
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
                self.handshakes += 1
            with client, socket.create_connection(("127.0.0.1", self._port), SECONDS) as server:
                threading.Thread(target=hand_on, args=(server, client), daemon=True).start()
                with client.makefile("rb") as stream:
                    for head, body in _requests(stream):
                        self.heads.append(head)
                        server.sendall(head + self._more + b"\r\n\r\n" + body)


def _requests(stream: io.BufferedIOBase | io.BufferedReader) -> Iterator[tuple[bytes, bytes]]:
    """Head, without the empty line at its end, and body of each request."""
    while True:
        lines = []
        while line := stream.readline().rstrip(b"\r\n"):
            lines.append(line)
        if not lines:
            return
        lengths = [line.partition(b":")[2] for line in lines if line.lower().startswith(b"content-length:")]
        yield b"\r\n".join(lines), stream.read(int(lengths[0])) if lengths else b""


def _without(head: bytes, name: str) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(f"{name}:".encode()))


def _join(one: socket.socket, other: socket.socket) -> None:
    """Hand on in both directions until both have ended."""
    back = threading.Thread(target=hand_on, args=(other, one), daemon=True)
    back.start()
    hand_on(one, other)
    back.join(SECONDS)
