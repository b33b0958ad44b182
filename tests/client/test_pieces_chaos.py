"""Files that change, servers and clients that are killed, and crafted descriptions, while the client reads rows itself:
no wrong row."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import FeedError
from h5feed.fetching import pieces
from h5feed.net import descriptors
from h5feed.stored.local_file import LocalFile, OpenFiles
from h5feed.wire import read_body

from tests.support.server_process import ServerProcess
from tests.support.usage import Usage
from tests.support.waiting import wait_until

WORDS = 1200
"""A row has 9,600 bytes: its number, the generation of its file, values, and a checksum of all that."""


def _rows(generation: int, numbers: np.ndarray) -> np.ndarray:
    """Rows of a file, (n, WORDS) int64."""
    rows = np.repeat(np.random.default_rng(generation).integers(0, 9, (len(numbers), WORDS // 8)), 8, axis=1)
    rows[:, 0], rows[:, 1] = numbers, generation
    for row in rows:
        row[-1] = zlib.crc32(row[:-1].tobytes())
    return rows


def _write(path: Path, generation: int, rows: int, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=_rows(generation, np.arange(rows)), **options)


def _check(batch: h5feed.Batch) -> set[int]:
    """Check each row, and return the generations that they are of."""
    rows = batch["x"]
    assert np.array_equal(rows[:, 0], batch.rows)
    for row in rows:
        assert row[-1] == zlib.crc32(row[:-1].tobytes()), f"row {row[0]} is torn"
    return set(rows[:, 1].tolist())


def _replace(path: Path, new: Path) -> None:
    os.replace(new, path)


def _truncate(path: Path, new: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    time.sleep(0.05)
    shutil.copyfile(new, path)


def _overwrite(path: Path, new: Path) -> None:
    """Same inode, size and time of modification."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(new.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _grow(path: Path, new: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    time.sleep(0.05)
    shutil.copyfile(new, path)


FORMS = ("files", "pieces")


def _served(
    serve: Callable[..., ServerProcess], data: Path, tmp_path: Path, form: str, **settings: str
) -> tuple[Any, str]:
    socket = tmp_path / "socket"
    server = serve(data, "--workers", "2", "--uds", str(socket), "--port", "0", **settings)
    return server, f"unix://{socket}" if form == "files" else server.url


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [_replace, _truncate, _overwrite, _grow])
@pytest.mark.parametrize(("rows", "rounds"), [(1500, 2), pytest.param(6000, 4, marks=pytest.mark.slow)])
def test_files_that_change(
    serve: Callable[..., ServerProcess],
    tmp_path: Path,
    form: str,
    change: Callable[[Path, Path], None],
    rows: int,
    rounds: int,
) -> None:
    """Until the change is noticed, all rows are of the file as it was; afterwards, of the new one. None is torn."""
    data = tmp_path / "data"
    data.mkdir()
    path = data / "numbers.h5"
    options: dict[str, Any] = {} if form == "files" else {"chunks": (1, WORDS), "compression": "gzip"}
    _write(path, 0, rows, **options)
    server, url = _served(serve, data, tmp_path, form)
    before = Usage.of(server)
    checked = 0
    for generation in range(rounds):
        new = tmp_path / "new"
        _write(new, generation + 1, rows, **options)
        with h5feed.connect(url, local=False, deadline=60) as feed:
            dataset, seen = feed["numbers"], 0
            order: dict[str, Any] = {"batch_size": 16, "shuffle": True, "decode": "client", "readahead": 1 << 20}
            with pytest.raises(FeedError):
                for epoch in range(100):
                    for number, batch in enumerate(dataset.batches(epoch=epoch, **order)):
                        assert _check(batch) == {generation}
                        seen += len(batch.rows)
                        if (epoch, number) == (1, 20):
                            change(path, new)
            assert seen >= rows + 21 * 16
            wait_until(lambda: _generation(feed) == generation + 1)  # noqa: B023
            checked += seen
    assert checked > rows * rounds
    wait_until(lambda: Usage.of(server).connections <= before.connections)


def _generation(feed: h5feed.Feed) -> int | None:
    """Generation of the rows that are served; None while the file is being inspected."""
    try:
        return _check(feed["numbers"].batch(0, batch_size=8)).pop()
    except FeedError:
        return None


@pytest.mark.parametrize("form", FORMS)
def test_servers_that_are_killed(serve: Callable[..., ServerProcess], tmp_path: Path, form: str) -> None:
    """Each row comes once, and in the same order, from a server that is killed and restarted in the epoch."""
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 3, 3000, **({} if form == "files" else {"chunks": (1, WORDS), "compression": "gzip"}))
    server, url = _served(serve, data, tmp_path, form)
    with h5feed.connect(url, local=False, deadline=90) as feed:
        order: dict[str, Any] = {"batch_size": 8, "shuffle": True, "decode": "client", "readahead": 1 << 20}
        calm = [batch.rows.tolist() for batch in feed["numbers"].batches(**order)]
        seen = []
        for number, batch in enumerate(feed["numbers"].batches(**order)):
            assert _check(batch) == {3}
            seen.append(batch.rows.tolist())
            if number in (50, 200):
                server.kill()
                server.start()
        assert seen == calm and sorted(row for rows in seen for row in rows) == list(range(3000))


def test_descriptors_are_asked_for_again_when_the_server_is_back(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """A server that is away when a descriptor is needed does not end reading from files for the rest of the pass."""
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 3, 3000)
    server, url = _served(serve, data, tmp_path, "files")
    with h5feed.connect(url, local=False, deadline=90) as feed:
        dataset = feed["numbers"]
        loader = dataset.loader(x="x", y=None, batch_size=8, shuffle=True, readahead=1 << 16)
        starting = threading.Timer(1.0, server.start)
        for number, _ in enumerate(loader):
            if number == 50:
                server.kill()
                dataset._client.files.clear()
                starting.start()
        starting.join()
        assert 1500 < loader.stats().from_files < 3000


def test_a_report_that_fails_does_not_end_the_loop(
    serve: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows the places of all rows, and holds the descriptor, needs the server no more."""
    monkeypatch.setattr(descriptors, "REPORT_SECONDS", 0.2)
    pause, failed = descriptors.BytesRead.pause, [0]

    def noting(self: descriptors.BytesRead) -> None:
        failed[0] += 1
        pause(self)

    monkeypatch.setattr(descriptors.BytesRead, "pause", noting)
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 3, 1600)
    server, url = _served(serve, data, tmp_path, "files")
    with h5feed.connect(url, local=False, deadline=3) as feed:
        seen = 0
        order: dict[str, Any] = {"batch_size": 8, "shuffle": True, "decode": "client", "readahead": 1 << 16}
        for number, batch in enumerate(feed["numbers"].batches(**order)):
            assert _check(batch) == {3}
            seen += len(batch.rows)
            if number == 40:
                server.kill()
            time.sleep(0.01)
        assert seen == 1600 and failed == [1]


_TRAINS = """
import sys, h5feed
dataset = h5feed.connect(sys.argv[1])["numbers"]
for epoch in range(10_000):
    for batch in dataset.batches(batch_size=8, shuffle=True, epoch=epoch, readahead=1 << 20):
        print("batch", flush=True)
"""


def test_clients_that_are_killed(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Descriptors, threads and memory of the server go back, whatever the clients held."""
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 0, 2000)
    server, url = _served(serve, data, tmp_path, "files")

    def kill_some() -> None:
        clients = [subprocess.Popen([sys.executable, "-c", _TRAINS, url], stdout=subprocess.PIPE) for _ in range(3)]
        for client in clients:
            assert client.stdout is not None and client.stdout.readline() == b"batch\n"
        for client in clients:
            client.send_signal(signal.SIGKILL)
            client.communicate()

    kill_some()
    wait_until(lambda: Usage.of(server).connections == 0)
    before = Usage.of(server)
    for _ in range(3):
        kill_some()
    wait_until(lambda: Usage.of(server).connections == 0)
    # Each worker opens the file when it first reads it.
    wait_until(lambda: Usage.of(server).descriptors <= before.descriptors + 2)
    assert Usage.of(server).rss < before.rss + (50 << 20)


def _read_all(dataset: h5feed.Dataset, found: Any) -> None:
    seen: list[int] = []
    loader = dataset.loader(x="x", y=None, batch_size=16, shuffle=True)
    for _ in loader:
        pass
    for batch in dataset.batches(batch_size=16, shuffle=True):
        assert _check(batch) == {0}
        seen += batch.rows.tolist()
    found.put((sorted(seen) == list(range(800)), loader.stats().from_files))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(serve: Callable[..., ServerProcess], tmp_path: Path, method: str) -> None:
    """A dataset that is used before a fork, or is pickled, reads from files in the other process, and here still."""
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 0, 800)
    _, url = _served(serve, data, tmp_path, "files")
    context: Any = multiprocessing.get_context(method)
    with h5feed.connect(url, local=False, deadline=60) as feed:
        dataset, found = feed["numbers"], context.Queue()
        for batch in dataset.batches(batch_size=16):
            _check(batch)
        processes = [context.Process(target=_read_all, args=(dataset, found)) for _ in range(2)]
        for process in processes:
            process.start()
        for _ in processes:
            assert found.get(timeout=60) == (True, 800)
        for process in processes:
            process.join(60)
        _read_all(dataset, found)
        assert found.get(timeout=60) == (True, 800)


def test_tokens_that_do_not_cover_the_file(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A token for one of the datasets in a file gets its rows, but no descriptor of the whole file."""
    data = tmp_path / "data"
    data.mkdir()
    with h5py.File(data / "both.h5", "w") as file:
        file["open/x"], file["secret/y"] = _rows(0, np.arange(40)), _rows(1, np.arange(50))[:, :1000]
    tokens = tmp_path / "tokens"
    made = {}
    for name, scope in (("part", "both.open"), ("all", "both*")):
        command = [sys.executable, "-m", "h5feed_server.cli", "token", "create", name]
        command += ["--datasets", scope, "--token-file", str(tokens)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        made[name] = run.stdout.strip()
    _, url = _served(serve, data, tmp_path, "files", H5FEED_TOKEN_FILE=str(tokens))
    for name, expected in (("part", 0), ("all", 40)):
        with h5feed.connect(url, token=made[name], deadline=60) as feed:
            loader = feed["both.open"].loader(x="x", y=None, batch_size=8)
            assert sum(1 for _ in loader) == 5
            assert loader.stats().from_files == expected
            assert bool(loader.stats().why) == (not expected)


# Crafted descriptions ------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    -1,
    0,
    1,
    7,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    None,
    "x",
    [],
    {},
    1.5,
    True,
    [2**40, 2**40],
    "<f8",
    "|S9",
    "|O",
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in some JSON."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*path, key))
    return found


def test_crafted_descriptions(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Whatever a body claims, reading it gives an array as requested, or an error: nothing outside of the body is read,
    and no more memory is taken than for the batch and one chunk."""
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "numbers.h5", 0, 40, chunks=(3, 500), compression="gzip", shuffle=True, fletcher32=True)
    server = serve(data)
    with h5feed.connect(server.url, local=False, deadline=60) as feed:
        dataset = feed["numbers"]
        plan = dataset.plan(batch_size=20, decode="client")
        params = {**plan.params, "start": "0", "stop": "2", "body": "pieces", "epoch": "0"}
        body = httpx.get(f"{server.url}/v1/datasets/numbers/batches", params=params, timeout=60).content
        tensors, about, _ = read_body(np.frombuffer(body, np.uint8))
        content = json.loads(about["pieces"])
        chance, read = random.Random(1), 0
        files: list[str] = []

        def no_file(name: str, identity: Any) -> Any:
            files.append(name)
            raise ValueError("there is no such file")

        for _ in range(3000):
            crafted, arrays = copy.deepcopy(content), {name: array.copy() for name, array in tensors.items()}
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                if chance.random() < 0.5:
                    *above, last = chance.choice(_places(crafted))
                    target = crafted
                    for key in above:
                        target = target[key]
                    target[last] = copy.deepcopy(chance.choice(ODD))
                else:
                    array = arrays[chance.choice(sorted(arrays))].reshape(-1)
                    if array.size:
                        array[chance.randrange(array.size)] = chance.choice((-1, 0, 1, 255, 2**40, 2**62)) & (
                            255 if array.dtype == np.uint8 else -1
                        )
                if not crafted.get("fields"):
                    break
            try:
                window = pieces.window_of(arrays, {**about, "pieces": json.dumps(crafted)}, plan, 0, 0, 2, no_file)
                batches = window.read(0, 2, pieces.reader(), feed._client.pool)
            except (ValueError, KeyError, FeedError):
                continue
            read += 1
            for batch in batches:
                assert batch["x"].shape == (20, WORDS) and batch["x"].dtype == np.int64
        assert 100 < read < 2500 and not files


def test_segments_of_different_kinds(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Rows of another length would leave parts of a batch as they were before, or not fit into it."""
    data = tmp_path / "data"
    (data / "numbers").mkdir(parents=True)
    for number in range(2):
        _write(data / "numbers" / f"part-{number}.h5", number, 40)
    _, url = _served(serve, data, tmp_path, "files")
    with h5feed.connect(url, deadline=60) as feed:
        plan = feed["numbers"].plan(batch_size=80, decode="client")
        params = {**plan.params, "start": "0", "stop": "1", "body": "places", "epoch": "0"}
        body = feed._client.body("/v1/datasets/numbers/batches", params, max_bytes=1 << 20)
        tensors, about, _ = read_body(body)
        opened = OpenFiles(2)

        def read(content: dict[str, Any]) -> np.ndarray:
            crafted = {**about, "pieces": json.dumps(content)}
            window = pieces.window_of(
                tensors, crafted, plan, 0, 0, 1, lambda name, identity: LocalFile(opened, str(data / name), identity)
            )
            (batch,) = window.read(0, 1, pieces.reader(), feed._client.pool)
            return batch["x"]

        content = json.loads(about["pieces"])
        assert (read(content)[:, 1] == np.repeat([0, 1], 40)).all()
        for shape in ([], [0], [WORDS // 2], [WORDS * 2], [WORDS, 2], [2**40]):
            for dtype in ("<i8", ">i8", "|u1"):
                content["fields"]["x"]["segments"][1]["array"].update(shape=[40, *shape], dtype=dtype)
                with pytest.raises(ValueError, match="rows of different kinds"):
                    read(content)
