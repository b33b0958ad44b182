"""Rows that are read by the client, from received chunks and from the server's files, are those that h5py reads."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.blocks import Block
from h5feed.fetching.pieces import PieceFetcher
from h5feed.net import descriptors
from h5feed.net.descriptors import MAX_DESCRIPTORS
from h5feed.net.trace import begin_trace, clock
from h5feed.stored.source import ReceivedBytes
from h5feed.wire import read_body

from tests.support.matrix import DTYPES, FILTERS, is_legal
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 23
HIGH, WIDE_BYTES = 52, 80
"""A row has 4,160 bytes: more than those that are not read from files."""

CHUNKS = ("contiguous", "row", "rows", "parts", "part_of_a_row", "one")


def _shape(dtype: str) -> tuple[int, int]:
    return HIGH, WIDE_BYTES // (1 if dtype == "enum" else np.dtype(dtype).itemsize)


def _chunks(layout: str, wide: int) -> tuple[int, ...] | None:
    shapes = {
        "contiguous": None,
        "row": (1, HIGH, wide),
        "rows": (7, HIGH, wide),
        "parts": (7, 30, -(-wide // 2)),
        "part_of_a_row": (1, 30, wide),
        "one": (ROWS, HIGH, wide),
    }
    return shapes[layout]


def _data(dtype: str) -> np.ndarray:
    """Values that compress."""
    random = np.random.default_rng(5)
    values = np.repeat(random.integers(0, 3, (ROWS, HIGH // 4, _shape(dtype)[1])), 4, axis=1)
    return values.astype("i1" if dtype == "enum" else dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "pieces.h5"
    with h5py.File(path, "w") as file:
        for name, options in FILTERS.items():
            for layout in CHUNKS:
                for dtype in DTYPES:
                    if not is_legal(name, layout, dtype):
                        continue
                    data = _data(dtype)
                    kind: Any = h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i1") if dtype == "enum" else dtype
                    field, chunks = f"{name}-{layout}-{dtype.strip('<>|=')}", _chunks(layout, data.shape[2])
                    try:
                        file.create_dataset(field, data=data, dtype=kind, chunks=chunks, **options)
                    except ValueError:
                        # This build of HDF5 cannot write the combination.
                        file.pop(field, None)
        records = np.zeros(ROWS, [("small", "<i4"), ("wide", ">f4", (HIGH, 40)), ("text", "S9")])
        records["wide"] = np.random.default_rng(1).integers(0, 4, records["wide"].shape)
        file.create_dataset("records", data=records, chunks=(5,), compression="gzip")
        file.create_dataset("sparse", (ROWS, 5000), "<i4", chunks=(3, 700), compression="gzip", fillvalue=7)
        file["sparse"][4:9, :900] = 1
        file.create_dataset("labels", data=np.arange(ROWS) % 3)
    return path


@pytest.fixture(scope="module")
def server(
    path: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> ServerProcess:
    return serve_module(path.parent, "--uds", str(tmp_path_factory.mktemp("uds") / "socket"), "--port", "0")


def _local(server: ServerProcess) -> str:
    return f"unix://{server.socket}"


def _described(url: str, form: str, fields: list[str], client: httpx.Client) -> dict[str, Any]:
    """Which fields the server describes, and why the others are not."""
    params = {"fields": ",".join(fields), "batch_size": str(ROWS), "shuffle": "true", "start": "0", "stop": "1"}
    answer = client.get(f"{url}/v1/datasets/pieces/batches", params=params | {"body": form}, timeout=60)
    assert answer.status_code == 200, answer.text
    tensors, about, _ = read_body(np.frombuffer(answer.content, np.uint8))
    pieces: dict[str, Any] = json.loads(about["pieces"])
    assert not set(pieces["fields"]) & set(tensors)
    return pieces


@pytest.mark.parametrize("form", ["pieces", "places"])
@pytest.mark.parametrize("name", FILTERS)
def test_every_cell(server: ServerProcess, path: Path, name: str, form: str) -> None:
    """Filters × layouts × dtypes, shuffled, in batches that end within chunks, and with duplicates."""
    url = server.url if form == "pieces" else _local(server)
    with h5feed.connect(url, local=False, deadline=60) as feed:
        dataset = feed["pieces"]
        fields = [field for field in dataset.fields if field.startswith(f"{name}-")]
        assert len(fields) >= 20 or name in ("szip", "scaleoffset")
        with h5py.File(path) as file:
            stored = {field: file[field][()] for field in fields}
        if form == "pieces":
            described = _described(server.url, form, fields, httpx.Client())
            expected = {field for field in fields if name != "plain"}
        else:
            with httpx.Client(transport=httpx.HTTPTransport(uds=server.socket)) as local:
                described = _described("http://localhost", form, fields, local)
            expected = set(fields)
        assert set(described["fields"]) == expected, described["reasons"]
        assert not described["files"] if form == "pieces" else [file[0] for file in described["files"]] == ["pieces.h5"]
        # 23 rows in 3 shards of batches of 4: the last batches are padded with rows that came before.
        for options in ({"batch_size": ROWS}, {"batch_size": 4, "shards": 3, "shard": 1}, {"batch_size": 5}):
            order: dict[str, Any] = {"fields": fields, "shuffle": True, "seed": 3, **options}
            seen = 0
            for batch in dataset.batches(decode="client", **order):
                seen += len(batch.rows)
                for field in fields:
                    values = stored[field][batch.rows]
                    if values.dtype.kind == "c":
                        values = values.view("<f4").reshape(*values.shape, 2)
                    assert batch[field].dtype == values.dtype.newbyteorder("<"), field
                    assert np.array_equal(batch[field], values), field
            assert seen >= ROWS // 3


@pytest.mark.parametrize("form", ["pieces", "places"])
def test_same_batches_as_tensors(server: ServerProcess, form: str) -> None:
    """Members of records, chunks that were never written, small fields beside large ones: the same in every detail."""
    with h5feed.connect(server.url if form == "pieces" else _local(server), local=False, deadline=60) as feed:
        dataset = feed["pieces"]
        names = [field for field in dataset.fields if field.startswith("records")]
        order: dict[str, Any] = {
            "fields": [*names, "sparse", "labels"],
            "batch_size": 6,
            "shuffle": True,
            "last": "pad",
        }
        for epoch in range(3):
            ordinary = list(dataset.batches(decode="server", epoch=epoch, **order))
            for batch, other in zip(dataset.batches(decode="client", epoch=epoch, **order), ordinary, strict=True):
                assert list(batch) == list(other) and batch.index == other.index
                assert batch.epoch == other.epoch and batch.revision == other.revision
                assert np.array_equal(batch.rows, other.rows)
                assert batch.weight is not None and other.weight is not None
                assert np.array_equal(batch.weight, other.weight)
                for name, array in other.items():
                    assert batch[name].dtype == array.dtype and batch[name].shape == array.shape
                    assert batch[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("form", ["pieces", "places"])
def test_what_a_loop_writes_does_not_come_back(server: ServerProcess, form: str) -> None:
    """A loop may write to its arrays: later passes get what is stored, the fields that are not read here too."""
    options: dict[str, Any] = {"x": "gzip-row-u1", "y": "labels", "batch_size": 5, "decode": "client"}
    with h5feed.connect(server.url if form == "pieces" else _local(server), local=False, deadline=60) as feed:
        with feed["pieces"].loader(**options) as loader:
            for _ in range(3):
                read = [(x.copy(), y.copy(), x.fill(7), y.fill(7)) for x, y in loader]
                assert np.concatenate([y for _, y, *_ in read]).tolist() == (np.arange(ROWS) % 3).tolist()
                assert np.array_equal(np.concatenate([x for x, *_ in read]), _data("u1"))
        assert loader.stats().from_chunks == (3 * ROWS if form == "pieces" else 0)


def test_stats_say_how_rows_came(server: ServerProcess) -> None:
    """Of three loops over the same rows, and the reason where they came decoded."""
    fields = ["gzip-rows-u1"]
    with h5feed.connect(server.url, local=False, deadline=60) as feed:
        near = feed["pieces"].loader(x=fields, y=None, batch_size=4)
        forced = feed["pieces"].loader(x=fields, y=None, batch_size=4, decode="client")
        for loader in (near, forced):
            assert sum(1 for _ in loader) == 6
        assert near.stats().from_chunks == near.stats().from_files == 0 and "on this machine" in near.stats().why
        assert forced.stats().from_chunks == ROWS and "rows from chunks" in repr(forced.stats())
        assert near.stats().why in repr(near.stats())
        # Compressed: fewer bytes came than the rows have.
        assert forced.stats().bytes < ROWS * HIGH * WIDE_BYTES / 1.2 < near.stats().bytes
    with h5feed.connect(_local(server), deadline=60) as feed:
        local = feed["pieces"].loader(x=fields, y=None, batch_size=4)
        assert sum(1 for _ in local) == 6
        assert local.stats().from_files == ROWS and not local.stats().why
        assert len(feed._client.files) == 1


def test_reading_files_is_not_waiting_for_the_server(server: ServerProcess) -> None:
    """The time counts as decoding, also for blocks whose places were fetched with an earlier one."""
    with h5feed.connect(_local(server), deadline=60) as feed:
        dataset = feed["pieces"]
        plan = dataset.plan("all", fields=["plain-contiguous-u1"], batch_size=4)
        fetcher, never = PieceFetcher(feed._client, dataset._path, plan), threading.Event()
        for start in (0, 1, 2):
            began, trace = clock(), begin_trace()
            assert fetcher.fetch(Block(0, start, start + 1, plan.batch_bytes), never) is not None
            assert trace.from_files == 4
        # The last one needed no request.
        waited, transferred, decoded = trace.split(began, clock())
        assert decoded > transferred == 0 and waited > 0


def _metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"h5feed_{name} ")))


def test_loops_over_files_report_what_they_read_and_how_long_they_waited(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From time to time, although no batch after the first needs a request."""
    monkeypatch.setattr(descriptors, "REPORT_SECONDS", 0.5)
    names = ("client_read_bytes_total", "client_loop_seconds_total")
    before = [_metric(server, name) for name in names]
    with h5feed.connect(_local(server), deadline=60) as feed:
        dataset = feed["pieces"]
        loader = dataset.loader(x=["plain-contiguous-u1"], y=None, batch_size=4)
        for _ in range(4):
            for _ in loader:
                time.sleep(0.1)
        assert loader.stats().from_files == 4 * ROWS
    least, all_of = 2 * ROWS * HIGH * WIDE_BYTES, 5 * ROWS * HIGH * WIDE_BYTES
    wait_until(lambda: least <= _metric(server, names[0]) - before[0] <= all_of)
    wait_until(lambda: 0 < _metric(server, names[1]) - before[1] < 60)


def test_descriptors_are_read_only_and_closed(server: ServerProcess) -> None:
    """The client holds one descriptor, of its own open file description, and closes it."""

    def open_files() -> dict[int, str]:
        # Without the positions: the tests themselves may be writing into a log.
        return {one.fd: one.path for one in psutil.Process().open_files()}

    # Errors of earlier tests may still refer to what was reading.
    gc.collect()
    with h5feed.connect(_local(server), deadline=60) as feed:
        earlier = open_files()
        for _ in range(3):
            for _ in feed["pieces"].batches(fields=["plain-contiguous-u1"], batch_size=5):
                pass
        held = dict(open_files().items() - earlier.items())
        assert [Path(path).name for path in held.values()] == ["pieces.h5"]
        [descriptor] = held
        assert os.get_inheritable(descriptor) is False
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
    assert open_files().items() <= earlier.items()


def test_no_descriptors(path: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """If the server passes none, rows come over the socket, and the reason is told."""
    server = serve(path.parent, "--uds", str(tmp_path / "socket"), "--port", "0", H5FEED_DESCRIPTORS="off")
    with h5feed.connect(_local(server), deadline=60) as feed:
        loader = feed["pieces"].loader(x="plain-contiguous-u1", y=None, batch_size=4)
        assert sum(1 for _ in loader) == 6
        assert loader.stats().from_files == 0 and "H5FEED_DESCRIPTORS=off" in loader.stats().why
        assert not len(feed._client.files)
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.socket)) as local:
        answer = local.get("http://localhost/v1/datasets/pieces/descriptor", params={"file": "pieces.h5"})
        assert answer.status_code == 406 and "H5FEED_DESCRIPTORS=off" in answer.json()["detail"]


def test_descriptors_are_for_the_socket(server: ServerProcess) -> None:
    """Over TCP there is none, and names that are not files of the dataset get a suggestion."""
    answer = httpx.get(f"{server.url}/v1/datasets/pieces/descriptor", params={"file": "pieces.h5"})
    assert answer.status_code == 406 and answer.json()["code"] == "not_acceptable"
    with httpx.Client(transport=httpx.HTTPTransport(uds=server.socket)) as local:
        for file in ("piece.h5", "../pieces.h5", "/etc/passwd"):
            answer = local.get("http://localhost/v1/datasets/pieces/descriptor", params={"file": file})
            assert answer.status_code == 400 and "pieces.h5" in answer.json()["detail"], answer.text


def test_places_are_for_the_socket(server: ServerProcess) -> None:
    """Over TCP, nothing says which files on the server's disks the rows are in."""
    with httpx.Client() as client:
        described = _described(server.url, "places", ["plain-contiguous-u1", "gzip-rows-u1"], client)
    assert not described["files"] and list(described["fields"]) == ["gzip-rows-u1"]


def test_bodies_by_other_formats(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/v1/datasets/pieces/batches/0", params={"body": "pieces", "format": "npz"})
    assert answer.status_code == 406 and "body=pieces" in answer.json()["detail"]
    answer = httpx.get(f"{server.url}/v1/datasets/pieces/batches/0", params={"body": "chunks"})
    assert answer.status_code == 400 and "'pieces'" in answer.json()["detail"]


def test_bytes_on_the_wire(server: ServerProcess) -> None:
    """Each chunk is sent once for all batches of a request, however its rows are spread over them."""
    field = "gzip-rows-u1"
    with h5feed.connect(server.url, local=False, deadline=60) as feed, httpx.Client() as client:
        described = _described(server.url, "pieces", [field], client)
        assert list(described["fields"]) == [field]
        chunks = math.ceil(ROWS / 7)
        params = {"fields": field, "batch_size": "4", "shuffle": "true", "start": "0", "stop": "6", "body": "pieces"}
        answer = client.get(f"{server.url}/v1/datasets/pieces/batches", params=params)
        tensors, _, _ = read_body(np.frombuffer(answer.content, np.uint8))
        (table,) = (tensor for tensor in tensors.values() if tensor.ndim == 2)
        assert table.shape == (4, chunks) and tensors["__pieces__/bytes"].size == table[2].sum()
        assert feed["pieces"].rows == ROWS


def test_other_asgi_servers(path: Path, tmp_path: Path) -> None:
    """Under uvicorn alone there are no descriptors. That is found out once, and rows come as tensors."""
    socket = tmp_path / "socket"
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "h5feed_server.asgi:app",
        "--uds",
        str(socket),
        "--log-level",
        "warning",
    ]
    environment = {**os.environ, "H5FEED_DATA_DIR": str(path.parent), "H5FEED_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment) as process:
        try:
            wait_until(socket.exists)
            with h5feed.connect(f"unix://{socket}", deadline=60) as feed:
                loader = feed["pieces"].loader(x="plain-contiguous-u1", y=None, batch_size=4)
                assert sum(1 for _ in loader) == 6
                assert loader.stats().from_files == 0 and "h5feed-server serve" in loader.stats().why
        finally:
            process.terminate()


def test_received_bytes_are_told_apart() -> None:
    """Decoded chunks are cached by this key for longer than the bytes exist, whose memory is used again."""
    assert len({ReceivedBytes(np.zeros(1, np.uint8)).key for _ in range(100)}) == 100


def test_fill_values_of_several_files(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Chunks that were never written have no position, but each file has its own fill value."""
    for number in range(2):
        with h5py.File(tmp_path / f"part-{number}.h5", "w") as file:
            file.create_dataset("x", (40, 2000), "<i4", chunks=(10, 2000), compression="gzip", fillvalue=number + 5)
    with h5feed.connect(serve(tmp_path).url, local=False, deadline=60) as feed:
        (dataset,) = (feed[name] for name in feed)
        assert dataset.rows == 80
        for batch in dataset.batches(batch_size=16, shuffle=True, decode="client"):
            assert np.array_equal(batch["x"][:, 0], batch.rows // 40 + 5)


def test_more_files_than_descriptors(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Rows in more files than are kept open come over the socket, instead of with a new descriptor for almost each."""
    data, socket = tmp_path / "data", tmp_path / "socket"
    data.mkdir()
    for number in range(MAX_DESCRIPTORS + 6):
        with h5py.File(data / f"part-{number:03d}.h5", "w") as file:
            file["x"] = np.full((4, 2000), number, "<i4")
    server = serve(data, "--uds", str(socket), "--port", "0")
    with h5feed.connect(_local(server), deadline=60) as feed:
        (dataset,) = (feed[name] for name in feed)
        loader = dataset.loader(x="x", y=None, batch_size=20, shuffle=True, readahead=1)
        assert sum(1 for _ in loader) == 14
        # Those of the first block may have been read before the number of files was known.
        assert "kept open" in loader.stats().why and loader.stats().from_files < dataset.rows // 2
        for batch in dataset.batches(batch_size=20, shuffle=True):
            assert np.array_equal(batch["x"][:, 0], batch.rows // 4)


@pytest.mark.parametrize("local", [False, True])
def test_fields_are_in_the_same_order(serve: Callable[..., ServerProcess], tmp_path: Path, local: bool) -> None:
    """Also if a label is between inputs of the same width."""
    data, socket = tmp_path / "data", tmp_path / "socket"
    data.mkdir()
    with h5py.File(data / "d.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((30, 2000)), chunks=(5, 2000), compression="gzip")
        file["y"] = np.arange(30) % 3
        file["z"] = np.zeros((30, 2000))
    server = serve(data, "--uds", str(socket), "--port", "0")
    with h5feed.connect(_local(server) if local else server.url, local=False, deadline=60) as feed:
        names = {
            decode: [*next(iter(feed["d"].batches(batch_size=9, decode=decode)))]
            for decode in ("server", "auto", "client")
        }
        assert names == {decode: ["x", "y", "z"] for decode in names}


def test_chunks_of_many_batches(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Where each chunk has rows of many batches and the client cannot keep them all, the server decodes."""
    data = tmp_path / "data"
    data.mkdir()
    with h5py.File(data / "grouped.h5", "w") as file:
        wide = file.create_dataset("x", (4400, 16384), "u1", chunks=(20, 16384), compression="gzip")
        wide[::50] = 1
    server = serve(data, "--uds", str(tmp_path / "socket"))
    with h5feed.connect(_local(server), deadline=60) as feed:
        options: dict[str, dict[str, Any]] = {"spread": {}, "window": {"window": 200}, "in order": {"shuffle": False}}
        stats = {}
        for name, more in options.items():
            loader = feed["grouped"].loader(x="x", y=None, batch_size=100, **({"shuffle": True} | more))
            assert sum(int(np.asarray(batch[0] if isinstance(batch, tuple) else batch).sum()) for batch in loader) == (
                88 * 16384
            )
            stats[name] = loader.stats()
        assert stats["spread"].from_files == 0 and "hold several rows" in stats["spread"].why
        assert stats["window"].from_files == stats["in order"].from_files == 4400
