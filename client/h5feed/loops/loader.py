"""`Loader`, for training loops of your own."""

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
from ..prepare import Preparation
from ..samples import Samples
from .loop import Loop, check_can_follow
from .loop_options import check_loop_options, divided, preparation_of
from .meter import Meter
from .stream import Stream


class Loader(Loop):
    """Batches of a split as ``(x,)``, ``(x, y)`` or ``(x, y, weight)``; made by `Dataset.loader`.

    Each ``for`` loop is one pass. It delivers every row of the split once, in a new order if `shuffle` is set. After a
    ``break``, the next ``for`` starts the next pass. Batches are fetched ahead, across the end of a pass too. ::

        for epoch in range(10):
            for x, y in loader:
                ...

    Parameters
    ----------
    dataset : Samples
    split : str
    batch_size : int
    shuffle : bool
    seed, epoch : int
        Pass e has the order of epoch ``epoch + e`` for this seed.
    connections : int, optional
        Maximum number of concurrent requests; default: as many as the link needs.
    readahead : int, optional
        Maximum number of bytes fetched ahead.
    cache : path or RowCache, optional
        See `Dataset.cache`.
    follow : bool
        Start each pass with the rows that the dataset has then, for growing datasets. The number of batches may differ
        from pass to pass. A state that was saved with other rows is resumed with these. Joined datasets stay at the
        revision that they had when the loader was made; a line is logged when they change.
    **options
        Split and order options (``val``, ``test``, ``stratify``, ``where``, ``window``, ``shard``, ``shards``,
        ``last`` …), those of samples (``sequence_length``, ``offsets``, ``crop``, ``pad``, ``bucket``, ``pack``,
        ``join``, ``sparse``, ``decode_cf`` …: see `h5feed.options`), and those of `h5feed.prepare.Preparation`:
        ``x``, ``y``, ``sample_weight``, ``class_mode``, ``classes``, ``rescale``, ``mean``, ``std``, ``transform``.
        ``shard="auto"`` is this process's rank: see `h5feed.loops.sharding.shard_of`.

    Attributes
    ----------
    epoch : int
        Number of the pass of the next batch, or of the pass that the next ``for`` starts.

    A loader can be pickled if its `transform` can (a module-level function, for example). The copy has its own
    connections and threads and the same shard, and resumes from the same state: its first ``for`` finishes the current
    pass. In a forked child the loader continues where it was, independently of the parent's.
    """

    def __init__(
        self,
        dataset: Samples,
        split: str = "all",
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        follow: bool = False,
        **options: Unpack[RowOptions],
    ) -> None:
        check_loop_options(options, Loader.__init__)
        given: dict[str, Any] = dict(options)
        dataset = dataset.joined_by(given)
        if follow:
            check_can_follow(dataset, divided(dataset, given)[0], cache)
        self._follow = follow
        self._options = given
        self._order: dict[str, Any] = {"split": split, "batch_size": batch_size, "shuffle": shuffle, "seed": seed}
        self._meter = Meter()
        self._fetching = {
            "connections": connections,
            "readahead": readahead,
            "cache": cache,
            "waits": self._meter.waits,
        }
        self._begin(dataset)
        self._lock = threading.RLock()
        self._epoch, self._delivered = epoch, 0
        self._passes = 0
        self._under_way = False
        tell_after_fork(self)

    def _take_from(self, dataset: Samples) -> None:
        stream = self._stream
        self._begin(dataset, self._prepare)
        stream.close()

    def _begin(self, dataset: Samples, before: Preparation | None = None) -> None:
        order, preparing = divided(dataset, self._options)
        prepare = preparation_of(dataset, self._order["split"], order, preparing, self._order["seed"])
        if before is not None:
            prepare.check_prepares_as(before)
        plan = dataset.plan(**self._order, fields=prepare.fields, **order)
        self._dataset, self._prepare = dataset, prepare
        self._stream = Stream(dataset, plan, self._fetching)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return {**kept, "_stream": copy(self._stream), "_under_way": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: drop the parent's threads and locks."""
        self._lock = threading.RLock()
        self._stream.after_fork()

    @property
    def plan(self) -> Plan:
        """The rows and batches of one pass."""
        return self._stream.plan

    def _where(self) -> tuple[int, int]:
        with self._lock:
            return self._epoch, self._delivered

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        # A pass starts with its first batch, not with iter(), which some callers use only to check that it works.
        with self._lock:
            if self._under_way:
                self._epoch, self._delivered = self._epoch + 1, 0
            if self._follow and not self._delivered:
                self._catch_up()
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
                    raise RuntimeError("another pass over this loader has started: create one loader per loop")
                epoch = self._epoch
                batch = self._stream.batch(epoch, self._delivered)
                trace, came = self._stream.taken, clock()
                # Counted before the yield, so that a state saved in the loop body includes this batch.
                self._delivered += 1
                last = self._delivered == self.plan.batches
                if last:
                    self._end()
            arrays = self._prepare(batch, epoch)
            self._meter.step(asked, came, trace, len(batch.rows))
            yield arrays
        # Not reached after a `break`: such a pass ends with its last batch.
        self._meter.end_pass()

    def _end(self) -> None:
        self._epoch, self._delivered, self._under_way = self._epoch + 1, 0, False

    def example(self) -> tuple[Any, ...]:
        """The first batch of a pass, to see shapes and dtypes. The read-ahead is not affected.

        Raises
        ------
        BatchOutOfRange
            A pass has no batches.
        """
        if not self.plan.batches:
            raise BatchOutOfRange(
                f"{self.plan.rows} rows are not enough for a batch of {self.plan.batch_size}: use a smaller batch_size"
            )
        return self._prepare(self._stream.look(0, 0), 0)

    def _go_to(self, epoch: int, delivered: int) -> None:
        with self._lock:
            self._epoch, self._delivered, self._under_way = epoch, delivered, False
            # End a running loop, which would continue at another position.
            self._passes += 1

    def close(self) -> None:
        """Stop the read-ahead and its threads. The next batch restarts it."""
        with self._lock:
            self._stream.close()
