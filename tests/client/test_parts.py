"""A batch that is larger than one response is fetched in parts, and is the same as if it had come at once."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import keras
import numpy as np
import pytest
from h5feed.errors import TooLarge
from PIL import Image
from safetensors.numpy import load

from tests.support.listener import Listener, hand_on
from tests.support.server_process import ServerProcess

ROWS = 61
LIMIT = 1 << 17
"""Of one response, in bytes: about five images, or one of the longest lists."""


def _write(folder: Path) -> None:
    random = np.random.default_rng(1)
    with h5py.File(folder / "images.h5", "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 90, 90, 3), np.uint8)
        file["depth"] = random.normal(size=(ROWS, 12, 12)).astype("f4")
        file["labels"] = np.arange(ROWS) % 7
    lengths = random.integers(1, 100_000, ROWS)
    lengths[5] = 0
    with h5py.File(folder / "lists.h5", "w") as file:
        file["bytes"] = random.integers(0, 256, int(lengths.sum()), np.uint8)
        file["bytes.offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        file["points"] = random.normal(size=int(lengths.sum() // 100)).astype("f4")
        file["points.offsets"] = np.concatenate([[0], np.cumsum(lengths)]) // 100
        file["labels"] = np.arange(ROWS, dtype="i2")
    with h5py.File(folder / "variable.h5", "w") as file:
        lists = file.create_dataset("bytes", (ROWS,), h5py.vlen_dtype(np.uint8))
        for row, length in enumerate(lengths):
            lists[row] = random.integers(0, 256, length, np.uint8)
        file["labels"] = np.arange(ROWS)
    photos = [Image.fromarray(random.integers(0, 256, (100, 80, 3), np.uint8)) for _ in range(ROWS)]
    streams = [io.BytesIO() for _ in photos]
    for photo, stream in zip(photos, streams, strict=True):
        photo.save(stream, "JPEG", quality=95)
    files = [stream.getvalue() for stream in streams]
    with h5py.File(folder / "photos.h5", "w") as file:
        file["images"] = np.frombuffer(b"".join(files), np.uint8)
        file["images"].attrs.update({"encoding": "mixed", "shape": (100, 80, 3)})
        file["images.offsets"] = np.cumsum([0, *map(len, files)])
        file["labels"] = np.arange(ROWS) % 4


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> tuple[ServerProcess, ServerProcess]:
    """One with the usual limits, and one with small responses."""
    folder = tmp_path_factory.mktemp("data")
    _write(folder)
    return serve_module(folder), serve_module(folder, H5FEED_MAX_BODY_BYTES=str(LIMIT))


@pytest.fixture
def feeds(servers: tuple[ServerProcess, ServerProcess]) -> Iterator[tuple[h5feed.Feed, h5feed.Feed]]:
    with h5feed.connect(servers[0].url, deadline=60) as usual, h5feed.connect(servers[1].url, deadline=60) as small:
        yield usual, small


def _same(one: h5feed.Batch, other: h5feed.Batch) -> None:
    assert ([*one], one.index, one.epoch, one.revision) == ([*other], other.index, other.epoch, other.revision)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one.rows, other.rows)
    assert (one.weight is None) == (other.weight is None)
    if one.weight is not None and other.weight is not None:
        np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True, "epoch": 3, "seed": 4},
        {"shuffle": True, "last": "pad"},
        {"shuffle": True, "shards": 3, "shard": 1},
        {"last": "drop", "val": 0.2, "split": "train"},
    ],
    ids=["ascending", "shuffled", "padded", "shard", "split"],
)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("images", {"fields": ["images", "depth", "labels"]}),
        ("lists", {"fields": ["bytes", "points", "labels"]}),
        ("variable", {"fields": ["labels", "bytes"]}),
        ("photos", {}),
        ("photos", {"decode": "client"}),
        ("photos", {"encoded": ["images"], "fields": ["images"]}),
    ],
    ids=["images", "lists", "variable", "photos", "decoded here", "encoded"],
)
@pytest.mark.sampled(together=2)
def test_batches_are_the_same(
    feeds: tuple[h5feed.Feed, h5feed.Feed], name: str, more: dict[str, Any], options: dict[str, Any]
) -> None:
    """Bit by bit, with the same row ids and weights, whatever is in the rows and whatever their order."""
    usual, small = (list(feed[name].batches(batch_size=25, **more, **options)) for feed in feeds)
    assert len(usual) == len(small) > 0
    for one, other in zip(usual, small, strict=True):
        _same(one, other)
    of_two = feeds[1][name].batch(1 % len(usual), batch_size=25, **more, **options)
    _same(usual[1 % len(usual)], of_two)


def test_the_limit_is_kept(
    servers: tuple[ServerProcess, ServerProcess], feeds: tuple[h5feed.Feed, h5feed.Feed]
) -> None:
    """A whole batch is still 413, and says what to do; its parts are bodies of their own, which are cached by URL."""
    with httpx.Client(base_url=f"{servers[1].url}/v1/datasets/images", timeout=60) as http:
        order = {"batch_size": "25", "shuffle": "true", "fields": "images", "last": "pad"}
        plan = http.get("/plan", params=order).json()
        assert 0 < plan["part_rows"] == (LIMIT - 1024) // (90 * 90 * 3) < 25
        for refused in ({}, {"from_row": "1"}, {"from_row": "0", "to_row": str(plan["part_rows"] + 1)}):
            answer = http.get("/batches/2", params=order | refused)
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            assert "H5FEED_MAX_BODY_BYTES" in answer.json()["detail"] and "at most" in answer.json()["detail"]
        whole = feeds[0]["images"].batch(2, batch_size=25, shuffle=True, fields=["images"], last="pad")
        answer = http.get("/batches/2", params=order | {"from_row": "10", "to_row": "13"})
        assert len(answer.content) < LIMIT
        part = load(answer.content)
        np.testing.assert_array_equal(part["images"], whole["images"][10:13])
        np.testing.assert_array_equal(part["__rows__"], whole.rows[10:13])
        assert whole.weight is not None
        np.testing.assert_array_equal(part["__weight__"], whole.weight[10:13])
        again = http.get(
            "/batches/2",
            params=order | {"from_row": "10", "to_row": "13"},
            headers={"if-none-match": answer.headers["etag"]},
        )
        other = http.get("/batches/2", params=order | {"from_row": "11", "to_row": "13"})
        assert (again.status_code, other.headers["etag"] == answer.headers["etag"]) == (304, False)
        as_npz = http.get("/batches/2", params=order | {"from_row": "10", "to_row": "13", "format": "npz"})
        np.testing.assert_array_equal(np.load(io.BytesIO(as_npz.content))["images"], part["images"])
        for wrong in ({"from_row": "3", "to_row": "3"}, {"to_row": "26"}, {"from_row": "25"}, {"from_row": "-1"}):
            answer = http.get("/batches/2", params=order | wrong)
            assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter"), answer.text
        assert http.get("/batches", params=order | {"start": "0", "stop": "1", "to_row": "2"}).status_code == 400


def test_a_known_query_is_not_taken_for_its_part(servers: tuple[ServerProcess, ServerProcess]) -> None:
    """Queries are remembered, by their text: whole batches and parts are told apart, in whatever order they come."""
    with httpx.Client(base_url=f"{servers[0].url}/v1/datasets/images", timeout=60) as http:
        for _ in range(3):
            part = load(http.get("/batches/0?batch_size=8&fields=labels&from_row=2&to_row=4").content)
            whole = load(http.get("/batches/0?batch_size=8&fields=labels").content)
            assert (part["__rows__"].tolist(), whole["__rows__"].tolist()) == ([2, 3], list(range(8)))
            assert len(load(http.get("/batches/1?batch_size=8&fields=labels&from_row=2").content)["labels"]) == 6


def test_single_rows_that_are_too_large(servers: tuple[ServerProcess, ServerProcess], tmp_path: Path) -> None:
    """They are refused at the plan, or, if rows differ in length, at the batch; the setting and its value are named."""
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["images"] = np.zeros((4, LIMIT + 1), np.uint8)
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file["lists"] = np.zeros(LIMIT + 100, np.uint8)
        file["lists.offsets"] = [0, 10, 20, LIMIT + 60, LIMIT + 100]
    server = ServerProcess(tmp_path, tmp_path / "cache", H5FEED_MAX_BODY_BYTES=str(LIMIT))
    try:
        with h5feed.connect(server.url, deadline=60) as feed:
            said = rf"single row has \d+ bytes, more than the limit of {LIMIT} .* larger H5FEED_MAX_BODY_BYTES"
            with pytest.raises(TooLarge, match=said):
                feed["wide"].plan(batch_size=2)
            assert feed["long"].batch(0, batch_size=2, fields=["lists"])["lists"].nbytes == 20
            with pytest.raises(TooLarge, match=said):
                feed["long"].batch(1, batch_size=2, fields=["lists"])
            with pytest.raises(TooLarge, match=said):
                list(feed["long"].batches(batch_size=2, fields=["lists"]))
    finally:
        server.stop()


def test_one_buffer_for_a_batch(feeds: tuple[h5feed.Feed, h5feed.Feed]) -> None:
    """The parts are received into the memory of the batch: there is no second copy of them."""
    _, small = feeds
    pool = small["images"]._client.pool
    batch = small["images"].batch(0, batch_size=50, fields=["images", "depth"])
    nbytes = sum(array.nbytes for array in batch.values())
    assert nbytes <= pool.nbytes < 1.3 * nbytes
    roots = {id(_root(array)) for array in (*batch.values(), batch.rows)}
    assert len(roots) == 1


def _root(array: Any) -> Any:
    return array if array.base is None else _root(array.base)


def test_training_and_resuming(feeds: tuple[h5feed.Feed, h5feed.Feed]) -> None:
    """`fit` sees the same batches, also after a state is loaded; `readahead` is still a bound."""
    options: dict[str, Any] = {"batch_size": 25, "shuffle": True, "seed": 9, "x": "images", "y": "labels"}
    seen = []
    for feed in feeds:
        loader = feed["images"].loader(readahead=LIMIT, **options)
        batches = [x for x, _ in itertools.islice(loader, 2)]
        # The copy resumes the pass.
        resumed = pickle.loads(pickle.dumps(loader))
        seen.append(batches + [x for x, _ in resumed])
        loader.close()
        resumed.close()
    assert [len(batches) for batches in seen] == [3, 3]
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)
    losses = []
    for feed in feeds:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(7)])
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        losses.append(model.fit(feed["images"].sequence(**options), epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]


def test_the_cache_of_rows(feeds: tuple[h5feed.Feed, h5feed.Feed], tmp_path: Path) -> None:
    """Rows are stored from parts and come back from the folder, also where only some of them are there."""
    usual, small = feeds
    for name, more in (("images", {}), ("lists", {"fields": ["bytes", "labels"]})):
        options: dict[str, Any] = {"batch_size": 25, "shuffle": True, **more}
        wanted = [list(usual[name].batches(epoch=epoch, **options)) for epoch in range(2)]
        next(small[name].batches(cache=tmp_path / name, epoch=0, **options))
        for epoch in (0, 1):
            came = list(small[name].batches(cache=tmp_path / name, epoch=epoch, **options))
            for one, other in zip(wanted[epoch], came, strict=True):
                _same(one, other)


def test_servers_with_different_limits(
    servers: tuple[ServerProcess, ServerProcess], feeds: tuple[h5feed.Feed, h5feed.Feed]
) -> None:
    """The plan may come from a server that answers more at once than the others do."""
    wanted = list(feeds[0]["images"].batches(batch_size=25, shuffle=True))
    with h5feed.connect(f"{servers[0].url},{servers[1].url}", deadline=60) as feed:
        for _ in range(3):
            for one, other in zip(wanted, feed["images"].batches(batch_size=25, shuffle=True), strict=True):
                _same(one, other)


class _Cutting:
    """A proxy that ends every other connection in the middle of an answer."""

    def __init__(self, port: int) -> None:
        self._to, self._number = ("127.0.0.1", port), itertools.count()
        self.cuts = 0
        self._listener = Listener(self._serve)
        self.url, self.close = self._listener.url, self._listener.close

    def _serve(self, client: socket.socket) -> None:
        allowed = 100_000 if next(self._number) % 2 else 1 << 30
        with socket.create_connection(self._to, 5) as server:
            threading.Thread(target=hand_on, args=(client, server), daemon=True).start()
            with contextlib.suppress(OSError):
                while allowed > 0 and (data := server.recv(min(1 << 16, allowed))):
                    client.sendall(data)
                    allowed -= len(data)
                self.cuts += allowed <= 0
                client.shutdown(socket.SHUT_RDWR)


class _Chunking(BaseHTTPRequestHandler):
    """A proxy that sends every body in chunks, without a length."""

    protocol_version = "HTTP/1.1"
    to = ""

    def do_GET(self) -> None:
        answer = httpx.get(f"{self.to}{self.path}", headers={"accept": self.headers["accept"]}, timeout=60)
        self.send_response(answer.status_code)
        self.send_header("content-type", answer.headers["content-type"])
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(answer.content), answer.content))

    def log_message(self, *about: object) -> None:
        pass


@contextlib.contextmanager
def _through(way: str, port: int) -> Iterator[str]:
    if way == "cut":
        cutting = _Cutting(port)
        yield cutting.url
        cutting.close()
        assert cutting.cuts
    elif way == "no length":
        handler = type("Handler", (_Chunking,), {"to": f"http://127.0.0.1:{port}"})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{proxy.server_port}"
            proxy.shutdown()
    else:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("way", ["hooks", "no length", "cut"])
def test_other_ways_of_receiving(
    servers: tuple[ServerProcess, ServerProcess], feeds: tuple[h5feed.Feed, h5feed.Feed], way: str
) -> None:
    """With hooks, requests go through httpx; a proxy may remove the length of a body, or end it early."""
    options: dict[str, Any] = {"batch_size": 25, "shuffle": True, "fields": ["bytes", "points"]}
    wanted = list(feeds[0]["lists"].batches(**options))
    hooks: Any = {"response": [lambda response: None]} if way == "hooks" else None
    with _through(way, servers[1].port) as url, h5feed.connect(url, deadline=60, event_hooks=hooks) as feed:
        for _ in range(2):
            for one, other in zip(wanted, feed["lists"].batches(**options), strict=True):
                _same(one, other)
