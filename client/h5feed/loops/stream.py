"""The batches of an order for a training loop, from any position on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..batch import Batch
from ..errors import BatchOutOfRange
from ..fetching.readahead import ReadAhead
from ..net.trace import Trace
from ..plan import Plan
from ..samples import Samples


class Stream:
    """Batches of an order, fetched ahead from the last requested position. Not thread-safe.

    Parameters
    ----------
    dataset : Samples
    plan : Plan
    fetching : mapping
        Options of `Dataset.read_passes`.
    """

    def __init__(self, dataset: Samples, plan: Plan, fetching: Mapping[str, Any]) -> None:
        self._dataset, self.plan, self._fetching = dataset, plan, dict(fetching)
        self._reading: ReadAhead[Batch] | None = None
        self._at: tuple[int, int] | None = None
        self.taken: Trace | None = None
        """Trace of the block that the last batch was the first of; None if the block had been started before."""

    def __getstate__(self) -> dict[str, Any]:
        # Threads and prefetched batches stay here: a copy fetches its own.
        return {**self.__dict__, "_reading": None, "_at": None}

    def after_fork(self) -> None:
        """In the child: the read-ahead belongs to the parent. The next batch starts a new one."""
        self._reading = self._at = None

    @property
    def batches(self) -> int:
        """Batches of one pass."""
        return self.plan.batches

    def batch(self, epoch: int, position: int) -> Batch:
        """Batch `position` of pass `epoch`. Prefetched if it follows the previous one."""
        drawn = self.plan.is_drawn
        wanted = self._wanted(epoch, position)
        if self._reading is None or self._at != wanted:
            self.close()
            self._reading = self._dataset.read_passes(self.plan, *wanted, **self._fetching)
        # If the next line fails, the position of the stream is unknown.
        self._at = None
        batch = next(self._reading)
        self.taken = self._reading.taken
        self._at = (wanted[0] + drawn, 0) if position + 1 == self.batches else (wanted[0], position + 1)
        return batch

    def is_at(self, epoch: int, position: int) -> bool:
        """Whether this batch is the next one of the read-ahead."""
        return self._at == self._wanted(epoch, position)

    def _wanted(self, epoch: int, position: int) -> tuple[int, int]:
        # Without shuffling, all passes are the same: they share one number, so that read-ahead is always valid.
        return (epoch if self.plan.is_drawn else 0), position

    def look(self, epoch: int, position: int) -> Batch:
        """The same batch by a request of its own; the read-ahead is not affected.

        Raises
        ------
        BatchOutOfRange
        """
        if not position < self.batches:
            raise BatchOutOfRange(
                f"batch {position} is out of range: {self.plan.rows} rows make {self.batches} batches of "
                f"{self.plan.batch_size}"
            )
        once = {**self._fetching, "connections": 1}
        reading = self._dataset.read_passes(self.plan, *self._wanted(epoch, position), position + 1, **once)
        try:
            return next(reading)
        finally:
            reading.close()

    def close(self) -> None:
        """Stop the read-ahead and its threads. The next batch restarts it."""
        if self._reading is not None:
            self._reading.close()
        self._reading = self._at = None
