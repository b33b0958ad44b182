"""Servers that answer wrongly: each wrong thing is `BadAnswer`, at once, and before any memory is taken for it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadAnswer, ConnectionFailed
from h5feed.net.client import Client

from tests.support.listener import Listener
from tests.support.server_process import ServerProcess

ROWS, BATCH = 100, 16

MOST_BYTES = 200 << 20
"""What one wrong answer may take of memory, its own bytes included."""

DEADLINE = 60.0
"""Seconds; whoever waits for it is not told what is wrong."""


@dataclass
class Reply:
    """An answer of the real server, to be spoilt."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        """What was asked for: ``datasets``, ``d``, ``plan``, ``batches``, ``0``, ``rows``, ``stats`` …"""
        return self.path.partition("?")[0].rsplit("/", 1)[-1]

    def raw(self) -> bytes:
        headers = {"content-length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value != "")
        return f"HTTP/1.1 {self.status} Said\r\n{lines}\r\n".encode("latin-1") + self.body


Spoil = Callable[[Reply], Reply | bytes]


class SpoilingProxy:
    """Hands requests on to a real server, and its answers back as `spoil` makes them."""

    def __init__(self, url: str) -> None:
        self.spoil: Spoil = lambda reply: reply
        self._upstream = httpx.Client(base_url=url, timeout=60)
        self._listener = Listener(self._serve)
        self.url = self._listener.url

    def _serve(self, connected: socket.socket) -> None:
        with connected.makefile("rb") as stream:
            first = stream.readline()
            if not first.startswith((b"GET", b"POST")):
                return  # whether this speaks TLS
            method, path, _ = first.decode().split(" ")
            headers = {}
            while (line := stream.readline().decode().strip()) != "":
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            content = stream.read(int(headers.get("content-length", 0)))
            kept = {name: value for name, value in headers.items() if name in ("accept", "content-type")}
            answer = self._upstream.request(method, path, content=content, headers=kept)
            reply = Reply(path, answer.status_code, {"content-type": answer.headers["content-type"]}, answer.content)
            try:
                assert answer.status_code < 300, answer.text
                spoilt = self.spoil(reply)
            except Exception as error:
                # The test's own fault: said at once, as what is no `BadAnswer`.
                said = json.dumps({"code": "internal_error", "detail": repr(error)}).encode()
                spoilt = Reply(path, 500, {}, said)
            connected.sendall(spoilt if isinstance(spoilt, bytes) else spoilt.raw())

    def close(self) -> None:
        self._listener.close()
        self._upstream.close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpoilingProxy]:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "d.h5", "w") as file:
        file["x"] = np.arange(ROWS * 12, dtype=np.float32).reshape(ROWS, 4, 3)
        file["images"] = np.zeros((ROWS, 8, 8, 3), np.uint8)
        file["y"] = np.arange(ROWS) % 4
        file["text"] = np.array([b"a", b"bcd"] * (ROWS // 2))
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "1")
    spoiling = SpoilingProxy(server.url)
    yield spoiling
    spoiling.close()
    server.stop()


def _of(kind: str, change: Callable[[Reply], Reply | bytes]) -> Spoil:
    """Spoil the answers to one kind of request."""
    return lambda reply: change(reply) if reply.kind == kind else reply


def _says(kind: str, body: bytes, status: int | None = None) -> Spoil:
    """Another body."""
    return _of(kind, lambda reply: Reply(reply.path, status or reply.status, reply.headers, body))


def _announces(kind: str, length: str) -> Spoil:
    return _of(kind, lambda reply: Reply(reply.path, reply.status, {**reply.headers, "content-length": length}, b"x"))


def _with(kind: str, place: str, value: Any) -> Spoil:
    """JSON with another value at a place such as ``fields.x.shape``; without it, where the value is `_GONE`."""

    def change(reply: Reply) -> Reply:
        answer = json.loads(reply.body)
        *above, last = place.split(".")
        inner = answer
        for key in above:
            inner = inner[key] if isinstance(inner, dict) else next(item for item in inner if item["name"] == key)
        if value is _GONE:
            del inner[last]
        else:
            inner[last] = value
        return Reply(reply.path, reply.status, reply.headers, json.dumps(answer).encode())

    return _of(kind, change)


_GONE = object()


def _framed(kind: str, change: Callable[[dict[str, Any], bytes], bytes | None]) -> Spoil:
    """A body of which the header says something else; `change` may return other data."""

    def spoil(reply: Reply) -> Reply:
        (length,) = struct.unpack_from("<Q", reply.body)
        header, data = json.loads(reply.body[8 : 8 + length]), reply.body[8 + length :]
        data = change(header, data) or data
        text = json.dumps(header, separators=(",", ":")).encode()
        return Reply(reply.path, reply.status, reply.headers, struct.pack("<Q", len(text)) + text + data)

    return _of(kind, spoil)


def _entry(kind: str, name: str, **changes: Any) -> Spoil:
    """A body whose header says something else of one tensor."""

    def change(header: dict[str, Any], data: bytes) -> None:
        header[name].update(changes)

    return _framed(kind, change)


def _first_batch(feed: h5feed.Feed) -> Any:
    return feed["d"].batch(0, batch_size=BATCH, fields=["x", "y", "text"])


def _epoch(feed: h5feed.Feed) -> Any:
    return list(feed["d"].batches(batch_size=BATCH, fields=["x", "y"]))


def _padded_epoch(feed: h5feed.Feed) -> Any:
    return list(feed["d"].batches(batch_size=BATCH, fields=["x", "y"], last="pad"))


def _rows(feed: h5feed.Feed) -> Any:
    return feed["d"].take([3, 1], fields=["x"])


def _of_split(feed: h5feed.Feed) -> Any:
    return feed["d"].split_rows("train", val=0.5)


ASKS: dict[str, Callable[[h5feed.Feed], Any]] = {
    "datasets": lambda feed: feed.datasets(),
    "d": lambda feed: feed["d"],
    "plan": lambda feed: feed["d"].plan(batch_size=BATCH, fields=["x", "y"]),
    "0": _first_batch,
    "batches": _epoch,
    "padded": _padded_epoch,
    "rows": _rows,
    "split": _of_split,
    "splits": lambda feed: feed["d"].splits(val=0.5),
    "stats": lambda feed: feed["d"].stats(),
    "mean-image": lambda feed: feed["d"].mean_image("images"),
}
"""What a user asks for, by the last part of the address that answers it; `padded` and `split` are of ``batches`` and
``rows``."""

JSON_KINDS = ("datasets", "d", "plan", "splits", "stats")
BODY_KINDS = ("0", "batches", "rows", "split", "mean-image")
OF = {"padded": "batches", "split": "rows"}

LENGTHS = (str(200 << 30), str(10**15), str(10**30), "9" * 5000, "-5", "1e3", "0x10", "5, 6", "\u00b2")

ENTRY = b'{"name": "d", "status": "ok", "reason": null, "revision": "r", "rows": 1, "fields": []}'

DEEP = b"[" * 100_000 + b"]" * 100_000
MANY = b"[" + b"[]," * 5_000_000 + b"[]]"
JSONS = {
    "empty": b"",
    "page": b"<html>It works!</html>",
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "number": b"17",
    "text": b'"text"',
    "deep": DEEP,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "many": MANY,
    "digits": b"9" * 5000,
    "no utf-8": b'"\xff\xfe"',
    "half": b'{"datasets": [',
}

CASES: list[tuple[str, str, Spoil]] = [
    *((f"length {length[:12]!r} of {kind}", kind, _announces(OF.get(kind, kind), length))
      for kind in ("d", "0", "batches", "rows", "split", "mean-image") for length in LENGTHS),
    *((f"{name} as {kind}", kind, _says(kind, text)) for kind in JSON_KINDS for name, text in JSONS.items()),
    *((f"{name} as 202 of {kind}", kind, _says(OF.get(kind, kind), JSONS[name], 202))
      for kind in (*JSON_KINDS, *BODY_KINDS) for name in ("empty", "list", "object", "null", "deep")),
    *((f"job of {kind}", kind, _says(OF.get(kind, kind), b'{"job":"a","done":0,"total":1}', 202))
      for kind in ("datasets", "d", "plan", "0", "batches")),
    ("job of a count that is text", "stats", _says("stats", b'{"job":"a","done":"x","total":1}', 202)),
    ("job of endless digits", "stats", _says("stats", b'{"job":"a","done":' + b"9" * 4000 + b',"total":1}', 202)),
    *((f"error {name}", "d", _says("d", text, 400)) for name, text in JSONS.items()),
    ("error whose sentence is an object", "d", _says("d", b'{"code":{"a":[]},"detail":{"x":1},"title":7}', 400)),
    *((f"status {status}", kind, _says(OF.get(kind, kind), b"", status))
      for status in (201, 204, 206, 302, 304, 418, 500, 999) for kind in ("d", "0")),
    ("SSH", "d", _of("d", lambda reply: b"SSH-2.0-OpenSSH_9.6\r\n")),
    ("TLS alert", "0", _of("0", lambda reply: b"\x15\x03\x01\x00\x02\x02\x46")),
    ("odd status", "d", _of("d", lambda reply: b"HTTP/1.1 \xb2\xb3\xb9 Odd\r\ncontent-length: 0\r\n\r\n")),
    ("endless head", "d", _of("d", lambda reply: b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000)),
    ("head of other letters", "d", _of("d", lambda reply: Reply(reply.path, 200, {"server": "\u00e9"}, b"no"))),
    ("packed", "d", _of("d", lambda reply: Reply(reply.path, 200, {"content-encoding": "gzip"}, b"\x1f\x8b\x08"))),
    ("old HTTP, length 10**30", "0",
     _of("0", lambda reply: b"HTTP/1.0 200 OK\r\ncontent-length: 1" + b"0" * 30 + b"\r\n\r\nx")),
    # The catalogue and the dataset.
    ("total below zero", "datasets", _with("datasets", "total", -1)),
    ("total beyond any", "datasets", _with("datasets", "total", 10**15)),
    ("the same page for ever", "datasets", _says("datasets", b'{"datasets": [' + ENTRY + b'], "total": 1000000}')),
    ("too long a page", "datasets",
     _says("datasets", b'{"total": 1, "datasets": [' + (ENTRY + b",") * 501 + ENTRY + b"]}")),
    ("entry that is text", "datasets", _with("datasets", "datasets", ["d"])),
    ("rows that are text", "d", _with("d", "rows", "100")),
    ("rows that are true", "d", _with("d", "rows", True)),
    ("rows below zero", "d", _with("d", "rows", -1)),
    ("rows beyond int64", "d", _with("d", "rows", 10**30)),
    ("fields that are an object", "d", _with("d", "fields", {})),
    ("field without a shape", "d", _with("d", "fields.x.shape", _GONE)),
    ("shape below zero", "d", _with("d", "fields.x.shape", [-4, 3])),
    ("shape of a float", "d", _with("d", "fields.x.shape", [4.0, 3])),
    ("dtype that there is not", "0", _with("d", "fields.x.dtype", "object")),
    ("classes that are numbers", "d", _with("d", "class_names", [1, 2])),
    # The plan, against the dataset.
    ("plan of another revision", "plan", _with("plan", "revision", "0" * 16)),
    ("plan of too many rows", "plan", _with("plan", "rows", 10**15)),
    ("plan of too many batches", "plan", _with("plan", "batches", 8)),
    ("plan without tensors", "plan", _with("plan", "tensors", [])),
    ("plan of another dtype", "plan", _with("plan", "tensors.x.dtype", "float64")),
    ("plan of no dtype", "plan", _with("plan", "tensors.x.dtype", "V1000000000")),
    ("plan of another shape", "plan", _with("plan", "tensors.x.shape", [BATCH, 3, 4])),
    ("plan of another batch", "plan", _with("plan", "tensors.x.shape", [2**40, 4, 3])),
    ("plan with another tail", "padded", _with("plan", "last", "keep")),
    # Bodies, against the dataset.
    *((f"{name} of {ask}", ask, spoil) for ask in ("0", "rows") for name, spoil in (
        ("another dtype", _entry(ask, "x", dtype="I32")),
        ("no dtype", _entry(ask, "x", dtype="Q4_K")),
        ("another shape", _entry(ask, "x", shape=[BATCH if ask == "0" else 2, 3, 4])),
        ("a shape below zero", _entry(ask, "x", shape=[-1, 4, 3])),
        ("a shape that is true", _entry(ask, "x", shape=[True, 4, 3])),
        ("a shape of 2**80 bytes", _entry(ask, "x", shape=[2**40, 2**40])),
        ("an overlap", _entry(ask, "x", data_offsets=[0, 12 * 4 * (BATCH if ask == "0" else 2)])),
        ("an offset below zero", _entry(ask, "x", data_offsets=[-8, 100])),
        ("a third offset", _entry(ask, "x", data_offsets=[0, 1, 2])),
        ("a header of nothing", _says(ask, struct.pack("<Q", 0))),
        ("a header of 2**63 bytes", _says(ask, struct.pack("<Q", 1 << 63))),
        ("a deep header", _says(ask, struct.pack("<Q", 100_000) + b"[" * 100_000)),
    )),
    ("a hole", "rows", _framed("rows", lambda header, data: _moved(header, data, 64))),
    ("rows that there are not", "batches",
     _framed("batches", lambda header, data: np.full(BATCH, ROWS).tobytes() + data[BATCH * 8 :])),
    ("rows below zero", "0", _framed("0", lambda header, data: data.replace(struct.pack("<q", 15), b"\xff" * 8))),
    ("other rows", "rows", _framed("rows", lambda header, data: struct.pack("<qq", 3, 2) + data[16:])),
    ("another index", "0", _framed("0", lambda header, data: header["__metadata__"].update(index="1"))),
    ("an index of many digits", "0", _framed("0", lambda header, data: header["__metadata__"].update(index="1" * 99))),
    ("no index", "0", _framed("0", lambda header, data: header["__metadata__"].pop("index") and None)),
    ("no epoch", "0", _framed("0", lambda header, data: header["__metadata__"].pop("epoch") and None)),
    ("metadata of numbers", "0", _framed("0", lambda header, data: header["__metadata__"].update(epoch=0))),
    ("another revision", "0", _framed("0", lambda header, data: header["__metadata__"].update(revision="0" * 16))),
    ("text whose offsets begin later", "0", _framed("0", lambda header, data: _offsets(header, data, 0, 1))),
    ("text whose offsets go back", "0", _framed("0", lambda header, data: _offsets(header, data, 3, -5))),
    ("text whose offsets go beyond", "0", _framed("0", lambda header, data: _offsets(header, data, BATCH, 999))),
    ("another field", "rows", _framed("rows", lambda header, data: header.update(z=header.pop("x")))),
    ("a shorter batch", "batches", _of("batches", lambda reply: _batch_of(reply, BATCH - 1))),
    ("a mean image of another shape", "mean-image", _entry("mean-image", "mean_image", shape=[3, 4])),
    ("no mean image", "mean-image", _framed("mean-image", lambda h, data: h.update(other=h.pop("mean_image")))),
    ("split rows that go back", "split",
     _framed("rows", lambda header, data: np.frombuffer(data, "<i8")[::-1].tobytes())),
    ("split rows that are floats", "split", _entry("rows", "__rows__", dtype="F64")),
    # Reports.
    ("splits without all", "splits", _with("splits", "splits.all", _GONE)),
    ("split that is a number", "splits", _with("splits", "splits.train", 3)),
    ("share that is text", "splits", _with("splits", "splits.train.share", "half")),
    ("share that is infinite", "splits", _with("splits", "splits.train.share", float("inf"))),
    ("splits of another revision", "splits", _with("splits", "revision", "0" * 16)),
    ("mean that is text", "stats", _with("stats", "fields.x.mean", "1")),
    ("mean of a thousand digits", "stats", _with("stats", "fields.x.mean", 10**1000)),
    ("statistics of another revision", "stats", _with("stats", "revision", "0" * 16)),
]  # fmt: skip


def _moved(header: dict[str, Any], data: bytes, by: int) -> bytes:
    """Bytes that belong to no tensor before the last one."""
    start, stop = header["x"]["data_offsets"]
    header["x"]["data_offsets"] = [start + by, stop + by]
    return data[:start] + b"?" * by + data[start:]


def _offsets(header: dict[str, Any], data: bytes, place: int, by: int) -> bytes:
    start, stop = header["text.offsets"]["data_offsets"]
    offsets = np.frombuffer(data[start:stop], "<i8").copy()
    offsets[place] += by
    return data[:start] + offsets.tobytes() + data[stop:]


def _batch_of(reply: Reply, rows: int) -> Reply:
    """A body of the same order with fewer rows, sound in itself."""
    from h5feed.wire import Body, Tensor, read_body

    tensors, about, _ = read_body(np.frombuffer(reply.body, np.uint8))
    made = [Tensor(name, array.dtype, (rows, *array.shape[1:])) for name, array in tensors.items()]
    body = Body(made, {key: value for key, value in about.items() if key != "index"})
    buffer = np.zeros(body.nbytes, np.uint8)
    for name, array in body.place(buffer, int(about["index"])).items():
        array[...] = tensors[name][:rows]
    return Reply(reply.path, reply.status, reply.headers, buffer.tobytes())


@pytest.mark.parametrize("ask", ASKS)
def test_unspoilt(proxy: SpoilingProxy, ask: str) -> None:
    """What is asked for below is answered where nothing is spoilt."""
    proxy.spoil = lambda reply: reply
    with h5feed.connect(proxy.url, deadline=DEADLINE) as feed:
        ASKS[ask](feed)


@pytest.mark.parametrize(("ask", "spoil"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_answers(proxy: SpoilingProxy, ask: str, spoil: Spoil) -> None:
    """It is `BadAnswer` and nothing else, said at once and in one line, and takes no memory to speak of."""
    with h5feed.connect(proxy.url, deadline=DEADLINE) as feed:
        proxy.spoil = spoil
        tracemalloc.start()
        try:
            with pytest.raises(BadAnswer) as raised:
                ASKS[ask](feed)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert type(raised.value) is BadAnswer
    assert most < MOST_BYTES
    # Whoever reads it in a notebook is told of nothing that led to it.
    assert "".join(traceback.format_exception(raised.value)).count("Traceback") == 1
    said = str(raised.value)
    assert said.isprintable() and len(said) < 2000


CUT = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "half a body": b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{",
    "chunks of minus one": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    "a chunk of 2**100 bytes": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1" + b"0" * 25 + b"\r\nabc",
}


@pytest.mark.parametrize("said", CUT.values(), ids=CUT)
def test_answers_that_end_too_early(proxy: SpoilingProxy, said: bytes) -> None:
    """They may be whole the next time: asked for again, until the deadline has passed."""
    asked = []

    def spoil(reply: Reply) -> bytes:
        asked.append(reply.path)
        return said

    proxy.spoil = spoil
    with (
        h5feed.connect(proxy.url, deadline=0.5) as feed,
        pytest.raises(ConnectionFailed, match="no complete response") as raised,
    ):
        feed.datasets()
    assert type(raised.value) is ConnectionFailed and len(asked) > 1


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\na: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n", b"["),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n[\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"["),
    ],
    ids=["head", "interim answers", "body", "chunks", "no length"],
)
def test_answers_that_never_end(head: bytes, drop: bytes) -> None:
    """A server that says a little now and then is given up when the deadline has passed."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connected, _ = listener.accept()
            with connected, contextlib.suppress(OSError):
                connected.sendall(head)
                while not over.wait(0.02):
                    connected.sendall(drop)

        dripping = threading.Thread(target=drip)
        dripping.start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=0.5)
        try:
            with pytest.raises(ConnectionFailed, match="no complete response"):
                client.json("/v1/datasets")
        finally:
            over.set()
            client.close()
            dripping.join()
