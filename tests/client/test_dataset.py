"""Batches that come otherwise than usual: in a stream that ends early, or through a proxy."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from h5feed.batch import Batch
from h5feed.blocks import Block
from h5feed.errors import BadAnswer, ConnectionFailed, DatasetCorrupt
from h5feed.fetching.server import fetcher
from h5feed.frames import Frame
from h5feed.net.client import Client
from h5feed.net.exchange import BodyCut
from h5feed.net.names import Names
from h5feed.plan import Plan
from h5feed.wire import MEDIA_TYPE, ROWS, Body, Tensor, read_body

BATCHES = 9
BODY = Body(
    [Tensor(ROWS, np.dtype("<i8"), (2,))], {"dataset": "d", "revision": "r", "epoch": "0", "batches": str(BATCHES)}
)


PLAN = Plan(
    rows=2 * BATCHES,
    batches=BATCHES,
    batch_bytes=BODY.nbytes,
    params={"revision": "r"},
    batch_size=2,
    tensors=tuple(BODY.tensors),
    max_rows=100,
    max_bytes=1 << 20,
    last_rows=2,
    frame=Frame.of(2 * BATCHES, [], [], weighted=False),
    decoding={},
)


def bodies(start: int, stop: int) -> np.ndarray:
    buffer = np.empty((stop - start) * BODY.nbytes, np.uint8)
    for number, index in enumerate(range(start, stop)):
        BODY.place(buffer[number * BODY.nbytes :][: BODY.nbytes], index)[ROWS][:] = 2 * index, 2 * index + 1
    return buffer


class Server:
    """Answers single batches; each stream as `stream` says. Keeps what was asked for."""

    spans = None
    is_near, is_local = True, False
    placement = None
    names = Names()

    def __init__(self, stream: Any, broken: int = -1) -> None:
        self.asked: list[str] = []
        self._stream, self._broken = stream, broken

    def body(self, path: str, query: dict[str, str], **options: Any) -> np.ndarray:
        self.asked.append(path.rsplit("/", 1)[-1])
        assert len(self.asked) < 50, "it asks again and again"
        if path.endswith("/batches"):
            return np.asarray(self._stream(int(query["start"]), int(query["stop"])))
        index = int(path.rsplit("/", 1)[-1])
        if index == self._broken:
            raise DatasetCorrupt("chunk 3 does not decode")
        return bodies(index, index + 1)


def fetched(server: Server) -> list[Batch]:
    fetch = fetcher(server, "/v1/datasets/d", PLAN)  # type: ignore[arg-type]
    return fetch(Block(0, 2, 8, 0), threading.Event())


def cut_after(nbytes: int) -> Any:
    def stream(start: int, stop: int) -> np.ndarray:
        whole = bodies(start, stop)
        if nbytes < len(whole):
            raise BodyCut("the connection ended", whole[:nbytes])
        return whole

    return stream


@pytest.mark.parametrize(
    "stream",
    [
        bodies,
        cut_after(0),
        cut_after(20),
        cut_after(BODY.nbytes),
        cut_after(2 * BODY.nbytes + 30),
        cut_after(6 * BODY.nbytes - 1),
        lambda start, stop: np.empty(0, np.uint8),
        lambda start, stop: bodies(start, start + 1),
    ],
)
def test_every_batch_once_in_order(stream: Any) -> None:
    """Wherever a stream ends, also with no batch at all, the block is whole, without an endless loop."""
    batches = fetched(Server(stream))
    assert [batch.index for batch in batches] == [2, 3, 4, 5, 6, 7]
    assert [row for batch in batches for row in batch.rows] == list(range(4, 16))


def test_the_reason_of_a_cut_stream() -> None:
    """The batch that broke a stream is asked for alone, and its error is raised."""
    server = Server(cut_after(3 * BODY.nbytes + 1), broken=5)
    with pytest.raises(DatasetCorrupt, match="chunk 3"):
        fetched(server)
    assert server.asked == ["batches", "5"]


class ChunkingProxy(BaseHTTPRequestHandler):
    """Sends batch 3 in chunks, without a length; at ``/cut`` it ends too early, at ``/page`` it is another page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html" if self.path == "/page" else MEDIA_TYPE)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        content = bodies(3, 4).tobytes()
        for start in range(0, len(content), 100):
            piece = content[start : start + 100]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if self.path == "/cut":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *about: object) -> None:
        pass


def test_a_proxy_that_takes_the_length_away() -> None:
    """A body in chunks is read as well, one that ends early is not taken for whole, a page is no body."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChunkingProxy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = Client(f"http://127.0.0.1:{server.server_port}", deadline=1)
    try:
        tensors, metadata, _ = read_body(client.body("/whole", max_bytes=1000))
        assert (metadata["index"], tensors[ROWS].tolist()) == ("3", [6, 7])
        with pytest.raises(ConnectionFailed, match="no complete response"):
            client.body("/cut", max_bytes=1000)
        with pytest.raises(BadAnswer, match="is it an h5feed server"):
            client.body("/page", max_bytes=1000)
    finally:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join()
