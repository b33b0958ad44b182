"""Fill dense arrays with sparse rows, in the threads that fetch ahead."""

from __future__ import annotations

import threading

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool


def dense_fetch(fetch: Fetch[Batch], pool: BufferPool) -> Fetch[Batch]:
    """Wrap `fetch` to hand out dense arrays, in the calling thread."""

    def fetch_dense(block: Block, cancelled: threading.Event) -> list[Batch]:
        return [batch.densified(pool) for batch in fetch(block, cancelled)]

    return fetch_dense
