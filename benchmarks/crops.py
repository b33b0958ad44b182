"""Random crops of volumes in compressed chunks: by the client, and by a slice of h5py for each sample."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import h5feed
import h5py
import numpy as np
from h5feed.options import OrderOptions

from .data import Files
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS
from .servers import h5feed_server

_TWO = "2 workers"
_VOLUMES, _SIZE, _CHUNK, _CROP = 20, 256, 64, 64
_BATCH = 4
_SAMPLES = 160
"""Of a turn: several crops of each volume."""

FIGURES = tuple(
    Figure(f"{name}crop_vs_h5py", {_TWO: f"{kind} crops"}, {_TWO: f"{kind} slices"}, target)
    for name, kind, target in (("", "packed", 2.0), ("plain_", "plain", 0.5))
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Crops per second of volumes that are drawn at random. The server keeps some decoded chunks, as h5py does."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        contestants: dict[str, Turn] = {}
        for kind in ("packed", "plain"):
            _write(folder / f"{kind}.h5", {"compression": "gzip", "compression_opts": 1} if kind == "packed" else {})
        stack.enter_context(h5feed_server(folder, 2, None, (), ("--uds", str(folder / "socket"))))
        feed = stack.enter_context(h5feed.connect(f"unix://{folder / 'socket'}"))
        for kind in ("packed", "plain"):
            volumes = stack.enter_context(h5py.File(folder / f"{kind}.h5"))["volume"]
            _check(feed[kind], volumes)
            contestants[f"{kind} crops"] = _crops(feed[kind])
            contestants[f"{kind} slices"] = _slices(volumes)
        return take_turns(contestants, rounds)


_OPTIONS: OrderOptions = {
    "crop": (_CROP, _CROP, _CROP),
    "shuffle": True,
    "weights": "weight",
    "epoch_rows": _SAMPLES,
    "fields": ["volume"],
}


def _crops(dataset: h5feed.Dataset) -> Turn:
    epochs = itertools.count()

    def turn() -> int:
        options: OrderOptions = {**_OPTIONS, "epoch": next(epochs)}
        return sum(len(batch.rows) for batch in dataset.batches(batch_size=_BATCH, connections=CONNECTIONS, **options))

    return turn


def _slices(volumes: h5py.Dataset) -> Turn:
    """A straightforward loop: one slice for each sample, into a batch that is used again."""
    out = np.empty((_BATCH, _CROP, _CROP, _CROP), np.uint8)
    random = np.random.default_rng(0)

    def turn() -> int:
        rows = random.integers(0, _VOLUMES, _SAMPLES).tolist()
        for number, row in enumerate(rows):
            i, j, k = random.integers(0, _SIZE - _CROP + 1, 3).tolist()
            volumes.read_direct(out, np.s_[row, i : i + _CROP, j : j + _CROP, k : k + _CROP], np.s_[number % _BATCH])
        return len(rows)

    return turn


def _check(dataset: h5feed.Dataset, volumes: h5py.Dataset) -> None:
    """What is measured must be right."""
    for batch in dataset.batches(batch_size=_BATCH, **_OPTIONS):
        for row, (i, j, k), part in zip(batch.rows, batch["__crop__"], batch["volume"], strict=True):
            np.testing.assert_array_equal(part, volumes[row, i : i + _CROP, j : j + _CROP, k : k + _CROP])


def _write(path: Path, options: Mapping[str, object]) -> None:
    """Smooth volumes with noise, which compress about as well as scans."""
    random = np.random.default_rng(0)
    ramp = np.arange(_SIZE, dtype=np.uint8)
    smooth = ramp[:, None, None] // 3 + ramp[:, None] // 3 + ramp // 3
    with h5py.File(path, "w") as file:
        volumes = file.create_dataset(
            "volume", (_VOLUMES, _SIZE, _SIZE, _SIZE), "u1", chunks=(1, _CHUNK, _CHUNK, _CHUNK), **options
        )
        file["weight"] = np.ones(_VOLUMES)
        for row in range(_VOLUMES):
            volumes[row] = smooth + random.integers(0, 12, smooth.shape, np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
