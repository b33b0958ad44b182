"""Recycled buffers are never handed out while anybody still refers to them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from h5feed.buffers import PAGE, BufferPool, PoolExhausted

SIZE = 100_000


@pytest.mark.parametrize(
    "keep",
    [
        lambda lease: lease,
        lambda lease: lease[10:20],
        lambda lease: lease[8:808].view("<f4").reshape(2, 100)[1:, ::3],
        lambda lease: memoryview(lease),
        lambda lease: memoryview(lease[5:])[7:9],
        lambda lease: np.frombuffer(memoryview(lease), np.uint8),
    ],
)
def test_not_reused_while_referred_to(keep: Any) -> None:
    """A lease, a view, a view of a view, a memoryview of any: each keeps the buffer; when it goes, it comes back."""
    pool = BufferPool(10 * SIZE)
    lease = pool.lease(SIZE)
    address = lease.ctypes.data
    kept = keep(lease)
    del lease
    other = pool.lease(SIZE)
    assert other.ctypes.data != address
    del kept
    assert pool.lease(SIZE).ctypes.data == address


def test_alignment_and_size() -> None:
    """A lease has the length asked for and begins on a page."""
    pool = BufferPool(1 << 24)
    for nbytes in (1, 4095, 4097, 1 << 20):
        lease = pool.lease(nbytes)
        assert lease.shape == (nbytes,) and lease.ctypes.data % PAGE == 0


def test_bounded() -> None:
    """Beyond the bound a lease waits, then fails; when room comes free in time, it is given."""
    pool = BufferPool(3 * SIZE)
    held = [pool.lease(SIZE), pool.lease(SIZE)]
    with pytest.raises(PoolExhausted):
        pool.lease(SIZE, timeout=0.05)
    threading.Timer(0.05, held.clear).start()
    assert len(pool.lease(SIZE, timeout=60)) == SIZE
    assert pool.nbytes <= 3 * SIZE


def test_idle_memory_is_let_go() -> None:
    """Buffers of a size that is not asked for any more make room for others."""
    pool = BufferPool(1 << 22, max_idle_bytes=1 << 20)
    for _ in range(3):
        pool.lease(1 << 21)
    pool.lease(1000)
    assert pool.nbytes < 1 << 20 and pool.bytes_in_use == 0


def test_many_threads() -> None:
    """Threads that write their number into leases and read it back never see another's."""
    pool = BufferPool(64 * SIZE)
    wrong = []

    def work(number: int) -> None:
        for _ in range(300):
            lease = pool.lease(SIZE // 10)
            view = lease[100:]
            del lease
            view[...] = number
            if not (view == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
