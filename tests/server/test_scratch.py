"""Scratch memory of threads: used again, bounded, and with room before it."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from h5feed.stored.scratch import SCRATCH_BYTES, Scratch


def test_a_buffer_is_used_again_by_its_thread_alone() -> None:
    scratch = Scratch()
    first = scratch.take("a", 100)
    assert len(first) == 100
    assert np.shares_memory(first, scratch.take("a", 50)) and not np.shares_memory(first, scratch.take("b", 100))
    with ThreadPoolExecutor(1) as threads:
        assert not np.shares_memory(first, threads.submit(scratch.take, "a", 100).result())


def test_a_great_one_lives_as_long_as_it_is_in_use() -> None:
    scratch = Scratch()
    great = scratch.take("a", SCRATCH_BYTES + 1)
    base = great.base
    assert base is not None
    lives = weakref.ref(base)
    framed = scratch.with_headroom(great[:10], 24)
    assert framed is not None and len(framed) == 34 and np.shares_memory(framed, great)
    del great, base, framed
    gc.collect()
    assert lives() is None


def test_only_its_own_memory_has_room_before_it() -> None:
    scratch = Scratch()
    mine = scratch.take("a", 10)
    framed = scratch.with_headroom(mine, 4)
    assert framed is not None
    framed[:4] = 1
    mine[:] = 2
    assert framed.tolist() == [1] * 4 + [2] * 10
    assert scratch.with_headroom(np.zeros(10, np.uint8)[:], 4) is None
    assert Scratch().with_headroom(mine, 4) is None
