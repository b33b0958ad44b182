"""Rows of ten million that meet a condition, against reading and comparing the column with h5py and numpy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import h5feed
import h5py
import numpy as np

from .data import Files
from .measure import Figure, Rates
from .servers import h5feed_server

ROWS = 10_000_000
CLASSES = 10
_AGAIN = 20
_PAGE = 50

SOON = 0.005
"""Seconds within which what is known is to be answered."""

FIGURES = (
    Figure("filter_10m_vs_numpy", {"1 worker": "first"}, {"1 worker": "numpy"}, 1 / 1.5),
    Figure("filter_10m_again", {"1 worker": "again"}, {"1 worker": "soon"}, 1.0),
    Figure("filter_10m_other_page", {"1 worker": "page"}, {"1 worker": "soon"}, 1.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Answers per second: the first page of rows of a condition that is new, again, and a page in the middle."""
    labels = np.random.default_rng(2).integers(0, CLASSES, ROWS)
    rates: dict[str, list[float]] = {name: [] for name in ("first", "again", "page", "numpy", "soon")}
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent) as name:
        path = Path(name) / "labels.h5"
        with h5py.File(path, "w") as file:
            file["x"], file["labels"] = np.zeros((ROWS, 1), np.uint8), labels
        with h5feed_server(Path(name), 1) as server, h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["labels"]
            dataset.batch(0, fields=[])
            # Rounds of which the condition is new: the first one warms both up.
            for number in range(min(rounds + 1, CLASSES)):
                began = time.perf_counter()
                with h5py.File(path) as file:
                    passes = file["labels"][:] == number
                by_numpy = 1 / (time.perf_counter() - began)
                options: dict[str, Any] = {"where": f"labels = {number}", "batch_size": _PAGE, "fields": []}
                began = time.perf_counter()
                batch = dataset.batch(0, **options)
                first = 1 / (time.perf_counter() - began)
                rows = np.flatnonzero(passes)
                np.testing.assert_array_equal(batch.rows, rows[:_PAGE])
                again, page = [], []
                for turn in range(_AGAIN):
                    began = time.perf_counter()
                    dataset.batch(0, **options)
                    again.append(1 / (time.perf_counter() - began))
                    index = len(rows) // _PAGE // 2 + turn
                    began = time.perf_counter()
                    batch = dataset.batch(index, **options)
                    page.append(1 / (time.perf_counter() - began))
                    np.testing.assert_array_equal(batch.rows, rows[index * _PAGE : (index + 1) * _PAGE])
                if number:
                    for key, rate in (("numpy", by_numpy), ("first", first), ("soon", 1 / SOON)):
                        rates[key].append(rate)
                    rates["again"].append(median(again))
                    rates["page"].append(median(page))
    return rates
