"""Copies to a CUDA device: from page-locked (pinned) host memory, in a stream of their own, while the loop computes."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from ..batch import Batch
from ..buffers import Bytes
from .tensors import tensors_of
from .tree import mapped

LEAST_LOCKED_BYTES = 1 << 20
"""Smaller buffers are not locked: locking them would take longer than it saves."""

_PORTABLE = 1
"""cudaHostRegisterPortable: the memory is page-locked for all devices."""

logger = logging.getLogger("h5feed")


class Mark(Protocol):
    """An event recorded in a stream, such as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until all work before it is done."""


class Card(Protocol):
    """The operations on a device that `moved` needs."""

    def lock(self, address: int, nbytes: int) -> str | None:
        """Page-lock memory; returns an error message if that fails."""

    def unlock(self, address: int) -> None:
        """Undo `lock`."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start to copy a tensor to the device, in the stream for copies."""

    def copied(self) -> Mark:
        """Record an event after all copies that were started."""

    def hand_over(self, tensors: list[torch.Tensor], copied: Mark) -> None:
        """Make later work of the loop on the device wait for these copies."""

    def used(self) -> Mark:
        """Record an event after all work that the loop has started on the device."""


class CudaCard:
    """A CUDA device of this process, with a stream for copies."""

    def __init__(self, device: torch.device) -> None:
        # Without an index, the current device, which the user may change later.
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self._device)
        self._cudart = torch.cuda.cudart()

    def lock(self, address: int, nbytes: int) -> str | None:
        with torch.cuda.device(self._device):
            error = self._cudart.cudaHostRegister(address, nbytes, _PORTABLE)
        return self._cudart.cudaGetErrorString(error) if int(error) else None

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            self._cudart.cudaHostUnregister(address)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def copied(self) -> Mark:
        mark: Mark = self._stream.record_event()
        return mark

    def hand_over(self, tensors: list[torch.Tensor], copied: Mark) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in tensors:
            # Otherwise, the allocator could reuse its memory for the next copy while the loop still computes with it.
            tensor.record_stream(current)

    def used(self) -> Mark:
        mark: Mark = torch.cuda.current_stream(self._device).record_event()
        return mark


class LockedMemory:
    """New memory that is page-locked for as long as it exists, for a `BufferPool`.

    CUDA may read it at any time until a copy is done. Whoever starts a copy must keep the array until then, as `moved`
    does.
    """

    def __init__(self, card: Card) -> None:
        self._card = card
        self._is_refused = False

    def allocate(self, nbytes: int) -> Bytes:
        """(nbytes,) uint8; ordinary memory if it is small, or if it cannot be locked."""
        if nbytes < LEAST_LOCKED_BYTES or self._is_refused:
            return np.empty(nbytes, np.uint8)
        # MAP_SHARED: a write to a private page after a fork makes a copy of it, and the device would read the old one.
        root = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        address = root.ctypes.data
        error = self._lock(address, nbytes)
        if error is None:
            ending = weakref.finalize(root, _unlock, self._card, address, os.getpid())
            # At exit, CUDA may be gone before the array, and the system frees everything.
            ending.atexit = False
        else:
            self._is_refused = True
            logger.warning("batches are copied to the GPU from ordinary memory, which is slower: %s", error)
        return root

    def _lock(self, address: int, nbytes: int) -> str | None:
        # In a thread of its own: CUDA keeps the last error of each thread, and torch would raise it after its next
        # kernel.
        errors: list[str | None] = []

        def lock() -> None:
            try:
                errors.append(self._card.lock(address, nbytes))
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=lock, name="h5feed-lock")
        thread.start()
        thread.join()
        return errors[0] if errors else "locking memory failed"


def _unlock(card: Card, address: int, pid: int) -> None:
    # The lock is the parent's: CUDA does not survive a fork.
    if os.getpid() == pid:
        card.unlock(address)


def moved(batches: Iterable[Any], card: Card, ahead: int) -> Iterator[Any]:
    """Batches on the device, `ahead` of them beyond the current one; see `h5feed.torch.to_device`.

    A batch in the host's memory is held until it is copied. If the computation falls behind, the loop waits: at most
    `ahead` + 2 of the batches that it got are not computed yet.
    """
    waiting: deque[tuple[Any, Mark]] = deque()
    held: deque[tuple[Mark, Any]] = deque()
    used: deque[Mark] = deque()
    source = iter(batches)

    def next_of_waiting() -> Any:
        tree, copied = waiting.popleft()
        card.hand_over(_tensors_in(tree), copied)
        return tree

    try:
        for batch in source:
            host = on_host(batch)
            on_device = mapped(lambda leaf: card.copy(leaf) if isinstance(leaf, torch.Tensor) else leaf, host)
            copied = card.copied()
            waiting.append((on_device, copied))
            held.append((copied, host))
            del batch, host, on_device
            while held and held[0][0].query():
                held.popleft()
            if len(waiting) > ahead:
                yield next_of_waiting()
                used.append(card.used())
                if len(used) > ahead + 1:
                    used.popleft().synchronize()
        while waiting:
            yield next_of_waiting()
    finally:
        # Also after a `break` or an error: the memory is recycled when nobody holds it. If waiting fails, CUDA has
        # failed, and nothing is copied any more.
        with contextlib.suppress(RuntimeError):
            card.copied().synchronize()
        held.clear()
        close = getattr(source, "close", None)
        if close is not None:
            close()


def on_host(batch: Any) -> Any:
    """The batch with tensors in the place of arrays; a `Batch` becomes a dict."""
    return tensors_of(dict(batch) if isinstance(batch, Batch) else batch, False)


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, tree)
    return found
