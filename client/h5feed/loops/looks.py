"""Access to single batches by number."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from copy import copy
from typing import Any

from ..batch import Batch
from ..plan import Plan
from ..samples import Samples
from .stream import Stream


class Looks:
    """Any batch of any pass, independent of running loops. Thread-safe.

    The first batch is a single request. Batches that follow one another are read ahead, so that indexing through a pass
    is as fast as a loop.

    Parameters
    ----------
    dataset : Samples
    plan : Plan
    fetching : mapping
        Options of `Dataset.read_passes`.
    """

    def __init__(self, dataset: Samples, plan: Plan, fetching: Mapping[str, Any]) -> None:
        self._stream = Stream(dataset, plan, fetching)
        self._last: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def batch(self, epoch: int, position: int) -> Batch:
        """Batch `position` of pass `epoch`."""
        with self._lock:
            follows = (epoch, position - 1) == self._last or self._stream.is_at(epoch, position)
            self._last = (epoch, position)
            if follows:
                return self._stream.batch(epoch, position)
        return self._stream.look(epoch, position)

    def __getstate__(self) -> dict[str, Any]:
        return {"_stream": copy(self._stream), "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In the child: drop the parent's threads and locks."""
        self._lock = threading.Lock()
        self._stream.after_fork()

    def close(self) -> None:
        """Stop the read-ahead and its threads."""
        with self._lock:
            self._stream.close()
