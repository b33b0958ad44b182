"""Batches with a cache and without one, and what a client asks for."""

from __future__ import annotations

import json
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
