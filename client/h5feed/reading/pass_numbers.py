"""Numbers of passes that several processes take part in: the workers of a torch DataLoader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch

_PASSES_KNOWN = 16
"""Passes whose numbers workers can look up: those of a DataLoader that was dropped may still be beginning one."""

_LOCK_SECONDS = 30.0


class PassNumbers:
    """The numbers of passes, told to all processes that take part in one.

    Whoever is the first to begin a pass gives it the next number; the others find it under what they know the pass by.
    """

    def __init__(self, epoch: int) -> None:
        # Of the kind that forked and spawned workers can both be given.
        self._lock = get_context("spawn").Lock()
        # The next number, then the passes known: (nonce, call, number)
        self._shared = torch.zeros(1 + 3 * _PASSES_KNOWN, dtype=torch.int64).share_memory_()
        self._shared[0] = epoch
        self._begun: dict[int, int] = {}
        """Passes that this very process has begun for each nonce: workers that persist begin many."""

    @property
    def following(self) -> int:
        with self._locked():
            return int(self._shared[0])

    def go_to(self, epoch: int) -> None:
        with self._locked():
            self._shared[0] = epoch

    def begin(self, nonce: int | None) -> int:
        """The number of a pass that begins; `nonce` is the same for all who take part in it, None for one alone."""
        with self._locked():
            number = int(self._shared[0])
            if nonce is not None:
                call = self._begun.get(nonce, 0) + 1
                self._begun = {nonce: call}
                known = self._shared[1:].view(_PASSES_KNOWN, 3)
                for known_nonce, known_call, known_number in known.tolist():
                    if (known_nonce, known_call) == (nonce, call):
                        return int(known_number)
                known[1:] = known[:-1].clone()
                known[0] = torch.tensor([nonce, call, number])
            self._shared[0] += 1
            return number

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise RuntimeError("a worker has died while it began a pass: make the dataset anew")
        try:
            yield
        finally:
            self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is not None:
            return _shared_pass_numbers, (self._lock, self._shared)
        # A copy that is no worker's counts for itself.
        return PassNumbers, (self.following,)


def _shared_pass_numbers(lock: Any, shared: torch.Tensor) -> PassNumbers:
    numbers = object.__new__(PassNumbers)
    numbers._lock, numbers._shared, numbers._begun = lock, shared, {}
    return numbers
