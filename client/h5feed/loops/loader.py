"""Passes over a split for training loops of one's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from copy import copy
from typing import Any, Unpack

from ..cache import RowCache
from ..errors import BatchOutOfRange
from ..forks import tell_after_fork
from ..net.trace import clock
from ..options import RowOptions
from ..plan import Plan
from ..remote_dataset import RemoteDataset
from .loop import Loop
from .loop_options import check_loop_options, divided, preparation_of
from .meter import Meter
from .stream import Stream


class Loader(Loop):
    """Batches of a split, pass after pass, as ``(x,)``, ``(x, y)`` or ``(x, y, weight)``; made by `Dataset.loader`.

    Each ``for`` is one pass, which delivers every row of the split once, in an order of its own when `shuffle` is set.
    A pass that was left early is not taken up by the next ``for``, which is the next pass. What comes next is fetched
    meanwhile, over the end of a pass too. ::

        for epoch in range(10):
            for x, y in loader:
                ...

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
    batch_size : int
    shuffle : bool
    seed, epoch : int
        The order of pass e is that of ``epoch + e`` of this seed.
    connections : int, optional
        Requests in flight at most; default: as many as the link needs.
    readahead : int, optional
        Bytes fetched ahead at most.
    cache : path or RowCache, optional
        See `Dataset.cache`.
    **options
        Split and order options (``val``, ``test``, ``stratify``, ``window``, ``shard``, ``shards``, ``last`` …), and
        those of `h5feed.prepare.Preparation`: ``x``, ``y``, ``sample_weight``, ``class_mode``, ``rescale``, ``mean``,
        ``std``, ``transform``. ``shard="auto"`` is this process's rank: see `h5feed.loops.sharding.shard_of`.

    Attributes
    ----------
    epoch : int
        Number of the pass that the next batch belongs to, or that the next ``for`` begins.

    It pickles, as a `transform` does that is a function of a module: the copy has connections and threads of its own,
    the shard of the original, and goes on as from its state: the first ``for`` over it is the rest of the pass that was
    under way. In a forked child it goes on where it was; the parent's goes on too.
    """

    def __init__(
        self,
        dataset: RemoteDataset,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        self._dataset = dataset
        check_loop_options(options, Loader.__init__)
        order, preparing = divided(options)
        self._prepare = preparation_of(dataset, split, order, preparing, seed)
        plan = dataset.plan(
            split, batch_size=batch_size, shuffle=shuffle, seed=seed, fields=self._prepare.fields, **order
        )
        self._stream = Stream(dataset, plan, {"connections": connections, "readahead": readahead, "cache": cache})
        self._meter = Meter()
        self._lock = threading.RLock()
        self._epoch, self._delivered = epoch, 0
        self._passes = 0
        self._under_way = False
        tell_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return {**kept, "_stream": copy(self._stream), "_under_way": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: threads and locks are the parent's."""
        self._lock = threading.RLock()
        self._stream.after_fork()

    @property
    def plan(self) -> Plan:
        """Which rows come, in how many batches."""
        return self._stream.plan

    def _where(self) -> tuple[int, int]:
        with self._lock:
            return self._epoch, self._delivered

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        # A pass begins with the first batch that is asked for: an iterator may be made only to see that it can be.
        with self._lock:
            if self._under_way:
                self._epoch, self._delivered = self._epoch + 1, 0
            self._under_way = True
            self._passes += 1
            number = self._passes
            if not self.plan.batches:
                self._end()
        last = not self.plan.batches
        self._meter.begin_pass()
        while not last:
            asked = clock()
            with self._lock:
                if number != self._passes:
                    raise RuntimeError("another pass over this loader has begun: make a loader for each loop")
                epoch = self._epoch
                batch = self._stream.batch(epoch, self._delivered)
                trace, came = self._stream.taken, clock()
                # Counted before it is out of hand: a state taken in the loop's body says that it was delivered.
                self._delivered += 1
                last = self._delivered == self.plan.batches
                if last:
                    self._end()
            arrays = self._prepare(batch, epoch)
            self._meter.step(asked, came, trace, len(batch.rows))
            yield arrays
        # A pass that is left early ends with the last batch that it was given: it is not told when that was.
        self._meter.end_pass()

    def _end(self) -> None:
        self._epoch, self._delivered, self._under_way = self._epoch + 1, 0, False

    def example(self) -> tuple[Any, ...]:
        """The first batch of a pass, past the read-ahead: what shapes and dtypes there will be.

        Raises
        ------
        BatchOutOfRange
            A pass has no batches.
        """
        if not self.plan.batches:
            raise BatchOutOfRange(
                f"{self.plan.rows} rows make no batch of {self.plan.batch_size}: use a smaller batch_size"
            )
        return self._prepare(self._stream.look(0, 0), 0)

    def _go_to(self, epoch: int, delivered: int) -> None:
        with self._lock:
            self._epoch, self._delivered, self._under_way = epoch, delivered, False
            # A loop that is under way would go on somewhere else.
            self._passes += 1

    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""
        with self._lock:
            self._stream.close()
