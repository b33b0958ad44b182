"""Later epochs from the local cache, against the same loop over arrays in memory with `np.take`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping

import h5feed
import h5py
import numpy as np
import numpy.typing as npt

from .data import BATCH, Files
from .measure import Figure, Rates, Turn, take_turns

_VARIANT = "2 workers"

_BIG_ROWS = 2048
"""Rows of the big images that are cached: 403 MB."""

_PASSES = 4
"""Passes of one turn, one after the other as in training."""

FIGURES = tuple(
    Figure(f"cached_{name}_vs_memory", {_VARIANT: f"cached {name}"}, {_VARIANT: f"memory {name}"}, 0.9)
    for name in ("thumbnails", "images")
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant; the first turn, which warms up, fills the cache."""
    feed = feeds[_VARIANT]
    contestants: dict[str, Turn] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-rows-"))
        for name, path, limit in (
            ("thumbnails", files.thumbnails, None),
            ("images", files.contiguous, _BIG_ROWS),
        ):
            contestants[f"cached {name}"] = _cached(feed[path.stem], folder, limit)
            with h5py.File(path) as file:
                contestants[f"memory {name}"] = _in_memory(file["images"][:limit], file["labels"][:limit])
        return take_turns(contestants, rounds)


def _cached(dataset: h5feed.Dataset, folder: str, limit: int | None) -> Turn:
    loader = dataset.loader(batch_size=BATCH, shuffle=True, limit=limit, cache=dataset.cache(folder, 4 << 30))

    def turn() -> int:
        rows = sum(len(x) for _ in range(_PASSES) for x, _ in loader)
        # Nothing may be read ahead while the others have their turn.
        loader.close()
        return rows

    return turn


def _in_memory(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Turn:
    random = np.random.default_rng(0)

    def batches() -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
        order = random.permutation(len(images))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield np.take(images, rows, axis=0), np.take(labels, rows)

    return lambda: sum(len(x) for _ in range(_PASSES) for x, _ in batches())
