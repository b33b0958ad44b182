"""What every figure does with the real server: turns that drain epochs, in variants of one and two workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import h5feed
from h5feed.options import OrderOptions

from .measure import Turn

CONNECTIONS = 2
"""Connections of every contestant that has any."""

WORKERS = {"1 worker": 1, "2 workers": 2}
"""Variants of the server."""


def variants(contestant: str) -> dict[str, str]:
    """Variant to the name of that contestant in it."""
    return {variant: f"{contestant} {workers}" for variant, workers in WORKERS.items()}


def epochs_of(
    dataset: h5feed.Dataset,
    batch_size: int,
    window: int | None = None,
    decode: Literal["auto", "server", "client"] = "auto",
) -> Turn:
    """Turns that take all batches of one shuffled epoch, another one each time."""
    options: OrderOptions = {"shuffle": True, "decode": decode}
    if window is not None:
        options["window"] = window
    epochs = itertools.count()

    def turn() -> int:
        rows = 0
        options["epoch"] = next(epochs)
        for batch in dataset.batches("all", batch_size=batch_size, connections=CONNECTIONS, **options):
            rows += len(batch.rows)
        return rows

    return turn


def split_work(batches: int, fetch: Callable[[int], int], threads: int = CONNECTIONS) -> Callable[[int], int]:
    """Work of thread number k of `threads`: ``fetch(index)`` for every batch index that is its own."""

    def work(number: int) -> int:
        return sum(fetch(index) for index in range(number, batches, threads))

    return work
