"""A remote dataset as a `keras.utils.PyDataset` (`keras.utils.Sequence`), for fit, evaluate and predict.

What Keras 3 does with such an object, and what follows:

- It permutes the indices of a shuffled epoch in a way that nobody else can predict, and with ``workers > 1`` it fetches
  in threads whose batches leak into the next epoch. So the index is only a *ticket*: within a pass, the k-th new index
  is given the k-th batch of an order that is our own, and read-ahead is our own too.
- It looks at a batch or two to build a model, and hooks of that look are those of an epoch. So `on_epoch_begin` looks
  up the stack for the Keras method that is running: there is no other way to tell.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Names
from types import FrameType
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from .batch import Batch
from .dataset import BLOCK_BYTES, DEFAULT_CONNECTIONS, DEFAULT_READAHEAD, Dataset, OrderOptions, Plan
from .errors import BadParameter
from .readahead import Block, ReadAhead, blocks_of

Mode = Literal["build", "fit", "evaluate", "predict"]

_METHODS: dict[str, Mode] = {
    "_symbolic_build": "build",
    "_maybe_symbolic_build": "build",
    "fit": "fit",
    "evaluate": "evaluate",
    "predict": "predict",
}
"""Methods of a Keras model that iterate over a dataset."""


class Sequence(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of a split for ``model.fit``, ``evaluate`` and ``predict``; made by `Dataset.sequence`.

    Each pass in ``fit`` delivers every row exactly once, in an order of its own when `shuffle` is set. ``evaluate`` and
    ``predict`` deliver ascending rows whatever `shuffle` says, so that `row_ids` aligns with predictions.

    Parameters
    ----------
    dataset : Dataset
    split : str
        ``"all"``, ``"train"``, ``"val"`` or ``"test"``.
    batch_size : int
    shuffle : bool
        Keras' own ``fit(shuffle=…)`` has no effect: this one decides.
    seed, epoch : int
        The order of pass e is that of ``epoch + e`` of this seed.
    x, y : str or list of str, optional
        Fields; one gives an array, several a dict. Default: the input and label fields. ``y=[]``: no labels.
    connections : int
        Requests in flight.
    readahead : int
        Bytes fetched ahead at most.
    workers, use_multiprocessing, max_queue_size
        Accepted for scripts that pass them, and without effect: `connections` and `readahead` take their place.
    **options
        Split and order options: ``val``, ``test``, ``stratify``, ``split_seed``, ``window``, ``limit``, ``shard``,
        ``shards``, ``last`` …

    Attributes
    ----------
    samples : int
        Rows of the split.
    epoch : int
        Number of the pass that the next batch belongs to: what `epoch` must be to go on from here.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        x: str | Names[str] | None = None,
        y: str | Names[str] | None = None,
        connections: int = DEFAULT_CONNECTIONS,
        readahead: int = DEFAULT_READAHEAD,
        workers: int = 1,
        use_multiprocessing: bool = False,
        max_queue_size: int = 10,
        **options: Any,
    ) -> None:
        # One worker means none: batches are asked for on the caller's thread and have been fetched ahead by ours.
        super().__init__(workers=1, use_multiprocessing=False)
        known = set(OrderOptions.__annotations__) - {"fields", "shuffle", "seed", "epoch"}
        if unknown := sorted(set(options) - known):
            raise BadParameter(f"unknown option {unknown[0]!r}: known are {', '.join(sorted(known))}")
        self._dataset = dataset
        self._x, self._y = _chosen(dataset, "input", x), _chosen(dataset, "label", y)
        if not self._x:
            raise BadParameter(f"dataset {dataset.name!r} has no input field: name one with x=")
        self._split, self._options = split, {**options, "batch_size": batch_size, "seed": seed}
        self._shuffled = self._plan(shuffle)
        self._ordered = self._plan(False) if shuffle else self._shuffled
        self._connections, self._readahead = connections, readahead
        self._lock = threading.RLock()
        self._stream: ReadAhead[Batch] | None = None
        self._stream_at: tuple[Plan, int, int] | None = None
        self._waited = 0.0
        self._row_ids: npt.NDArray[np.int64] | None = None
        self._epoch = epoch
        self._mode: Mode | None = None
        self._adapter: weakref.ref[Any] | None = None
        self._tickets: dict[int, int] = {}
        self._counted = False
        # A callback may evaluate or predict in the middle of a training pass, which then goes on.
        self._ordered_tickets: dict[int, int] = {}

    @property
    def num_batches(self) -> int:
        return self._shuffled.batches

    def __len__(self) -> int:
        return self._shuffled.batches

    @property
    def samples(self) -> int:
        return self._shuffled.rows

    @property
    def epoch(self) -> int:
        with self._lock:
            return self._epoch + (self._counted and len(self._tickets) == len(self))

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """Row ids in the order in which ``evaluate`` and ``predict`` deliver them, (predictions,) int64.

        With ``last="pad"`` the repeated rows at the end are in it, as their predictions are.
        """
        if self._row_ids is None:
            options = {**self._order(False), "fields": []}
            parts = [batch.rows.copy() for batch in self._dataset.batches(self._split, **options)]
            self._row_ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return self._row_ids

    @property
    def waited(self) -> float:
        """Seconds that training has waited for batches which were not there yet."""
        with self._lock:
            return self._waited + (self._stream.waited if self._stream else 0.0)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the next pass."""
        with self._lock:
            self._epoch = epoch
            self._tickets.clear()
            self._counted = False

    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""
        with self._lock:
            if self._stream is not None:
                self._waited += self._stream.waited
                self._stream.close()
            self._stream = self._stream_at = None

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} does not exist: valid are 0 … {len(self) - 1}")
        # What a Keras method that failed has left in `_mode` must not govern a loop of the user's own.
        by_keras = _keras_frame(sys._getframe(1)) is not None
        with self._lock:
            mode = self._mode if by_keras else None
            index %= len(self)
            if mode == "build":
                # Only the shapes matter; what has been read ahead is left for the pass itself.
                return self._arrays(self._fetch(self._shuffled, index))
            if mode in ("evaluate", "predict"):
                if len(self._ordered_tickets) == len(self):
                    self._ordered_tickets.clear()
                return self._ticketed(self._ordered, self._ordered_tickets, index)
            if len(self._tickets) == len(self):
                # Everything was handed out, and it begins again.
                self._end_pass()
            arrays = self._ticketed(self._shuffled, self._tickets, index)
            # A look at a few batches outside of fit does not make a training pass; all of them do.
            self._counted = self._counted or mode == "fit" or len(self._tickets) == len(self)
            return arrays

    def _ticketed(self, plan: Plan, tickets: dict[int, int], index: int) -> tuple[Any, ...]:
        position = tickets.get(index)
        if position is not None:
            return self._arrays(self._fetch(plan, position))
        # The ticket is given after the batch: who asks again after a failure is given the same one.
        arrays = self._arrays(self._next(plan, len(tickets)))
        tickets[index] = len(tickets)
        return arrays

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch begins, also when it only looks at a batch to build the model."""
        caller = _keras_frame(sys._getframe(1))
        with self._lock:
            self._mode = _running_method(caller)
            if self._mode in ("evaluate", "predict"):
                self._ordered_tickets.clear()
            elif self._mode == "fit" and caller is not None:
                # One adapter serves one call of fit: with steps_per_epoch a pass goes on over several of its epochs.
                adapter = caller.f_locals["self"]
                same_call = self._adapter is not None and self._adapter() is adapter
                if not same_call or len(self._tickets) == len(self):
                    self._end_pass()
                self._adapter = weakref.ref(adapter)

    def on_epoch_end(self) -> None:
        """Called by Keras when an epoch ends; call it yourself to begin a new pass in a loop of your own."""
        by_user = _running_method(sys._getframe(1)) is None
        with self._lock:
            self._mode = None
            if by_user and self._tickets:
                self._counted = True
                self._end_pass()

    def _end_pass(self) -> None:
        """What is handed out next begins a new pass; it has a new number where this one was for training."""
        self._epoch += self._counted
        self._tickets.clear()
        self._counted = False

    def _plan(self, shuffle: bool) -> Plan:
        return self._dataset.plan(self._split, **self._order(shuffle))

    def _order(self, shuffle: bool) -> dict[str, Any]:
        """Options of the order that passes have, shuffled or not."""
        options = {**self._options, "shuffle": shuffle, "fields": [*self._x, *self._y]}
        if not shuffle:
            options.pop("window", None)
        return options

    def _fetch(self, plan: Plan, position: int) -> Batch:
        """One batch, past the read-ahead."""
        options = self._order(plan.params["shuffle"] == "true")
        epoch = self._epoch if options["shuffle"] else 0
        return self._dataset.batch(position, split=self._split, **{**options, "epoch": epoch})

    def _next(self, plan: Plan, position: int) -> Batch:
        """The batch at `position` of the pass under way, from the read-ahead, which goes on into the next pass."""
        shuffled = plan.params["shuffle"] == "true"
        # Unshuffled passes are all the same: what was read ahead for the next one is right, whatever its number.
        epoch = self._epoch if shuffled else 0
        wanted = (plan, epoch, position)
        if self._stream is None or self._stream_at != wanted:
            self.close()
            self._stream = self._dataset.read_ahead(
                plan, _passes(plan, epoch, position), self._connections, self._readahead
            )
        # Where the next line fails, nobody knows what the stream would deliver afterwards.
        self._stream_at = None
        batch = next(self._stream)
        last = position + 1 == plan.batches
        self._stream_at = (plan, epoch + shuffled, 0) if last else (plan, epoch, position + 1)
        return batch

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        arrays: list[Any] = [_arranged(batch, self._x)]
        if self._y or batch.weight is not None:
            arrays.append(_arranged(batch, self._y))
        if batch.weight is not None:
            arrays.append(batch.weight)
        return tuple(arrays)


def _passes(plan: Plan, epoch: int, start: int) -> Iterator[Block]:
    """Blocks of this pass from batch `start` on, and of all that follow it: the next epoch is read ahead too."""
    for number in itertools.count():
        first = start if number == 0 else 0
        later = epoch + number if plan.params["shuffle"] == "true" else 0
        yield from blocks_of(later, plan.batches, plan.batch_bytes, BLOCK_BYTES, first)


def _chosen(dataset: Dataset, role: str, names: str | Names[str] | None) -> list[str]:
    if names is None:
        return dataset.fields_of_role(role)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name in dataset.fields and dataset.fields[name].dtype == "string":
            raise BadParameter(f"the field {name!r} is text: a model takes numbers")
    return chosen


def _arranged(batch: Batch, names: list[str]) -> Any:
    if not names:
        return None
    return batch[names[0]] if len(names) == 1 else {name: batch[name] for name in names}


def _keras_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of Keras on the stack: methods of a subclass of the user's own may lie between."""
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith("keras."):
        frame = frame.f_back
    return frame


def _running_method(frame: FrameType | None) -> Mode | None:
    """The innermost method of a Keras model on the stack, or None for a loop of the user's own."""
    while (frame := _keras_frame(frame)) is not None:
        mode = _METHODS.get(frame.f_code.co_name)
        if mode is not None:
            return mode
        frame = frame.f_back
    return None
