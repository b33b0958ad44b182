"""Statistics of 1.26 GB of images, read from the file and sent over HTTP, against numpy on an array in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping

import h5feed
import h5py
import numpy as np
import numpy.typing as npt

from .data import CONTIGUOUS_ROWS, Files
from .measure import Figure, Rates
from .servers import h5feed_server

_NUMPY_ROWS = CONTIGUOUS_ROWS // 4
"""numpy needs a minute for all of them; in a quarter, what it makes on the way stays smaller, which helps it."""

_ROUNDS = 3
_AGAIN = 20

MAX_GROWTH = 150 << 20
"""Bytes by which statistics may raise the memory of a worker."""

FIGURES = (
    Figure("stats_vs_numpy_in_memory", {"1 worker": "first"}, {"1 worker": "numpy"}, 3.0),
    Figure("stats_again_vs_first", {"1 worker": "again"}, {"1 worker": "first"}, 50.0),
    Figure("stats_memory_left", {"1 worker": "allowed"}, {"1 worker": "grown"}, 1.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant; and bytes by which a worker's memory may grow, and by which it did."""
    rates: dict[str, list[float]] = {name: [] for name in ("first", "again", "numpy", "allowed", "grown")}
    with h5py.File(files.contiguous) as file:
        images = file["images"][:_NUMPY_ROWS]
    for _ in range(min(rounds, _ROUNDS)):
        # A server that knows nothing yet, each time.
        with h5feed_server(files.folder, 1) as server, h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed[files.contiguous.stem]
            dataset.batch(0)
            before = server.reset_peaks()[0]
            began = time.perf_counter()
            stats = dataset.stats(field="images")
            rates["first"].append(stats.rows / (time.perf_counter() - began))
            rates["allowed"].append(MAX_GROWTH)
            rates["grown"].append(max(1, server.worker_peaks()[0] - before))
            began = time.perf_counter()
            for _ in range(_AGAIN):
                dataset.stats(field="images")
            rates["again"].append(_AGAIN * stats.rows / (time.perf_counter() - began))
            first_quarter = dataset.stats(
                "train", test=CONTIGUOUS_ROWS - _NUMPY_ROWS, split_shuffle=False, field="images"
            )
        began = time.perf_counter()
        found = [_by_numpy(images[..., channel]) for channel in range(images.shape[-1])]
        rates["numpy"].append(len(images) / (time.perf_counter() - began))
        for channel, (mean, std, counts) in zip(first_quarter["channels"], found, strict=True):
            assert np.isclose(channel["mean"], mean, rtol=1e-12) and np.isclose(channel["std"], std, rtol=1e-9)
            assert channel["histogram"]["counts"] == counts.tolist(), "the histogram differs from numpy's"
    return rates


def _by_numpy(values: npt.NDArray[np.uint8]) -> tuple[float, float, npt.NDArray[np.int64]]:
    counts, _ = np.histogram(values, bins=256, range=(0, 256))
    return float(np.mean(values)), float(np.std(values)), counts
