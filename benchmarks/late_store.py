"""An object store that answers late: S3's listing and ranges of the files of a folder, each answer after a while.

It stands for a store that is far away and has processors of its own, so it takes as little of ours as it can: one
thread, which sends what is in the page cache. It serves one bucket, ``data``, to everybody.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

BUCKET = "data"

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)

_SEND_BYTES = 4 << 20
"""Send buffers take a whole answer, so that it leaves with one system call."""

_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class _Objects:
    """The files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.content: dict[str, memoryview] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.content[path.relative_to(folder).as_posix()] = memoryview(mapped)

    def e_tag(self, key: str) -> str:
        return f'"{len(self.content[key]):x}"'

    def listing(self) -> bytes:
        """The answer to ListObjectsV2."""
        lines = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{self.e_tag(key)}"
            f"</ETag><Size>{len(content)}</Size></Contents>"
            for key, content in self.content.items()
        )
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{BUCKET}</Name><Prefix></Prefix><KeyCount>'
            f"{len(self.content)}</KeyCount><IsTruncated>false</IsTruncated>{lines}</ListBucketResult>"
        ).encode()


class _Connection(asyncio.Protocol):
    """Answers one request after the other."""

    def __init__(self, objects: _Objects, latency: float) -> None:
        self._objects = objects
        self._latency = latency
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        own: socket.socket = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            request, self._received = self._received[: end + 2], self._received[end + 4 :]
            asyncio.get_running_loop().call_later(self._latency, self._answer, request)

    def _answer(self, request: bytes) -> None:
        method, target, _ = request.split(b"\r\n", 1)[0].decode().split(" ")
        _, bucket, *rest = urlsplit(target).path.split("/", 2)
        key = unquote(rest[0]) if rest else ""
        if bucket != BUCKET or (key and key not in self._objects.content):
            self._send(b"404 Not Found", {}, b"", 0)
        elif not key:
            listing = self._objects.listing()
            self._send(b"200 OK", {"content-type": "application/xml"}, listing, len(listing))
        else:
            content = self._objects.content[key]
            headers = {"etag": self._objects.e_tag(key), "last-modified": _DATE, "accept-ranges": "bytes"}
            status, begin, end = b"200 OK", 0, len(content)
            if (match := _RANGE.search(request)) is not None:
                status = b"206 Partial Content"
                begin, end = int(match[1]), min(len(content), int(match[2]) + 1)
                headers["content-range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            body = b"" if method == "HEAD" else content[begin:end]
            self._send(status, headers, body, end - begin)

    def _send(self, status: bytes, headers: dict[str, str], body: bytes | memoryview, length: int) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, "content-length": length}.items())
        self._transport.writelines([b"HTTP/1.1 " + status + b"\r\n" + lines.encode() + b"\r\n", body])


async def _serve(folder: Path, latency: float) -> None:
    objects = _Objects(folder)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(objects, latency), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed; prints the port."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.late_store")
    parser.add_argument("folder", type=Path)
    parser.add_argument("latency", type=float, help="seconds before each answer")
    options = parser.parse_args(argv)
    asyncio.run(_serve(options.folder, options.latency))
    return 0


if __name__ == "__main__":
    sys.exit(main())
