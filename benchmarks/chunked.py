"""Shuffled batches from chunks of every kind: one image a chunk by several filters, and chunks that fit badly."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5feed
import h5py
import hdf5plugin
import numpy as np
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.order_spec import OrderSpec

from . import local
from .data import BATCH, IMAGE, Files
from .measure import Figure, Rates, Turn, take_turns
from .served import WORKERS, epochs_of, variants
from .servers import h5feed_server

_ROWS = 2048
_BADLY_ROWS = 768
_TALL = 32
"""Images in a chunk of the badly fitting file."""

_WINDOW = 192
_CACHE_BYTES = 64 << 20
"""Holds two windows, and not the file."""

_FILTERS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "lzf": lambda: {"compression": "lzf"},
    "zstd": lambda: dict(hdf5plugin.Zstd(3)),
    "blosc2": lambda: dict(hdf5plugin.Blosc2("lz4", 5)),
    "bitshuffle": lambda: dict(hdf5plugin.Bitshuffle(cname="lz4")),
}

_ONE = "1 worker"


_DECODED_BY_CLIENT = {"over TCP": "pieces", "from files": "files"}
"""How the client gets chunks that it decodes itself, and the contestants that do."""


def _client(name: str) -> dict[str, str]:
    return {variant: f"{name} {way}" for variant, way in _DECODED_BY_CLIENT.items()}


def _figure(name: str, ours: str, theirs: str, target: float) -> Figure:
    return Figure(name, {_ONE: ours}, {_ONE: theirs}, target)


FIGURES = (
    *(Figure(f"{name}_vs_h5py_rows", variants(name), dict.fromkeys(WORKERS, f"{name} h5py"), 2.0) for name in _FILTERS),
    *(Figure(f"{name}_vs_decode", variants(name), dict.fromkeys(WORKERS, f"{name} decode"), 0.65) for name in _FILTERS),
    *(
        Figure(f"{name}_client_vs_h5py_rows", _client(name), dict.fromkeys(_DECODED_BY_CLIENT, f"{name} h5py"), 2.0)
        for name in _FILTERS
    ),
    _figure("tall_cached_vs_h5py_rows", "tall cached", "tall h5py", 60.0),
    _figure("tall_window_vs_decode", "tall window", "tall decode", 0.6),
    _figure("auto_cached_vs_h5py_rows", "auto cached", "auto h5py", 100.0),
    _figure("auto_window_vs_decode", "auto window", "auto decode", 0.6),
    *(
        Figure(
            f"{name}_window_client_vs_decode", _client(name), dict.fromkeys(_DECODED_BY_CLIENT, f"{name} decode"), 0.6
        )
        for name in ("tall", "auto")
    ),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant."""
    # Hidden from the servers of the other groups.
    folder = files.folder / ".chunked"
    _write(folder)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        roomy = stack.enter_context(h5feed_server(folder, 1, H5FEED_CHUNK_CACHE_BYTES=str(1 << 30)))
        tight = stack.enter_context(h5feed_server(folder, 1, H5FEED_CHUNK_CACHE_BYTES=str(_CACHE_BYTES)))
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-socket-"))) / "socket"
        pair = stack.enter_context(h5feed_server(folder, 2, None, (), ("--uds", str(path))))
        doubled = stack.enter_context(h5feed.connect(pair.url, local=False))
        near = stack.enter_context(h5feed.connect(f"unix://{path}"))
        cached = stack.enter_context(h5feed.connect(roomy.url, local=False))
        windowed = stack.enter_context(h5feed.connect(tight.url, local=False))
        contestants: dict[str, Turn] = {}
        for name in (*_FILTERS, "tall", "auto"):
            path = folder / f"{name}.h5"
            images = stack.enter_context(h5py.File(path, locking=False))["images"]
            badly = name not in _FILTERS
            if badly:
                contestants[f"{name} cached"] = epochs_of(cached[name], BATCH)
                contestants[f"{name} window"] = epochs_of(windowed[name], BATCH, _WINDOW)
            else:
                contestants[f"{name} 1"] = epochs_of(cached[name], BATCH)
                contestants[f"{name} 2"] = epochs_of(doubled[name], BATCH)
            window = _WINDOW if badly else None
            contestants[f"{name} pieces"] = epochs_of(doubled[name], BATCH, window, "client")
            contestants[f"{name} files"] = epochs_of(near[name], BATCH, window)
            contestants[f"{name} decode"] = local.decoding_all(path, threads)
            contestants[f"{name} h5py"] = _few_rows(images) if badly else local.by_row(images, BATCH, 4)
        rates = take_turns(contestants, rounds)
    for name in ("tall", "auto"):
        _print_cost(folder, name)
    return rates


def _few_rows(images: h5py.Dataset) -> Turn:
    """h5py decodes whole chunks for every row: so few rows tell."""
    out = np.zeros(images.shape[1:], images.dtype)
    random = np.random.default_rng(0)

    def turn() -> int:
        for row in random.integers(0, len(images), 6).tolist():
            images.read_direct(out, np.s_[row])
        return 6

    return turn


def _print_cost(folder: Path, name: str) -> None:
    """What a windowed epoch decodes for every byte that it serves, and how well it mixes rows sorted by class."""
    settings = Settings(data_dir=folder, cache_dir=folder / "cache", chunk_cache_bytes=_CACHE_BYTES)
    services = Services.start(settings)
    try:
        services.catalog.dataset_within(settings.inspect_timeout, name)
        mixed = {}
        for window in (_WINDOW, None):
            plan = services.batcher.plan(name, OrderSpec(shuffle=True, window=window, fields="images"), BATCH, None)
            served = 0
            before = services.batcher.reader.decoded_bytes
            classes = []
            for index in range(plan.grid.batches):
                buffer = services.pool.lease(plan.nbytes(index, index + 1))
                plan.fill(index, index + 1, buffer)
                served += len(buffer)
                rows = plan.order.rows(index, index + 1)[0]
                classes.append(len(set((rows // (_BADLY_ROWS // 64)).tolist())))
            mixed[window] = float(np.mean(classes[:-1]))
            if window is not None:
                decoded = services.batcher.reader.decoded_bytes - before
        print(
            f"{name}, window of {_WINDOW} rows: {decoded / served:.2f} bytes decoded per byte served; if rows are "
            f"sorted by 64 classes, a batch holds {mixed[_WINDOW]:.1f} of them ({mixed[None]:.1f} without a window)",
            flush=True,
        )
    finally:
        services.close()


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_FILTERS, "tall", "auto"):
        path = folder / f"{name}.h5"
        if path.exists():
            continue
        rows = _ROWS if name in _FILTERS else _BADLY_ROWS
        began = time.monotonic()
        with h5py.File(path.with_suffix(".tmp"), "w", libver="latest") as file:
            options: dict[str, Any] = {"chunks": (1, *IMAGE)}
            if name in _FILTERS:
                options |= _FILTERS[name]()
            else:
                options = {"chunks": (_TALL, *IMAGE) if name == "tall" else True, "compression": "gzip"}
                options["compression_opts"] = 1
            images = file.create_dataset("images", (rows, *IMAGE), np.uint8, **options)
            for start in range(0, rows, 64):
                images[start : start + 64] = _pictures(start)
            file["labels"] = np.arange(rows) % 10
        path.with_suffix(".tmp").rename(path)
        print(f"  wrote {path.name} in {time.monotonic() - began:.1f} s", flush=True)


def _pictures(seed: int) -> Any:
    """Smooth pictures with noise in their low bits: every filter makes them smaller, none to nothing."""
    random = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(IMAGE[0]), np.arange(IMAGE[1]))[None, :, :, None]
    noise = random.integers(0, 4, (64, *IMAGE))
    return ((ramp // 4 * 4 + noise) % 256).astype(np.uint8)
