"""One request over a connected socket: sends it, and reads the response, a large body into recycled buffers."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool
from .cancellation import Cancellation
from .http import httpx
from .trace import TRANSFER, enter

BODY = "h5feed.body"
"""Response extension: the body, a (content-length,) uint8 array from the pool."""

MAX_PLAIN_BYTES = 64 << 20
"""Maximum size of a body that is read without a pool (metadata, row ids, errors), in bytes."""

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of the status line and headers, in bytes."""

_LENGTH_DIGITS = 18
"""Maximum number of digits of a Content-Length: fits into an int64."""

_HTTP = b"HTTP/"
"""The first bytes of every HTTP response."""

_TLS = (b"\x15\x03", b"\x16\x03")
"""The first bytes of a TLS alert or handshake."""

HEAD_READ = 16 << 10
"""Bytes per read until the head is complete. Body bytes read along with it are copied."""

Timeouts = Mapping[str, float | None]
"""Timeouts ``connect``, ``write`` and ``read`` in seconds, as in httpx."""


class BodyCut(httpx.RemoteProtocolError):
    """The connection ended in the middle of a body that was being read into a buffer.

    ``received`` is what arrived, a (n,) uint8 array. It may contain complete batches.
    """

    def __init__(self, message: str, received: npt.NDArray[np.uint8]) -> None:
        super().__init__(message)
        self.received = received


class SpeaksTLS(http.client.HTTPException):
    """What should be HTTP is TLS."""


class Places(Protocol):
    """Where a body goes that is to be divided while it arrives."""

    def places(self, length: int) -> Iterator[npt.NDArray[np.uint8]]:
        """The buffers for a body of `length` bytes, one after the other; each is filled when the next is asked for.

        Called again if the request is repeated.
        """


@dataclass(frozen=True)
class Answer:
    """A complete response.

    Attributes
    ----------
    status : int
    headers : list of (str, str)
    body : (content-length,) uint8 or None
        The body of a successful response that was read into a pool; `content` is then empty. Empty if it went to
        `Places`.
    content : bytes
    """

    status: int
    headers: list[tuple[str, str]]
    body: npt.NDArray[np.uint8] | None
    content: bytes

    def header(self, name: str) -> str | None:
        """Value of a header; `name` is in lower case."""
        return next((value for known, value in self.headers if known.lower() == name), None)

    def as_response(self) -> httpx.Response:
        """The same as an httpx response."""
        # The body has already been read. httpx must not decompress it either: we never request compression, and a small
        # body could expand to any size.
        headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in self.headers
            if name.lower() not in ("transfer-encoding", "content-encoding")
        ]
        extensions: dict[str, Any] = {"http_version": b"HTTP/1.1"}
        if self.body is not None:
            extensions[BODY] = self.body
        return httpx.Response(self.status, headers=headers, content=self.content, extensions=extensions)


@dataclass(frozen=True)
class Call:
    """A complete request and the limits of its response."""

    request: bytes
    method: str
    pool: BufferPool | Places | None
    max_bytes: int
    timeouts: Timeouts
    deadline: float
    cancelled: Cancellation | None


def ask(connected: socket.socket, call: Call) -> tuple[Answer, bool]:
    """The response to one request, and whether the connection can be reused."""
    patience = Patience(connected, call.timeouts.get("write"), call.deadline)
    unsent = memoryview(call.request)
    while unsent:
        patience.extend()
        unsent = unsent[connected.send(unsent) :]
    patience = Patience(connected, call.timeouts.get("read"), call.deadline)
    received = receive_head(connected, patience)
    if call.cancelled is not None:
        call.cancelled.heard()
    while received[9:10] == b"1" and received[9:12] != b"101":
        # An interim response, such as 103 Early Hints: the final one follows.
        received = receive_head(connected, patience, received[received.index(b"\r\n\r\n") + 4 :])
    enter(TRANSFER)
    usual = parse_usual(received)
    if usual is None or call.method == "HEAD":
        return _read_unusual(connected, received, call.method, patience)
    status, headers, begin, length, keep = usual
    if call.pool is not None and status == 200:
        _check_length(length, call.max_bytes)
        if isinstance(call.pool, BufferPool):
            # If the caller collects batches in a list, all buffers are in use: new memory works too, only slower.
            body = call.pool.lease_or_new(length)
            _receive_into(connected, body, received[begin:], patience)
        else:
            body, begun = np.empty(0, np.uint8), received[begin:]
            for place in call.pool.places(length):
                _receive_into(connected, place, begun, patience)
                begun = begun[len(place) :]
        answer = Answer(status, headers, body, b"")
    else:
        _check_length(length, MAX_PLAIN_BYTES)
        content = np.empty(length, np.uint8)
        _receive_into(connected, content, received[begin:], patience)
        answer = Answer(status, headers, None, content.tobytes())
    # After unexpected bytes behind the body, the connection cannot be trusted.
    return answer, keep and len(received) <= begin + length


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise http.client.HTTPException(f"it announces {length} bytes, expected at most {most}")


class Patience:
    """Limits each socket operation to a timeout, and all of them to the deadline."""

    def __init__(self, connected: socket.socket, timeout: float | None, deadline: float) -> None:
        self._socket = connected
        self._timeout = 1e9 if timeout is None else timeout
        self._deadline = deadline

    def extend(self, *, in_kernel: bool = False) -> float:
        """Call before every operation; returns the `time.monotonic()` until which it need not be called again.

        With `in_kernel` the kernel enforces the timeout, which then raises `BlockingIOError`.
        """
        now = time.monotonic()
        remaining = self._deadline - now
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        allowed = min(self._timeout, remaining)
        if in_kernel:
            self._socket.settimeout(None)
            # struct timeval; zero would mean no timeout.
            allowed = max(allowed, 1e-3)
            timeval = struct.pack("@ll", int(allowed), int(allowed % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        else:
            self._socket.settimeout(allowed)
        return max(now, self._deadline - self._timeout)


def receive_head(connected: socket.socket, patience: Patience, received: bytes = b"") -> bytes:
    """Read until the head is complete; returns it with any body bytes read along. Starts with `received`."""
    while True:
        if received[: len(_HTTP)] != _HTTP[: len(received)]:
            if received[:2] in _TLS:
                raise SpeaksTLS("it speaks TLS: use a URL that starts with https://")
            raise http.client.HTTPException(f"it does not speak HTTP, but sent {received[:20]!r}")
        if b"\r\n\r\n" in received:
            return received
        if len(received) > MAX_HEAD_BYTES:
            raise http.client.HTTPException(f"its headers are longer than {MAX_HEAD_BYTES} bytes")
        patience.extend()
        more = connected.recv(HEAD_READ)
        if not more:
            if not received:
                raise http.client.RemoteDisconnected("the connection was closed without a response")
            raise http.client.IncompleteRead(received)
        received += more


def parse_usual(received: bytes) -> tuple[int, list[tuple[str, str]], int, int, bool] | None:
    """Status, headers, start of the body, its length, and whether the connection stays open; None for a response
    without a Content-Length, which is left to http.client."""
    end = received.index(b"\r\n\r\n")
    status_line, *lines = received[:end].decode("latin-1").split("\r\n")
    if not status_line.startswith("HTTP/1.1 ") or not status_line[9:12].isdecimal():
        return None
    status = int(status_line[9:12])
    headers = []
    length: str | None = None
    keep = True
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip()
        if not colon or name != name.strip():
            return None
        lower = name.lower()
        if lower == "content-length":
            if length not in (None, value) or not (value.isascii() and value.isdigit()) or len(value) > _LENGTH_DIGITS:
                raise http.client.HTTPException(f"it announces {value[:40]!r} bytes")
            length = value
        elif lower == "transfer-encoding":
            return None
        elif lower == "connection":
            keep = "close" not in value.lower()
        headers.append((name, value))
    if length is None or status < 200 or status in (204, 304):
        return None
    return status, headers, end + 4, int(length), keep


def _receive_into(connected: socket.socket, buffer: npt.NDArray[np.uint8], begun: bytes, patience: Patience) -> None:
    """Fill `buffer` with the `begun` bytes of a body and those that follow."""
    length = len(buffer)
    view = memoryview(buffer)
    done = min(len(begun), length)
    view[:done] = begun[:done]
    # If possible, the kernel waits for the whole body: each return to Python would have to wait for the GIL, which a
    # busy training loop holds for milliseconds. Not in the main thread, where signals would restart the wait.
    whole = (
        sys.platform == "linux"
        and not isinstance(connected, ssl.SSLSocket)
        and threading.current_thread() is not threading.main_thread()
    )
    until = 0.0
    while done < length:
        if time.monotonic() > until:
            until = patience.extend(in_kernel=whole)
        try:
            received = connected.recv_into(view[done:], 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        except ConnectionError:
            received = 0
        if not received:
            raise BodyCut(f"the connection was closed after {done} of {length} bytes", buffer[:done])
        done += received


class _Rest(io.RawIOBase):
    """A socket as a file that starts with the bytes already received."""

    def __init__(self, connected: socket.socket, received: bytes, patience: Patience) -> None:
        self._socket = connected
        self._received = received
        self._patience = patience

    def makefile(self, mode: str) -> io.BufferedReader:
        """The part of the socket interface that http.client uses."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if self._received:
            count = min(len(target), len(self._received))
            target[:count] = self._received[:count]
            self._received = self._received[count:]
            return count
        self._patience.extend()
        return self._socket.recv_into(target)


def _read_unusual(connected: socket.socket, received: bytes, method: str, patience: Patience) -> tuple[Answer, bool]:
    """A response without a length or without a body, and whether the connection can be reused."""
    rest: Any = _Rest(connected, received, patience)
    answer = http.client.HTTPResponse(rest, method=method)
    answer.begin()
    _check_length(answer.length or 0, MAX_PLAIN_BYTES)
    content = b"".join(_chunks(answer))
    # http.client closes the file, not the socket.
    return Answer(answer.status, answer.getheaders(), None, content), not answer.will_close


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    total = 0
    while chunk := answer.read1(1 << 16):
        total += len(chunk)
        _check_length(total, MAX_PLAIN_BYTES)
        yield chunk
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
