"""HTTP as bytes on a socket, for requests that no client library would send."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

SECONDS = 60.0
"""For each step of an exchange, on a machine that is busy with something else."""


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes
    ----------
    headers : dict of str to str
        Names in lower case.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """All that the peer gets to see, as one text."""
        lines = "".join(f"{name}: {value}\n" for name, value in self.headers.items())
        return lines + self.body.decode("utf-8", "replace")

    @property
    def code(self) -> str | None:
        """That of a problem; None where it is none."""
        if self.headers.get("content-type") != "application/problem+json":
            return None
        return str(json.loads(self.body)["code"])


def request(
    target: str | bytes, method: str = "GET", headers: Iterable[tuple[str, str]] = (), body: bytes | None = None
) -> bytes:
    """One request, as it is sent; the target is not encoded."""
    lines = [("Host", "localhost"), *headers]
    if body is not None:
        lines.append(("Content-Length", str(len(body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines).encode("latin-1")
    where = target if isinstance(target, bytes) else target.encode("latin-1")
    return method.encode() + b" " + where + b" HTTP/1.1\r\n" + head + b"\r\n" + (body or b"")


class RawConnection:
    """A connection that is used again, and made anew where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def ask(
        self,
        target: str | bytes,
        method: str = "GET",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
    ) -> Answer:
        """Send a request, and wait for the whole answer."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), SECONDS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # Who is refused early may not be able to send all of it, and is answered all the same.
            self._socket.sendall(request(target, method, headers, body))
        response = http.client.HTTPResponse(self._socket, method=method)
        with response:
            response.begin()
            content = response.read()
            lines = {name.lower(): value for name, value in response.getheaders()}
            if response.will_close:
                self.close()
        return Answer(response.status, lines, content)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def exchanged(port: int, *pieces: bytes, waits: bool = True) -> bytes:
    """All that comes back until the server ends the connection; nothing is waited for unless `waits`."""
    received = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), SECONDS) as connected:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connected.sendall(piece)
        while waits and (more := connected.recv(1 << 16)):
            received += more
    return received


def statuses(received: bytes) -> list[int]:
    """Of all answers in what was received."""
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, re.MULTILINE)]
