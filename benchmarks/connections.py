"""The number of connections that the client finds by itself, against the two that are best over the loopback."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import h5feed

from .data import BATCH, Files
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS, WORKERS, variants

_SECONDS = 1.0
"""Of a turn. Streams go on from turn to turn, as they do from epoch to epoch of a training loop."""

FIGURES = (Figure("default_vs_two_connections", variants("default"), variants("two"), 0.97),)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant."""
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Turn] = {}
        for variant in WORKERS:
            for name, connections in (("default", None), ("two", CONNECTIONS)):
                # With a client of its own: what it learns of the link is not for the other.
                feed = stack.enter_context(h5feed.connect(feeds[variant].url, local=False))
                dataset = feed[files.contiguous.stem]
                loader = dataset.loader(batch_size=BATCH, shuffle=True, connections=connections)
                contestants[variants(name)[variant]] = _turn(stack.enter_context(loader))
        return take_turns(contestants, rounds)


def _turn(loader: h5feed.Loader) -> Turn:
    batches = _endless(loader)

    def turn() -> int:
        rows = 0
        until = time.perf_counter() + _SECONDS
        while time.perf_counter() < until:
            next(batches)
            rows += BATCH
        return rows

    return turn


def _endless(loader: h5feed.Loader) -> Iterator[object]:
    while True:
        yield from loader
