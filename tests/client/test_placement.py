"""``placement="cache"``: each row comes from the server that owns it, and the batches stay the same."""

from __future__ import annotations

import collections
import io
import math
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.errors import BadParameter
from h5feed.fetching import placed as placed_rows
from h5feed.net import balancing, hedging
from h5feed.net.balancing import MOVE_SECONDS, Servers
from h5feed.net.client import Client
from h5feed.net.placement import LEAST_CHUNKS, LEAST_ROWS, owners_of, rows_of_block
from h5feed.net.servers import Server
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.server_process import ServerProcess
from tests.support.waiting import suspend, wait_until

ROWS = 420
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

Serve = Callable[..., ServerProcess]


def _jpeg(row: int) -> bytes:
    down, right = np.mgrid[0 : 24 + row % 5, 0:32]
    stream = io.BytesIO()
    Image.fromarray((down * 3 + right * 2 + row).astype(np.uint8)).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted does not depend on how fast the machine is."""
    monkeypatch.setattr(hedging, "LONGEST_SECONDS", 60.0)
    monkeypatch.setattr(hedging, "LEAST_SECONDS", 60.0)
    monkeypatch.setattr(balancing, "_TOO_SLOW", math.inf)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every form that a body has: long, in chunks, of different lengths, text, files of images, masks."""
    path = tmp_path_factory.mktemp("placed")
    random = np.random.default_rng(0)
    lengths = random.integers(0, 30, ROWS)
    with h5py.File(path / "things.h5", "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 160, 160, 3), np.uint8)
        several = random.integers(0, 256, (ROWS, 10, 12), np.uint8)
        file.create_dataset("several", data=several, chunks=(16, 10, 12), compression="gzip")
        file["labels"] = np.arange(ROWS) % 7
        file["numbers"] = np.arange(ROWS)
        file["mask"] = random.random((ROWS, 5)) < 0.5
        file["half"] = random.random((ROWS, 3)).astype("<f2")
        file["tokens"] = random.integers(0, 1000, lengths.sum()).astype("i4")
        file["tokens.offsets"] = np.cumsum([0, *lengths])
        text = [f"row {row} " * (row % 4) for row in range(ROWS)]
        file.create_dataset("text", data=text, dtype=h5py.string_dtype())
    files = [_jpeg(row) for row in range(ROWS)]
    with h5py.File(path / "photos.h5", "w") as file:
        file["images"] = np.frombuffer(b"".join(files), np.uint8)
        file["images"].attrs.update({"encoding": "jpeg", "shape": (16, 16, 3)})
        file["images.offsets"] = np.cumsum([0, *map(len, files)])
        file["labels"] = np.arange(ROWS)
    return path


@pytest.fixture(scope="module")
def replicas(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """A server on each of the addresses, for tests that stop none for good."""
    found = [ServerProcess(data, tmp_path_factory.mktemp("cache"), "--workers", "1", "--host", host) for host in HOSTS]
    yield found
    for server in found:
        server.stop()


def placed(*servers: ServerProcess, deadline: float = 60) -> h5feed.Feed:
    return h5feed.connect(",".join(server.url for server in servers), deadline=deadline, local=False, placement="cache")


def requests_of(feed: h5feed.Feed) -> list[int]:
    return [replica.requests for replica in feed.replicas]


def assert_same(mine: h5feed.Batch, theirs: h5feed.Batch) -> None:
    """All that a batch has is the same, bit by bit."""
    assert (mine.index, mine.epoch, mine.revision) == (theirs.index, theirs.epoch, theirs.revision)
    assert list(mine) == list(theirs)
    for one, other in [(mine.rows, theirs.rows), *((mine[name], theirs[name]) for name in mine)]:
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    assert (mine.weight is None) == (theirs.weight is None)
    if mine.weight is not None and theirs.weight is not None:
        np.testing.assert_array_equal(mine.weight, theirs.weight)


# Owners --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.data())
def test_only_the_blocks_of_a_missing_server_move(count: int, draw: st.DataObject) -> None:
    names = [f"10.0.0.{number}:8000" for number in range(count)]
    blocks = np.arange(3000)
    owners = np.array(names)[owners_of(blocks, names, "a")]
    gone = draw.draw(st.sampled_from(names))
    rest = draw.draw(st.permutations([name for name in names if name != gone]))
    if rest:
        after = np.array(rest)[owners_of(blocks, rest, "a")]
        assert (after == owners)[owners != gone].all()
        moved = collections.Counter(after[owners == gone].tolist())
        assert len(moved) == len(rest)
    share = 3000 / count
    for owned in collections.Counter(owners.tolist()).values():
        assert abs(owned - share) < 6 * math.sqrt(share)


def test_other_data_have_other_owners() -> None:
    """Else the first blocks of all datasets would have the same one."""
    names, blocks = ["a:1", "b:1", "c:1"], np.arange(3000)
    same = owners_of(blocks, names, "one") == owners_of(blocks, names, "other")
    assert 800 < same.sum() < 1200


@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 100, 1000])
def test_the_rows_of_a_chunk_are_in_one_block(chunk: int) -> None:
    rows = rows_of_block(chunk)
    assert rows % chunk == 0 and rows >= LEAST_ROWS and (chunk == 1 or rows // chunk >= LEAST_CHUNKS)


def _server_at(name: str) -> Callable[[str | None], Server]:
    def make(address: str | None) -> Server:
        return Server(f"http://{name}:80", headers={}, timeout=1, verify=False, event_hooks=None, auth=None)

    return make


def test_a_slow_server_owns_nothing_for_a_moment() -> None:
    """It is asked again when its speed is forgotten."""
    servers = Servers([*"abc"], _server_at)
    for one, seconds in zip(servers, (0.01, 0.02, 0.5), strict=True):
        for _ in range(16):
            servers.answered(one, 1 << 20, seconds)
    assert [one.identity for one in servers.owners()] == ["a:80", "b:80"]
    slow = list(servers)[2]
    slow.paced_at = time.monotonic() - 30
    assert len(servers.owners()) == 3
    servers.close()


def test_rows_move_from_a_server_that_is_left_out_for_long() -> None:
    """Not at its first failure: caches of others would be filled with what they soon have no use of."""
    servers = Servers([*"abc"], _server_at)
    down, *others = servers
    servers.failed(down, time.monotonic(), "down")
    assert servers.owners() == [down, *others]
    with servers.one(owner=down) as chosen:
        assert chosen is not down
    down.failing_since -= MOVE_SECONDS
    servers.failed(down, time.monotonic(), "still down")
    assert servers.owners() == others
    servers.answered(down)
    assert servers.owners() == [down, *others]
    with servers.one(owner=down) as chosen:
        assert chosen is down
    for one in servers:
        servers.failed(one, time.monotonic(), "down")
        one.failing_since -= MOVE_SECONDS
    assert servers.owners() == [down, *others]
    servers.close()


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(BadParameter, match="'cache'"):
        h5feed.connect("http://127.0.0.1:1", placement="cash")  # type: ignore[arg-type]


# Batches -------------------------------------------------------------------------------------------------------------

ORDERS = st.fixed_dictionaries(
    {"batch_size": st.sampled_from([1, 7, 32, 100, ROWS])},
    optional={
        "shuffle": st.booleans(),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 2),
        "window": st.just(64),
        "limit": st.integers(1, ROWS),
        "last": st.sampled_from(["keep", "drop", "pad"]),
        "decode": st.sampled_from(["auto", "server", "client"]),
        "where": st.just("labels < 5"),
    },
)

FIELDS = ("images", "several", "labels", "numbers", "mask", "half", "tokens", "text")


@given(st.data())
def test_any_order_from_any_number_of_replicas(replicas: list[ServerProcess], draw: st.DataObject) -> None:
    """The batches are those of one server."""
    order: dict[str, Any] = draw.draw(ORDERS)
    if "window" in order:
        order["shuffle"] = True
    name = draw.draw(st.sampled_from(["things", "photos"]))
    if name == "things":
        order["fields"] = draw.draw(st.lists(st.sampled_from(FIELDS), min_size=1, unique=True))
    elif draw.draw(st.booleans()):
        order["encoded"] = ["images"]
    if draw.draw(st.booleans()):
        order |= {"shard": draw.draw(st.integers(0, 2)), "shards": 3}
        order["last"] = draw.draw(st.sampled_from(["drop", "pad"]))
    used = replicas[: draw.draw(st.integers(1, 3))]
    # Long rows are received straight into their places, others are copied.
    long = mock.patch.object(placed_rows, "_DIRECT_ROW_BYTES", draw.draw(st.sampled_from([1, 1 << 10, 1 << 30])))
    with long, placed(*used) as feed, h5feed.connect(replicas[0].url, local=False) as plain:
        mine, theirs = feed[name].batches(**order), plain[name].batches(**{**order, "decode": "server"})
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)


def test_draws_with_repeats(replicas: list[ServerProcess]) -> None:
    """The same row may be several times in a batch."""
    order: dict[str, Any] = {"batch_size": 64, "balance": True, "shuffle": True, "epoch_rows": 2 * ROWS}
    order["fields"] = ["images", "text", "labels"]
    with placed(*replicas) as feed, h5feed.connect(replicas[0].url, local=False) as plain:
        rows = []
        for one, other in zip(feed["things"].batches(**order), plain["things"].batches(**order), strict=True):
            assert_same(one, other)
            rows += one.rows.tolist()
        assert len(set(rows)) < len(rows)
        assert min(requests_of(feed)) > 0


def test_all_forms_of_stored_rows(folder: Path, tmp_path: Path) -> None:
    """Every layout that is read, from three servers as from one."""
    servers = [ServerProcess(folder, tmp_path / host, "--workers", "1", "--host", host) for host in HOSTS]
    try:
        with placed(*servers) as feed, h5feed.connect(servers[0].url, local=False) as plain:
            for name in ("mixed", "tall", "sub.small"):
                fields = [field.name for field in plain[name].fields.values() if field.readable]
                order: dict[str, Any] = {"batch_size": 33, "shuffle": True, "fields": fields}
                for one, other in zip(feed[name].batches(**order), plain[name].batches(**order), strict=True):
                    assert_same(one, other)
            # The last dataset has one block, but one of the others has many.
            assert min(requests_of(feed)) > 1
    finally:
        for server in servers:
            server.stop()


def test_rows_that_do_not_fit_into_a_response(serve: Serve, data: Path) -> None:
    """An owner is asked several times."""
    limits = {"H5FEED_MAX_BODY_BYTES": "1000000", "H5FEED_MAX_ROWS": "50"}
    servers = [serve(data, "--workers", "1", "--host", host, **limits) for host in HOSTS[:2]]
    order: dict[str, Any] = {"batch_size": 40, "shuffle": True, "fields": ["images", "text"]}
    with placed(*servers) as feed, h5feed.connect(servers[0].url, local=False) as plain:
        for one, other in zip(feed["things"].batches(**order), plain["things"].batches(**order), strict=True):
            assert_same(one, other)


@pytest.mark.usefixtures("calm")
def test_one_request_for_each_owner_and_block(replicas: list[ServerProcess]) -> None:
    """Small batches are not divided further: a block of them is."""
    with placed(*replicas) as feed:
        train = feed["things"].loader(batch_size=4, shuffle=True, x="several", y="labels")
        sum(1 for _ in train)
        before = sum(requests_of(feed))
        steps = sum(1 for _ in train)
        assert steps == ROWS / 4
        assert sum(requests_of(feed)) - before < steps
        assert train.stats().unplaced == ""
        train.close()


@pytest.mark.usefixtures("calm")
def test_rows_of_a_block_come_from_its_owner(replicas: list[ServerProcess]) -> None:
    """By what the servers say that they were asked for, not by the client's own words."""
    names = [f"127.0.0.{number}:{server.port}" for number, server in enumerate(replicas, 1)]

    def sent(server: ServerProcess) -> int:
        return metric(server, 'endpoint="/v1/datasets/{name}/rows"', "bytes_total")

    with placed(*replicas) as feed:
        things = feed["things"]
        before = [sent(server) for server in replicas]
        for _ in things.batches(batch_size=30, shuffle=True, fields=["images"]):
            pass
        came = np.array([sent(server) for server in replicas]) - before
        blocks = np.arange(ROWS) // LEAST_ROWS
        expected = np.bincount(owners_of(blocks, names, things.revision), minlength=3) * 160 * 160 * 3
        assert (came >= expected).all() and (came < expected + (1 << 20)).all()


# Trouble -------------------------------------------------------------------------------------------------------------


def test_an_owner_that_is_killed_in_mid_epoch(serve: Serve, data: Path) -> None:
    """Each row once, in order; its rows come from the others; it gets them back."""
    servers = [serve(data, "--workers", "1", "--host", host) for host in HOSTS]
    with placed(*servers) as feed:
        things = feed["things"]
        order: dict[str, Any] = {
            "batch_size": 6,
            "shuffle": True,
            "fields": ["images", "numbers"],
            "readahead": 1 << 20,
        }
        expected = [batch.rows.tolist() for batch in things.batches(**order)]
        assert min(requests_of(feed)) > 0
        seen = []
        for number, batch in enumerate(things.batches(**order)):
            np.testing.assert_array_equal(batch["numbers"], batch.rows)
            seen.append(batch.rows.tolist())
            if number == 10:
                servers[1].kill()
        assert seen == expected
        assert sorted(row for rows in seen for row in rows) == list(range(ROWS))
        assert feed.replicas[1].left_out
        servers[1].start()
        before = requests_of(feed)[1]

        def has_them_back() -> bool:
            assert [batch.rows.tolist() for batch in things.batches(**order)] == expected
            return requests_of(feed)[1] > before + 5

        wait_until(has_them_back, 90)


def test_a_run_goes_on_where_it_was_left(replicas: list[ServerProcess]) -> None:
    """With other replicas, too: the position says nothing of them."""
    with placed(*replicas) as feed:
        train = feed["things"].loader(batch_size=32, shuffle=True, x="several", y="numbers")
        whole = [np.asarray(x).tobytes() for x in map(_inputs, train)]
        later = feed["things"].loader(batch_size=32, shuffle=True, x="several", y="numbers")
        iterator = iter(later)
        for _ in range(5):
            next(iterator)
        state = later.state_dict()
        later.close()
        train.close()
    with placed(*replicas[1:]) as feed:
        rest = feed["things"].loader(batch_size=32, shuffle=True, x="several", y="numbers")
        rest.load_state_dict(state)
        assert [np.asarray(x).tobytes() for x in map(_inputs, rest)] == whole[5:]
        rest.close()


def _inputs(step: Any) -> Any:
    return step[0] if isinstance(step, tuple) else step


def metric(server: ServerProcess, *parts: str) -> int:
    """The sum of the metrics whose lines have all of these parts."""
    lines = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if all(one in line for one in parts)]
    values = [int(float(line.split()[-1])) for line in lines if not line.startswith("#")]
    assert values
    return sum(values)


def chunk_cache_bytes(server: ServerProcess) -> int:
    """Bytes of decoded chunks that it keeps."""
    return metric(server, "h5feed_cache_bytes", 'cache="chunks"')


UNCACHED = {"H5FEED_CACHE_BYTES": "0"}
"""Small fields are read batch by batch, like large ones."""


def test_what_is_not_to_be_stored_fills_no_cache(serve: Serve, data: Path) -> None:
    """Requests with ``Cache-Control: no-store`` get the same rows, and leave the caches as they were."""
    server = serve(data, "--workers", "1", **UNCACHED)
    url = f"{server.url}/v1/datasets/things/rows"
    request = {"rows": list(range(0, ROWS, 5)), "fields": ["several"]}
    told = httpx.post(url, json=request, headers={"cache-control": "no-store"}, timeout=60)
    assert told.status_code == 200
    ranged = httpx.get(url, params={"fields": "several"}, headers={"cache-control": "max-age=0, No-Store"}, timeout=60)
    assert chunk_cache_bytes(server) == 0
    assert httpx.post(url, json=request, timeout=60).content == told.content
    assert httpx.get(url, params={"fields": "several"}, timeout=60).content == ranged.content
    assert chunk_cache_bytes(server) > 0


def test_a_silent_owner_fills_no_other_cache(serve: Serve, data: Path) -> None:
    """Its requests go to another server, which keeps nothing of them, as long as the owner is not left out."""
    servers = [serve(data, "--workers", "1", "--host", host, **UNCACHED) for host in HOSTS[:2]]
    with h5feed.connect(servers[0].url, local=False) as feed:
        revision = feed["things"].revision
    client = Client(",".join(server.url for server in servers), deadline=60, local=False, placement="cache")
    client.json("/v1/datasets/things")
    silent = servers[0]
    owner = next(one for one in client.owners() if one.identity.endswith(f":{silent.port}"))

    class Into:
        def places(self, length: int) -> Iterator[Any]:
            yield np.empty(length, np.uint8)

    def ask() -> None:
        request = {"rows": list(range(64)), "fields": ["several"]}
        path = "/v1/datasets/things/rows"
        client.receive(path, {"revision": revision}, Into(), json=request, max_bytes=1 << 20, owner=owner)

    ask()
    assert chunk_cache_bytes(silent) > 0 and chunk_cache_bytes(servers[1]) == 0
    processes = [psutil.Process(pid) for pid in (silent.process.pid, *silent.worker_pids())]
    suspend(*processes)
    try:
        ask()
    finally:
        for process in processes:
            process.resume()
    assert "nothing arrived" in client.replicas[0].left_out
    assert chunk_cache_bytes(servers[1]) == 0
    silent.kill()
    ask()
    assert chunk_cache_bytes(servers[1]) == 0
    client.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"x": ["several", "things/half"], "join": "things"}, "samples are made of rows of several datasets"),
        ({"x": "several", "sequence_length": 2}, "samples are made of several rows"),
    ],
)
def test_samples_that_have_no_owner(replicas: list[ServerProcess], options: dict[str, Any], why: str) -> None:
    """Any server sends them, and `stats` says why."""
    with placed(*replicas) as feed:
        train = feed["things"].loader(batch_size=32, y="labels", **options)
        assert len(list(train)) > 1
        assert train.stats().unplaced == why
        train.close()


def test_one_server_serves_all_rows(replicas: list[ServerProcess]) -> None:
    """It is said once."""
    with placed(replicas[0]) as feed:
        train = feed["things"].loader(batch_size=32, x="several", y="labels")
        assert sum(1 for _ in train) == math.ceil(ROWS / 32)
        assert train.stats().unplaced == "there is only one server"
        assert repr(train.stats()).count("there is only one server") == 1
        train.close()


def test_servers_with_different_content(serve: Serve, data: Path, tmp_path: Path) -> None:
    """As without placement: what one server has is not mixed with the other's, and the error names both."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "things.h5").write_bytes((data / "things.h5").read_bytes())
    with h5py.File(other / "things.h5", "r+") as file:
        file["images"][0] = 0
    servers = [serve(folder, "--workers", "1") for folder in (data, other)]
    with placed(*servers) as feed:
        things = feed["things"]
        with pytest.raises(h5feed.RevisionChanged, match="do not serve the same data"):
            for _ in range(10):
                for _ in things.batches(batch_size=32, fields=["images"]):
                    pass


# Caches --------------------------------------------------------------------------------------------------------------


def _is_known(url: str) -> bool:
    return httpx.get(url, timeout=60).status_code == 200


def epochs_of(servers: list[ServerProcess], dataset: str, count: int, **options: Any) -> int:
    """Read shuffled epochs from these servers; returns the number of chunks that they decoded for the last of them."""
    for server in servers:
        wait_until(partial(_is_known, f"{server.url}/v1/datasets/{dataset}"))
    urls = ",".join(server.url for server in servers)
    decoded = 0
    with h5feed.connect(urls, deadline=60, local=False, **options) as feed:
        rows = feed[dataset].rows
        for epoch in range(count):
            before = sum(metric(server, "h5feed_decoded_chunks_total") for server in servers)
            order: dict[str, Any] = {"batch_size": 100, "shuffle": True, "epoch": epoch, "fields": ["images"]}
            seen = [row for batch in feed[dataset].batches(**order) for row in batch.rows.tolist()]
            assert sorted(seen) == list(range(rows))
            decoded = sum(metric(server, "h5feed_decoded_chunks_total") for server in servers) - before
    return decoded


@pytest.mark.usefixtures("calm")
def test_three_small_caches_of_chunks_hold_three_parts(serve: Serve, tmp_path: Path) -> None:
    """The second epoch decodes far fewer chunks than with one server, or with three that all read everything."""
    rows, row_bytes = 6000, 1000
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "rows.h5", "w") as file:
        images = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), np.uint8)
        file.create_dataset("images", data=images, chunks=(10, row_bytes), compression="gzip", compression_opts=1)
        file["numbers"] = np.arange(rows)
    cache = {"H5FEED_CHUNK_CACHE_BYTES": str(rows * row_bytes // 4)}

    def decoded(count: int, **options: Any) -> int:
        servers = [
            serve(tmp_path / "data", "--workers", "1", "--host", host, **UNCACHED, **cache) for host in HOSTS[:count]
        ]
        found = epochs_of(servers, "rows", 2, **options)
        for server in servers:
            server.stop()
        return found

    together = decoded(3, placement="cache")
    assert together < 0.6 * decoded(1)
    assert together < 0.6 * decoded(3)


def ranges_kept(server: ServerProcess) -> set[tuple[int, int]]:
    """Offset and size of what a server keeps of the objects in its cache on the disk."""
    entry = struct.Struct("<QQII")
    (index,) = (server.cache_dir / "ranges").glob("*.index")
    content = index.read_bytes()
    whole = content[: len(content) // entry.size * entry.size]
    return {(offset, nbytes) for offset, nbytes, _, _ in entry.iter_unpack(whole)}


@pytest.mark.usefixtures("calm")
def test_three_small_caches_of_a_store_hold_three_parts(serve: Serve, tmp_path: Path) -> None:
    """Together, they hold at least 2.7 times as many bytes as one of them, each range once."""
    pytest.importorskip("obstore")
    pytest.importorskip("hadro")
    from tests.support.object_store import serve_folder

    rows, row_bytes = 6000, 8192
    (tmp_path / "buckets" / "data").mkdir(parents=True)
    with h5py.File(tmp_path / "buckets" / "data" / "rows.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), np.uint8)
        file["numbers"] = np.arange(rows)
    # Far less than a third, so that each is filled whatever the shares are.
    limits = {**UNCACHED, "H5FEED_STORE_CACHE_BYTES": str(rows * row_bytes // 8), "H5FEED_READ_TIMEOUT": "55"}
    store = serve_folder(tmp_path / "buckets")
    try:

        def kept(count: int, **options: Any) -> list[set[tuple[int, int]]]:
            servers = [
                serve("s3://data", "--workers", "1", "--host", host, **store.environment, **limits)
                for host in HOSTS[:count]
            ]
            # Twice: on a busy machine, some requests go to another server than the owner, and fill no cache.
            epochs_of(servers, "rows", 2, **options)
            for server in servers:
                server.stop()
            return [ranges_kept(server) for server in servers]

        (alone,), together = kept(1), kept(3, placement="cache")
        assert sum(nbytes for _, nbytes in alone) > rows * row_bytes // 16
        distinct = set().union(*together)
        assert sum(nbytes for _, nbytes in distinct) >= 2.7 * sum(nbytes for _, nbytes in alone)
        # Besides the rows, each reads the first bytes of the object.
        assert sum(map(len, together)) - len(distinct) < 30
    finally:
        store.stop()
