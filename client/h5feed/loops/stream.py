"""An order as a training loop reads it: pass after pass, from wherever it asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..batch import Batch
from ..errors import BatchOutOfRange
from ..fetching.readahead import ReadAhead
from ..net.trace import Trace
from ..plan import Plan
from ..remote_dataset import RemoteDataset


class Stream:
    """Batches of an order, fetched ahead from wherever one is asked for. Not safe for threads.

    Parameters
    ----------
    dataset : RemoteDataset
    plan : Plan
    fetching : mapping
        Options of `Dataset.read_passes`.
    """

    def __init__(self, dataset: RemoteDataset, plan: Plan, fetching: Mapping[str, Any]) -> None:
        self._dataset, self.plan, self._fetching = dataset, plan, dict(fetching)
        self._reading: ReadAhead[Batch] | None = None
        self._at: tuple[int, int] | None = None
        self.taken: Trace | None = None
        """Of the block that the last batch was the first of; None where it is in the same as the one before."""

    def __getstate__(self) -> dict[str, Any]:
        # Threads, and what they have fetched ahead, stay here: a copy asks for what it needs.
        return {**self.__dict__, "_reading": None, "_at": None}

    def after_fork(self) -> None:
        """In the child: the read-ahead and its threads are the parent's; what is asked for next begins one anew."""
        self._reading = self._at = None

    @property
    def batches(self) -> int:
        """Batches of one pass."""
        return self.plan.batches

    def batch(self, epoch: int, position: int) -> Batch:
        """Batch `position` of pass `epoch`; at once where it follows the one that was asked for before."""
        drawn = self.plan.is_drawn
        wanted = self._wanted(epoch, position)
        if self._reading is None or self._at != wanted:
            self.close()
            self._reading = self._dataset.read_passes(self.plan, *wanted, **self._fetching)
        # Where the next line fails, nobody knows what the stream would deliver afterwards.
        self._at = None
        batch = next(self._reading)
        self.taken = self._reading.taken
        self._at = (wanted[0] + drawn, 0) if position + 1 == self.batches else (wanted[0], position + 1)
        return batch

    def is_at(self, epoch: int, position: int) -> bool:
        """Whether that batch is the next of the read-ahead."""
        return self._at == self._wanted(epoch, position)

    def _wanted(self, epoch: int, position: int) -> tuple[int, int]:
        # Passes that are all alike have one number: what was read ahead for the next is right whatever it is.
        return (epoch if self.plan.is_drawn else 0), position

    def look(self, epoch: int, position: int) -> Batch:
        """The same batch past the read-ahead, which is left as it is.

        Raises
        ------
        BatchOutOfRange
        """
        if not position < self.batches:
            raise BatchOutOfRange(
                f"{self.plan.rows} rows make {self.batches} batches of {self.plan.batch_size}: there is no {position}"
            )
        once = {**self._fetching, "connections": 1}
        reading = self._dataset.read_passes(self.plan, *self._wanted(epoch, position), position + 1, **once)
        try:
            return next(reading)
        finally:
            reading.close()

    def close(self) -> None:
        """End the read-ahead and its threads; the next batch asked for begins it anew."""
        if self._reading is not None:
            self._reading.close()
        self._reading = self._at = None
