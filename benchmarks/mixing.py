"""A mixture of two datasets, and one dataset with the same rows: what mixing costs."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
from h5feed.options import OrderOptions

from .data import Files
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS
from .servers import h5feed_server

_TWO = "2 workers"
_ROWS = {"one": 4000, "other": 2000}
_KINDS = {"image": (96, 96, 3), "record": (16,)}
"""Shapes of large and of small rows."""
_BATCH = 64

FIGURES = tuple(
    Figure(f"mixing_{kind}s_vs_one", {_TWO: f"mixed {kind}s"}, {_TWO: f"{kind}s of one dataset"}, target)
    for kind, target in (("image", 0.6), ("record", 0.3))
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of shuffled epochs: the same rows, from two datasets or from one."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        begin = 0
        for name, rows in _ROWS.items():
            _write(folder / f"{name}.h5", range(begin, begin + rows))
            begin += rows
        _write(folder / "whole.h5", range(begin))
        stack.enter_context(h5feed_server(folder, 2, None, (), ("--uds", str(folder / "socket"))))
        feed = stack.enter_context(h5feed.connect(f"unix://{folder / 'socket'}"))
        mixture, whole = feed.mix(dict(_ROWS)), feed["whole"]
        contestants: dict[str, Turn] = {}
        for kind in _KINDS:
            _check(mixture, kind)
            contestants[f"mixed {kind}s"] = _epochs(mixture, kind)
            contestants[f"{kind}s of one dataset"] = _epochs(whole, kind)
        return take_turns(contestants, rounds)


def _epochs(samples: h5feed.Dataset | h5feed.Mixture, kind: str) -> Turn:
    epochs = itertools.count()

    def turn() -> int:
        options: OrderOptions = {"fields": [kind, "number"], "shuffle": True, "epoch": next(epochs)}
        return sum(len(batch.rows) for batch in samples.batches(batch_size=_BATCH, connections=CONNECTIONS, **options))

    return turn


def _check(mixture: h5feed.Mixture, kind: str) -> None:
    """What is measured must be right: each row once, with its own values."""
    numbers = []
    for batch in mixture.batches(batch_size=_BATCH, fields=[kind, "number"], shuffle=True):
        numbers += batch["number"].tolist()
        np.testing.assert_array_equal(batch[kind][:, 0], _rows(batch["number"], kind)[:, 0])
    assert sorted(numbers) == list(range(sum(_ROWS.values())))


def _rows(numbers: Any, kind: str) -> Any:
    """Rows of a field whose first values tell their number."""
    shape = _KINDS[kind]
    first = np.asarray(numbers).reshape(-1, *[1] * len(shape))
    return ((first + np.arange(np.prod(shape)).reshape(shape)) % 251).astype(np.uint8)


def _write(path: Path, numbers: range) -> None:
    with h5py.File(path, "w") as file:
        file["number"] = np.array(numbers)
        for kind in _KINDS:
            file[kind] = _rows(numbers, kind)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
