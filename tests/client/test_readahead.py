"""Read-ahead: in order, bounded, errors in their place, no thread left."""

from __future__ import annotations

import random
import threading
import time
from collections import deque

import pytest
from conftest import wait_until
from h5feed.readahead import Block, ReadAhead, blocks_of


def numbers(block: Block, cancelled: threading.Event) -> list[int]:
    time.sleep(random.random() * 0.003)
    return list(range(block.start, block.stop))


def ahead(fetch: object, batches: int, max_bytes: int = 10_000, connections: int = 4) -> ReadAhead[int]:
    blocks = blocks_of(0, batches, 100, 300)
    return ReadAhead(fetch, blocks, connections=connections, max_bytes=max_bytes, deadline=5)  # type: ignore[arg-type]


def test_delivered_in_order() -> None:
    """Whatever comes first, batches are delivered in order, each once."""
    assert list(ahead(numbers, 100)) == list(range(100))
    assert list(ahead(numbers, 0)) == []


def test_small_batches_share_a_block() -> None:
    """Small batches are asked for together, big ones alone, and none is left out."""
    assert [(b.start, b.stop) for b in blocks_of(0, 7, 100, 300)] == [(0, 3), (3, 6), (6, 7)]
    assert [(b.start, b.stop) for b in blocks_of(0, 2, 1000, 300)] == [(0, 1), (1, 2)]
    assert [(b.start, b.stop) for b in blocks_of(0, 4, 1, 300, start=2)] == [(2, 4)]


def test_bounded_in_bytes() -> None:
    """No more is fetched ahead than the bound; one block always is."""
    for bound, expected in ((900, 3), (1, 1)):
        fetched: list[Block] = []

        def fetch(block: Block, cancelled: threading.Event, fetched: list[Block] = fetched) -> list[int]:
            fetched.append(block)
            return numbers(block, cancelled)

        stream = ahead(fetch, 100, bound)
        wait_until(lambda fetched=fetched, expected=expected: len(fetched) == expected)  # type: ignore[misc]
        time.sleep(0.05)
        assert len(fetched) == expected
        stream.close()


def test_an_error_comes_in_its_place() -> None:
    """Batches before a failed block are delivered, then its error is raised."""

    def fetch(block: Block, cancelled: threading.Event) -> list[int]:
        if block.start == 9:
            raise OSError("block 9")
        return numbers(block, cancelled)

    stream: ReadAhead[int] = ahead(fetch, 100)
    seen: list[int] = []
    with pytest.raises(OSError, match="block 9"):
        deque(map(seen.append, stream))
    assert seen == list(range(9))


def test_threads_end() -> None:
    """Closing, dropping and exhausting it ends its threads, and tells a fetch under way."""
    told = threading.Event()

    def slow(block: Block, cancelled: threading.Event) -> list[int]:
        if cancelled.wait(5):
            told.set()
        return []

    stream = ahead(slow, 100)
    stream.close()
    wait_until(told.is_set)
    dropped = ahead(numbers, 100)
    next(dropped)
    del dropped
    list(ahead(numbers, 20))
    wait_until(lambda: not any(thread.name.startswith("h5feed-readahead") for thread in threading.enumerate()))
