"""Stratified splits of ten million labels, against scikit-learn alone, and against asking a second time."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from .data import Files
from .measure import Figure, Rates
from .servers import H5feedServer, h5feed_server

ROWS = 10_000_000
CLASSES = 10
_HELD = ROWS // 10
_AGAIN = 20
_ROUNDS = 2
"""scikit-learn needs eight seconds a round."""

MAX_GROWTH = 150_000_000
"""Bytes by which splitting may raise the memory of a worker."""

FIGURES = (
    Figure("split_10m_vs_sklearn", {"1 worker": "first"}, {"1 worker": "scikit-learn"}, 1 / 1.2),
    Figure("split_again_vs_first", {"1 worker": "again"}, {"1 worker": "first"}, 50.0),
    Figure("split_10m_memory_left", {"1 worker": "allowed"}, {"1 worker": "grown"}, 1.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Splits per second of every contestant; and the reciprocals of bytes of memory, allowed and used."""
    labels = np.random.default_rng(2).integers(0, CLASSES, ROWS)
    rates: dict[str, list[float]] = {name: [] for name in ("first", "again", "scikit-learn", "allowed", "grown")}
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent) as name:
        with h5py.File(Path(name) / "labels.h5", "w") as file:
            file["x"], file["labels"] = np.zeros((ROWS, 1), np.uint8), labels
        for number in range(min(rounds, _ROUNDS)):
            options: dict[str, Any] = {"test": 0.1, "val": 0.1, "split_seed": number}
            # A server that knows nothing yet, each time.
            with h5feed_server(Path(name), 1) as server, h5feed.connect(server.url, deadline=60) as feed:
                dataset = feed["labels"]
                dataset.batch(0)
                before = _reset_peak(server)
                began = time.perf_counter()
                answer = dataset.splits(**options)
                rates["first"].append(1 / (time.perf_counter() - began))
                rates["allowed"].append(MAX_GROWTH)
                rates["grown"].append(max(1, server.worker_peaks()[0] - before))
                again = []
                for _ in range(_AGAIN):
                    began = time.perf_counter()
                    dataset.splits(**options)
                    again.append(1 / (time.perf_counter() - began))
                rates["again"].append(median(again))
            began = time.perf_counter()
            rest, test = train_test_split(np.arange(ROWS), test_size=_HELD, stratify=labels, random_state=number)
            train, val = train_test_split(rest, test_size=_HELD, stratify=labels[rest], random_state=number)
            rates["scikit-learn"].append(1 / (time.perf_counter() - began))
            for split, rows in (("train", train), ("val", val), ("test", test)):
                assert answer["splits"][split]["digest"] == _digest(rows), (
                    f"the {split} split differs from scikit-learn's"
                )
    return rates


def _reset_peak(server: H5feedServer) -> int:
    """Let the peak of the worker's memory be what it has now, in bytes."""
    (pid,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _digest(rows: npt.NDArray[np.int64]) -> str:
    return hashlib.blake2b(np.sort(rows).astype("<i8").tobytes(), digest_size=8).hexdigest()
