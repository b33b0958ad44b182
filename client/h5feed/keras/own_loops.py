"""The user's own loops over a sequence: ``for x, y in sequence`` and ``next(sequence)``.

Unless ``fit`` is running, the latest loop counts as training: its batches are read ahead, and its position is the state
of the sequence. All other loops continue as looks, so that each sees its whole pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

from ..errors import FeedError
from ..loops.meter import Meter
from ..loops.stream import Stream
from .call import Run
from .internals import UnderWay
from .position import Position


@dataclass(eq=False)
class OwnLoop:
    """The user's own loop over one pass: its next batch, and the position before it started.

    If the loop is left early, training continues from that earlier position.
    """

    epoch: int
    position: int
    training: Stream
    before: Position | None = None


class OwnLoops:
    """The iterable and iterator interface of a `Sequence`."""

    _training: Stream
    _lock: threading.RLock
    _position: Position
    _meter: Meter
    _owner: Run | OwnLoop | None
    _endless: OwnLoop | None
    _fitting: UnderWay | None
    _is_dealt: bool
    _has_just_ended: bool

    def _begin_pass(self) -> None:
        raise NotImplementedError

    def _next_of_training(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _seen(self, epoch: int, position: int) -> tuple[Any, ...]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Loop over the pass number `epoch`, or over the rest of a resumed pass."""
        loop = self._begin_own_loop()
        while loop.position < loop.training.batches:
            yield self._next_of(loop)
        if loop.before is not None:
            self._meter.end_pass()

    def __next__(self) -> tuple[Any, ...]:
        """The next batch of an endless loop over all passes."""
        with self._lock:
            loop, batches = self._endless, self._training.batches
            goes_on = loop is not None and (loop is self._owner or (loop.before is None and self._is_fitting()))
            if loop is None or not goes_on or loop.epoch != self._position.epoch or loop.position == batches:
                loop = self._endless = self._begin_own_loop()
        if not loop.training.batches:
            raise StopIteration
        return self._next_of(loop)

    def _is_fitting(self) -> bool:
        if self._fitting is not None and not self._fitting:
            self._fitting = None
        return self._fitting is not None

    def _begin_own_loop(self) -> OwnLoop:
        with self._lock:
            if self._is_fitting():
                return OwnLoop(self._position.epoch, 0, self._training)
            self._leave_own_loop()
            self._is_dealt = False
            self._begin_pass()
            before = copy(self._position)
            self._position.begin_loop()
            loop = self._owner = OwnLoop(self._position.epoch, self._position.batch, self._training, before)
            # An interrupted fit did not reset this.
            self._meter.run_ahead(False)
            self._meter.begin_pass()
            return loop

    def _leave_own_loop(self) -> None:
        if isinstance(self._owner, OwnLoop) and self._owner.before is not None:
            self._position = self._owner.before
        self._owner, self._has_just_ended = None, False

    def _next_of(self, loop: OwnLoop) -> tuple[Any, ...]:
        with self._lock:
            if self._owner is loop:
                arrays = self._next_of_training()
                loop.position += 1
                if loop.position == self._training.batches:
                    self._owner, self._has_just_ended = None, True
                return arrays
            if loop.training is not self._training:
                raise FeedError("another loop over this sequence has started, with more rows: make one for each loop")
        # Another loop or fit has started: continue this one as looks.
        arrays = self._seen(loop.epoch, loop.position)
        loop.position += 1
        return arrays
