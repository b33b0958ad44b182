"""Fill dense arrays with sparse rows, and unpack numbers, in the threads that fetch ahead."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..stored.packing import Packing


def dense_fetch(fetch: Fetch[Batch], pool: BufferPool) -> Fetch[Batch]:
    """Wrap `fetch` to hand out dense arrays, in the calling thread."""

    def fetch_dense(block: Block, cancelled: threading.Event) -> list[Batch]:
        return [batch.densified(pool) for batch in fetch(block, cancelled)]

    return fetch_dense


def unpacked_fetch(fetch: Fetch[Batch], packings: Mapping[str, Packing]) -> Fetch[Batch]:
    """Wrap `fetch` to hand out unpacked numbers, in the calling thread."""

    def fetch_unpacked(block: Block, cancelled: threading.Event) -> list[Batch]:
        return [unpacked(batch, packings) for batch in fetch(block, cancelled)]

    return fetch_unpacked


def unpacked(batch: Batch, packings: Mapping[str, Packing]) -> Batch:
    """The batch with unpacked numbers in these fields."""
    return batch.with_fields(
        {name: packings[name].unpack(array) if name in packings else array for name, array in batch.items()}
    )
