"""Stands in for a sequence in Keras' data adapter, for one call of ``fit``, ``evaluate`` or ``predict``.

Keras 3 permutes the indices of a shuffled epoch in an unpredictable way, which would defeat read-ahead. So in ``fit``
the index is only a *ticket*: the k-th batch that a run requests is the k-th batch of our own order. The exception is a
Keras distribution with several data shards, which must get batch `index` itself. Before ``fit`` has reset the adapter,
Keras only looks at a batch or two, to build the model or to learn shapes. With TensorFlow a thread runs ahead of the
loop and leaves abandoned runs behind; runs are told apart by the frame that requests the batch.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import keras
import numpy as np

from ..errors import FeedError
from ..loops.meter import Meter
from ..loops.stream import Stream
from . import internals
from .internals import ADVICE, DEALT, Method, UnderWay, epoch_iterator, initial_epoch, is_run, running_method
from .position import Position

_RUNS_KNOWN = 16
"""Runs of one call that can be told apart: the current one and some abandoned ones."""

_TRIAL_BATCHES = 64
"""Length of the trial epoch that shows whether an adapter requests every batch."""


@dataclass(eq=False)
class Run:
    """One run of Keras over `batches` training batches; with 0 it only looks at batches."""

    batches: int


class Fed(Protocol):
    """The part of `h5feed.keras.Sequence` that a `Call` uses."""

    shards: int
    _lock: threading.RLock
    _training: Stream
    _position: Position
    _follow: bool
    _rows: Any
    _meter: Meter
    _owner: Any
    _fitting: UnderWay | None

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    def on_epoch_begin(self) -> None: ...
    def on_epoch_end(self) -> None: ...
    def _stream_of(self, method: Method | None) -> Stream: ...
    def _meter_of(self, method: Method) -> Meter: ...
    def _check_batches(self, method: Method | None) -> None: ...
    def _look(self, index: int, method: Method | None = None) -> tuple[Any, ...]: ...
    def _evaluated(self, index: int) -> tuple[Any, ...]: ...
    def _begin_pass(self) -> None: ...
    def _begin_fit(self, initial_epoch: int, steps: int | None, is_dealt: bool) -> None: ...
    def _next_of_training(self) -> tuple[Any, ...]: ...
    def _dealt(self, index: int) -> tuple[Any, ...]: ...


class Call(keras.utils.PyDataset):  # type: ignore[misc]
    """The batches of a sequence, for one Keras data adapter."""

    def __init__(self, sequence: Fed, adapter: Any) -> None:
        super().__init__()
        self._sequence = sequence
        # Weak: the adapter holds this object.
        self._adapter = weakref.ref(adapter)
        self._method: Method | None = None
        self._steps: int | None = None
        self._was_reset = False
        self._rows: Any = None
        """What the epoch began with: a sequence that follows a growing dataset may get other rows."""
        self._runs: dict[int, Run] = {}
        self._is_dealt = False
        self._trial: list[int] | None = None

    @property
    def num_batches(self) -> int:
        if self._trial is not None:
            return _TRIAL_BATCHES
        caller = sys._getframe(1)
        if self._method == "fit" and is_run(caller):
            with self._sequence._lock:
                return self._begin_run(caller).batches
        return self._sequence._stream_of(running_method(caller) or self._method).batches

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self._trial is not None:
            self._trial.append(index)
            return (np.zeros((1, 1), np.float32),)
        with _asking(_Ticket(self, index, sys._getframe(1))):
            # Through the sequence: a subclass may override __getitem__.
            found: tuple[Any, ...] = self._sequence[index]
        return found

    def batch(self, index: int, caller: FrameType) -> tuple[Any, ...]:
        """The batch that the Keras function running in `caller` gets for `index`."""
        sequence = self._sequence
        if self._method is None:
            # Keras builds the model or learns shapes: do not use up the read-ahead of the pass.
            self._runs[id(caller)] = Run(0)
            return sequence._look(index, running_method(caller))
        if self._method != "fit":
            if self._rows is not sequence._rows:
                raise FeedError("another loop over this sequence has started, with more rows: make one for each loop")
            return sequence._evaluated(index)
        with sequence._lock:
            run = self._runs.get(id(caller)) or self._begin_run(caller)
            if not run.batches:
                return sequence._look(index, "fit")
            if sequence._owner is not run:
                raise FeedError("another loop over this sequence has started: create one sequence per loop")
            return sequence._dealt(index) if self._is_dealt else sequence._next_of_training()

    def _begin_run(self, caller: FrameType) -> Run:
        """Start a run over the training batches; the previous run gets no more of them."""
        position = self._sequence._position
        if self._is_dealt and position.batch:
            position.end_pass()
        run = Run(self._sequence._training.batches - position.batch)
        self._sequence._owner = run
        self._sequence._meter.begin_run()
        self._runs.pop(id(caller), None)
        self._runs[id(caller)] = run
        while len(self._runs) > _RUNS_KNOWN:
            self._runs.pop(next(iter(self._runs)))
        return run

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch starts, also when it only looks at a batch to build the model."""
        caller = sys._getframe(1)
        method = running_method(caller) or "fit"
        self._check(method)
        if method != "fit" or self._was_reset:
            with self._sequence._lock:
                self._begin_epoch(method, caller)
        with _asking(None):
            self._sequence.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Called by Keras when an epoch ends, and before the first one."""
        caller = sys._getframe(1)
        method = running_method(caller)
        self._check(method)
        self._was_reset = True
        with self._sequence._lock:
            if self._method is not None:
                self._sequence._meter_of(self._method).end_pass()
            elif method == "fit":
                self._sequence._fitting = UnderWay(caller)
            if self._is_dealt and not self._steps and self._sequence._position.batch:
                self._sequence._position.end_pass()
        with _asking(None):
            self._sequence.on_epoch_end()

    def _check(self, method: Method | None) -> None:
        if method == "fit" and internals.FAULT:
            raise FeedError(internals.refusal())
        if method is not None:
            # Keras would end with a StopIteration.
            self._sequence._check_batches(method)

    def _begin_epoch(self, method: Method, caller: FrameType) -> None:
        sequence, iterator = self._sequence, epoch_iterator(self._adapter(), caller)
        if self._method is None:
            self._method, self._steps = method, internals.steps_per_epoch(iterator)
            is_dealt = not self._asks_for_all()
            if method == "fit":
                sequence._begin_fit(initial_epoch(caller), self._steps, is_dealt)
            self._is_dealt = is_dealt
            if is_dealt:
                self._tell_dealt()
        first = internals.batches_ahead(iterator)
        # With steps_per_epoch, a run continues over several epochs.
        goes_on = bool(self._steps) and internals.is_amid_run(iterator)
        if not goes_on:
            sequence._begin_pass()
            self._rows = sequence._rows
            if sequence._follow and iterator is not None and not self._is_dealt:
                batches = sequence._stream_of(method).batches - (sequence._position.batch if method == "fit" else 0)
                internals.tell_batches(iterator, batches)
                if not self._steps:
                    internals.tell_steps(caller, batches)
        sequence._meter_of(method).begin_pass(first, goes_on=goes_on)
        if method == "fit" and not goes_on:
            sequence._meter.begin_demands()
            if iterator is not None and not self._is_dealt:
                # A run that starts in the middle of a pass covers only the rest of it.
                internals.tell_batches(iterator, sequence._training.batches - sequence._position.batch)

    def _asks_for_all(self) -> bool:
        """Whether the adapter requests every batch of an epoch. With several data shards it requests only some."""
        run = internals.trial_run(self._adapter())
        if run is None:
            return True
        state, self._trial = random.getstate(), []
        try:
            for _ in run:
                pass
            return sorted(self._trial) == list(range(_TRIAL_BATCHES))
        finally:
            self._trial = None
            # Shuffling the trial epoch has used this generator.
            random.setstate(state)

    def _tell_dealt(self) -> None:
        shards = self._sequence.shards
        if shards > 1:
            raise FeedError(f"{DEALT}. With shards={shards} the batches would be sharded twice. {ADVICE}")
        told = "The order cannot be read ahead" if self._method == "fit" else "row_ids lists the rows of all processes"
        warnings.warn(f"{DEALT}. {told}. {ADVICE}", stacklevel=2)


class _Ticket:
    """A batch that Keras has requested. It is taken once, even if a subclass of the sequence asks repeatedly."""

    def __init__(self, call: Call, index: int, caller: FrameType) -> None:
        self._call, self.index, self._caller = call, index, caller
        self._given: tuple[Any, ...] | None = None

    def is_for(self, sequence: Fed, index: int) -> bool:
        return self._call._sequence is sequence and self.index == index

    def take(self) -> tuple[Any, ...]:
        if self._given is None:
            # A transform that indexes the sequence must not use this ticket.
            with _asking(None):
                self._given = self._call.batch(self.index, self._caller)
        return self._given


class _Asked(threading.local):
    by_keras = False
    ticket: _Ticket | None = None


ASKED = _Asked()
"""Whether this thread calls a sequence on behalf of Keras' data adapter, and for which batch."""


@contextmanager
def _asking(ticket: _Ticket | None) -> Iterator[None]:
    before = ASKED.by_keras, ASKED.ticket
    ASKED.by_keras, ASKED.ticket = True, ticket
    try:
        yield
    finally:
        ASKED.by_keras, ASKED.ticket = before
