"""Blocks of batches: the unit of one request."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from .plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Batches start … stop-1 of one epoch, about `nbytes` bytes, fetched with one request.

    `lap` counts the passes of a stream: at most one pass is read ahead.
    """

    epoch: int
    start: int
    stop: int
    nbytes: int
    lap: int = 0

    def cut(self, nbytes: int) -> tuple[Block, Block | None]:
        """Split into the batches that fit into `nbytes`, at least one, and the rest."""
        batches = self.stop - self.start
        each = self.nbytes / batches
        first = max(1, int(nbytes // max(each, 1)))
        if first >= batches:
            return self, None
        middle = self.start + first
        return (
            replace(self, stop=middle, nbytes=round(each * first)),
            replace(self, start=middle, nbytes=self.nbytes - round(each * first)),
        )


def blocks_of(epoch: int, batches: int, batch_bytes: int, block_bytes: int, start: int = 0) -> Iterator[Block]:
    """Divide an epoch into blocks of about `block_bytes`: many small batches, or one large batch."""
    per_block = max(1, block_bytes // max(1, batch_bytes))
    for first in range(start, batches, per_block):
        stop = min(first + per_block, batches)
        yield Block(epoch, first, stop, (stop - first) * batch_bytes)


Fetch = Callable[[Block, threading.Event], list[T]]
"""Fetches the batches of one block; the event cancels the request."""


def blocks_of_passes(plan: Plan, epoch: int, start: int) -> Iterator[Block]:
    """Blocks of pass `epoch` from batch `start` on, and of all following passes, so that read-ahead crosses passes."""
    for number in itertools.count():
        first = start if number == 0 else 0
        # Without shuffling, all passes are the same: they share one number, so that read-ahead is always valid.
        later = epoch + number if plan.is_drawn else 0
        for block in blocks_of(later, plan.batches, plan.batch_bytes, plan.block_bytes, first):
            yield replace(block, lap=number)


def blocks_from(plan: Plan, epoch: int, start: int, stop: int | None) -> Iterator[Block]:
    """Blocks of pass `epoch` from batch `start` to `stop`, or endlessly into the following passes."""
    if stop is None:
        return blocks_of_passes(plan, epoch, start)
    return blocks_of(epoch, stop, plan.batch_bytes, plan.block_bytes, start)
