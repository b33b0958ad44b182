"""Batches with a cache and without one, and what a client asks for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5feed
import httpx
import numpy as np
from h5feed.batch import Batch


class Asked:
    """Keeps what the client asked for."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> None:
        self.requests.append(request)

    @property
    def single_rows(self) -> list[int]:
        posts = [json.loads(request.content) for request in self.requests if request.method == "POST"]
        return [row for post in posts for row in post["rows"]]

    @property
    def batches(self) -> int:
        """Requests for whole batches, with fields."""
        return sum(
            "/batches" in request.url.path and request.url.params.get("fields") != "" for request in self.requests
        )


def same(ours: Batch, theirs: Batch) -> None:
    assert list(ours) == list(theirs)
    assert (ours.index, ours.epoch, ours.revision) == (theirs.index, theirs.epoch, theirs.revision)
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    np.testing.assert_array_equal(ours.row_offsets, theirs.row_offsets)
    assert (ours.weight is None) == (theirs.weight is None)
    if ours.weight is not None:
        np.testing.assert_array_equal(ours.weight, theirs.weight)
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        assert ours[name].tobytes() == theirs[name].tobytes()


def all_same(dataset: h5feed.Dataset, cache: Any, **options: Any) -> int:
    count = 0
    ours, theirs = dataset.batches(cache=cache, **options), dataset.batches(**options)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)
        count += len(mine.rows)
    return count


def damage(path: Path, how: str) -> None:
    with path.open("r+b") as file:
        size = path.stat().st_size
        if how == "rows lost":
            # What a power failure leaves: the sums were written back, half of the data was not.
            for start in range(0, size, 8192):
                file.seek(start)
                file.write(bytes(min(4096, size - start)))
        elif how == "a few bytes":
            for start in range(100, size, 5000):
                file.seek(start)
                file.write(b"\xa5\x5a")
        elif how == "cut off":
            file.truncate(size // 2)
        elif how == "empty":
            file.truncate(0)
        elif how == "longer":
            file.truncate(size + 1)
        elif how == "a bit":
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 4]))
    if how == "a FIFO":
        path.unlink()
        os.mkfifo(path)
