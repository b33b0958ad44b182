"""Shuffled rows of an object store that takes 20 ms for each answer, however short it is.

The store is `benchmarks.late_store`. All objects are one file under several names, which nobody but their store knows:
each first epoch is of an object that is new to the server.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import h5feed
import h5py
import numpy as np
from h5feed.errors import FeedError

from .data import Files
from .late_store import BUCKET
from .measure import Figure, Rates, Turn, take_turns
from .peers.environments import Environment
from .served import CONNECTIONS
from .servers import START_SECONDS, h5feed_server

LATENCY = 0.02
"""Seconds before each answer."""

_ROW = (256, 256, 3)
_ROW_BYTES = 196_608
_ROWS = 960
_BATCH = 32

_LATER = 6
"""Epochs of a turn that reads from a local disk: one takes a tenth of a second."""

_ALONE = 32
"""Rows of a turn that asks for one after the other."""

_VARIANT = "2 workers"

_FEW = 8
"""The same with h5py: for each row, the default cache fetches 50 MB."""

_CACHES = {"h5py default": "default", "h5py none": "none"}
"""Contestants that read with h5py over s3fs, and its kind of cache."""

_FSSPEC = Environment("fsspec", ("s3fs==2026.9.0", "h5py", "numpy"))

FIGURES = (
    Figure("store_vs_latency_bound", {_VARIANT: "first"}, {_VARIANT: "one at a time"}, 20),
    Figure("store_step_busy", {_VARIANT: "busy"}, {_VARIANT: "memory"}, 0.95),
    Figure("store_second_epoch", {_VARIANT: "second"}, {_VARIANT: "local"}, 0.9),
    Figure("store_vs_h5py_fsspec", {_VARIANT: "first"}, {_VARIANT: "h5py"}, 20),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of all contestants."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        names = _write(folder, 2 * (rounds + 1))
        port = stack.enter_context(_late_store(folder))
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_SKIP_SIGNATURE": "true",
            "AWS_REGION": "eu-west-2",
        }
        server = stack.enter_context(h5feed_server(f"s3://{BUCKET}", 2, None, (), (), **environment))
        feed = stack.enter_context(h5feed.connect(server.url, local=False))
        for name in names:
            _prepare(feed, name)
        local = stack.enter_context(h5feed_server(folder / "local", 2))
        near = stack.enter_context(h5feed.connect(local.url, local=False))["rows"]
        turns: dict[str, Turn] = {"one at a time": _one_at_a_time(port, folder / names[0])}
        turns |= _epochs(feed, names) | {"local": lambda: sum(_drain(near, epoch) for epoch in range(_LATER))}
        if missing := _FSSPEC.missing():
            print(f"h5py over s3fs: {missing}", file=sys.stderr)
        else:
            turns |= stack.enter_context(_h5py_over_fsspec(port, names[0]))
        rates = dict(take_turns(turns, rounds))
    if rates.keys() >= _CACHES.keys():
        rates["h5py"] = [max(pair) for pair in zip(*(rates[name] for name in _CACHES), strict=True)]
    return rates


def _write(folder: Path, count: int) -> list[str]:
    """Write the file, link it under so many more names, and return these."""
    (folder / "local").mkdir()
    with h5py.File(folder / "local" / "rows.h5", "w", libver="latest") as file:
        images = file.create_dataset("images", (_ROWS, *_ROW), np.uint8)
        for start in range(0, _ROWS, _BATCH):
            noise = np.random.default_rng(start).bytes(_BATCH * _ROW_BYTES)
            images[start : start + _BATCH] = np.frombuffer(noise, np.uint8).reshape(_BATCH, *_ROW)
    (folder / "objects").mkdir()
    # Not numbers, which would make them parts of one dataset.
    letters = string.ascii_lowercase
    names = [f"objects/{one}{other}.h5" for one, other in itertools.islice(itertools.product(letters, letters), count)]
    for name in names:
        os.link(folder / "local" / "rows.h5", folder / name)
    return names


@contextlib.contextmanager
def _late_store(folder: Path) -> Iterator[int]:
    """The port of the store."""
    command = [sys.executable, "-m", "benchmarks.late_store", str(folder), str(LATENCY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def _prepare(feed: h5feed.Feed, name: str) -> None:
    """Wait until an object is inspected, and hold a row of it against the file's."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            feed[_dataset(name)].take([0])
            return
        except FeedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _dataset(name: str) -> str:
    return name.removesuffix(".h5").replace("/", ".")


def _one_at_a_time(port: int, path: Path) -> Turn:
    """Turns that ask for one row after the other, on one connection."""
    with h5py.File(path) as file:
        begin = file["images"].id.get_offset()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    buffer = memoryview(bytearray(_ROW_BYTES))
    key = path.relative_to(path.parents[1]).as_posix()

    def turn() -> int:
        for row in np.random.default_rng(0).permutation(_ROWS)[:_ALONE].tolist():
            first = begin + row * _ROW_BYTES
            ranged = {"Range": f"bytes={first}-{first + _ROW_BYTES - 1}"}
            connection.request("GET", f"/{BUCKET}/{key}", headers=ranged)
            answer = connection.getresponse()
            done = 0
            while done < _ROW_BYTES:
                done += answer.readinto(buffer[done:])
            answer.read()
        return _ALONE

    return turn


def _drain(dataset: h5feed.Dataset, epoch: int, step: float = 0.0) -> int:
    """Take all batches of a shuffled epoch, and work for so many seconds with each."""
    rows = 0
    for batch in dataset.batches(batch_size=_BATCH, shuffle=True, epoch=epoch, connections=CONNECTIONS):
        rows += len(batch.rows)
        if step:
            time.sleep(step)
    return rows


def _epochs(feed: h5feed.Feed, names: list[str]) -> dict[str, Turn]:
    """Turns of first and later epochs; and of a loop that asks for half of what first epochs give, in memory too."""
    fresh, known = iter(names), itertools.count(1)
    rates: list[float] = []
    read: list[h5feed.Dataset] = []

    def step() -> float:
        return 2 * _BATCH / median(rates)

    def first() -> int:
        read.append(feed[_dataset(next(fresh))])
        began = time.perf_counter()
        rows = _drain(read[-1], 0)
        rates.append(rows / (time.perf_counter() - began))
        return rows

    def busy() -> int:
        return _drain(feed[_dataset(next(fresh))], 0, step())

    def memory() -> int:
        for _ in range(_ROWS // _BATCH):
            time.sleep(step())
        return _ROWS

    def second() -> int:
        return sum(_drain(read[-1], next(known)) for _ in range(_LATER))

    return {"first": first, "second": second, "busy": busy, "memory": memory}


@contextlib.contextmanager
def _h5py_over_fsspec(port: int, name: str) -> Iterator[dict[str, Turn]]:
    """Turns that read one row after the other with h5py, in a process of an environment of its own."""
    command = [
        str(_FSSPEC.python),
        str(Path(__file__).with_name("peers") / "fsspec_rows.py"),
        str(port),
        f"{BUCKET}/{name}",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(cache: str) -> int:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{cache} {_FEW}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield {name: lambda cache=cache: read(cache) for name, cache in _CACHES.items()}  # type: ignore[misc]
    finally:
        process.kill()
        process.wait()
