"""From nothing to a whole catalogue: files inspected for the first time, and layouts found in the cache folder."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import h5feed
import h5py
import numpy as np
from h5feed.stored.layout import load_layout
from h5feed_server.storage.hdf5.inspector import Inspector

from .data import Files
from .measure import Figure, Rates
from .servers import h5feed_server

_FILES = 1_000
_CHUNKS = 1_000_000
_ROUNDS = 3
"""Each inspects everything anew."""

_ONE = "2 workers"

FIGURES = (
    Figure("catalogue_cached_vs_first", {_ONE: "catalogue cached"}, {_ONE: "catalogue first"}, 10.0),
    Figure("layout_load_vs_inspect", {_ONE: "chunks load"}, {_ONE: "chunks inspect"}, 75.0),
)
"""In files and in chunks each second, without the time that a server with nothing to serve takes to start."""


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    rates: dict[str, list[float]] = {
        name: [] for figure in FIGURES for name in (*figure.ours.values(), *figure.theirs.values())
    }
    with tempfile.TemporaryDirectory(prefix="h5feed-cold-") as base:
        many, none = Path(base) / "many", Path(base) / "none"
        none.mkdir()
        many.mkdir()
        for number in range(_FILES):
            # Numbered, they would be parts of one dataset.
            name = f"{number:04d}".translate(str.maketrans("0123456789", "abcdefghij"))
            with h5py.File(many / f"{name}.h5", "w") as file:
                file["x"] = np.full((20, 8), number, np.float32)
                file["y"] = np.arange(20) % 3
        big = _in_many_chunks(Path(base) / "chunks.h5")
        for _ in range(min(rounds, _ROUNDS)):
            empty = _seconds_until_listed(none, Path(base) / "cache-none")
            for name in ("catalogue first", "catalogue cached"):
                seconds = _seconds_until_listed(many, Path(base) / "cache")
                rates[name].append(_FILES / max(seconds - empty, 1e-3))
            shutil.rmtree(Path(base) / "cache")
            with Inspector(timeout=60) as inspector:
                began = time.perf_counter()
                layout = inspector.inspect(str(big))
                inspected = time.perf_counter()
                assert load_layout(layout).arrays[0].rows == _CHUNKS
                rates["chunks load"].append(_CHUNKS / (time.perf_counter() - inspected))
                rates["chunks inspect"].append(_CHUNKS / (inspected - began))
    return rates


def _in_many_chunks(path: Path) -> Path:
    """A file with an array of a million chunks, none of which was written to."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((1, 4))
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((_CHUNKS, 4), (h5py.h5s.UNLIMITED, 4))
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, properties)
    return path


def _seconds_until_listed(folder: Path, cache: Path) -> float:
    """From the start of a server to a catalogue in which nothing is missing."""
    began = time.perf_counter()
    with h5feed_server(folder, 2, cache, H5FEED_PROVISIONAL_BYTES="") as server, h5feed.connect(server.url) as feed:
        while any(entry["status"] == "preparing" for entry in feed.datasets()):
            time.sleep(0.02)
        return time.perf_counter() - began
