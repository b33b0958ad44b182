"""Shuffled batches of small images, many to an answer, against one request a batch and against h5py."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import h5feed
import h5py

from . import local
from .data import SMALL_BATCH, Files
from .measure import Figure, Rates, Turn, in_threads, take_turns
from .served import CONNECTIONS, WORKERS, epochs_of, split_work, variants

_SINGLE_BATCHES = 400
_FANCY_BATCHES = 200

FIGURES = (
    Figure("small_stream_vs_single", variants("stream"), variants("single"), 12.0),
    Figure("small_stream_vs_h5py", variants("stream"), dict.fromkeys(WORKERS, "h5py fancy"), 15.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant."""
    with h5py.File(files.small) as file:
        contestants: dict[str, Turn] = {}
        for variant in WORKERS:
            dataset = feeds[variant][files.small.stem]
            contestants[variants("stream")[variant]] = epochs_of(dataset, SMALL_BATCH)
            contestants[variants("single")[variant]] = _one_by_one(dataset)
        contestants["h5py fancy"] = local.by_selection(file["images"], SMALL_BATCH, _FANCY_BATCHES)
        return take_turns(contestants, rounds)


def _one_by_one(dataset: h5feed.Dataset) -> Turn:
    """Turns that ask for every batch by itself, in as many threads as the stream has connections."""
    epochs = itertools.count()

    def turn() -> int:
        epoch = next(epochs)

        def fetch(index: int) -> int:
            return len(dataset.batch(index, batch_size=SMALL_BATCH, shuffle=True, epoch=epoch).rows)

        return in_threads(split_work(_SINGLE_BATCHES, fetch), CONNECTIONS)

    return turn
