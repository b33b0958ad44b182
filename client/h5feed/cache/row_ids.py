"""The row ids of the batches of an order, for rows that are read from the cache."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from typing import Any

from ..batch import Batch
from ..blocks import Block, Fetch
from ..plan import Plan
from ..wire import ROWS

ROWS_ASKED_TOGETHER = 1 << 17
"""Row ids per request: one megabyte."""

BATCHES_ASKED_TOGETHER = 1 << 12
"""Maximum number of batches per request: each has its own header of a third of a kilobyte."""

CHUNKS_KEPT = 8
"""Maximum number of responses kept, for all orders of one cache."""


_Key = tuple[frozenset[tuple[str, Any]], int, int]


class RowIds:
    """The row ids of orders, fetched ahead for many batches at a time.

    A later epoch reads its rows from disk, but only the server knows their order. One request covers a hundred thousand
    rows and is sent while the previous ones are read, so only the first round trip is waited for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[_Key, Future[list[Batch]]] = {}

    def after_fork(self) -> None:
        """In the child: requests of the parent's threads never finish here."""
        self._lock = threading.Lock()
        self._chunks = {}

    def batches(self, plan: Plan, fetch: Fetch[Batch], block: Block, cancelled: threading.Event) -> list[Batch]:
        """The batches of a block without fields; `fetch` gets such batches from the server."""
        together = min(BATCHES_ASKED_TOGETHER, max(1, ROWS_ASKED_TOGETHER // _rows_of_batch(plan)))
        wanted: list[Batch] = []
        for number in range(block.start // together, (block.stop - 1) // together + 1):
            first = number * together
            wanted += self._chunk(plan, fetch, block.epoch, number, together, cancelled, wait=True)[
                max(0, block.start - first) : block.stop - first
            ]
            self._ask_ahead(plan, fetch, block.epoch, number + 1, together, cancelled)
        return wanted

    def _ask_ahead(
        self, plan: Plan, fetch: Fetch[Batch], epoch: int, number: int, together: int, cancelled: threading.Event
    ) -> None:
        if number * together >= plan.batches:
            # Without shuffling, the epoch number stays the same, and the row ids are already here.
            epoch, number = epoch + plan.is_drawn, 0
        with self._lock:
            if _key(plan, epoch, number) in self._chunks:
                return
        # The thread ends on cancellation or at the client's deadline. If it cannot be started, the ids are fetched when
        # they are needed.
        with contextlib.suppress(RuntimeError):
            threading.Thread(
                target=self._chunk,
                args=(plan, fetch, epoch, number, together, cancelled),
                name="h5feed-row-ids",
                daemon=True,
            ).start()

    def _chunk(
        self,
        plan: Plan,
        fetch: Fetch[Batch],
        epoch: int,
        number: int,
        together: int,
        cancelled: threading.Event,
        *,
        wait: bool = False,
    ) -> list[Batch]:
        """Chunk `number`. Without `wait`, the result may be empty and nothing is raised."""
        key = _key(plan, epoch, number)
        while True:
            with self._lock:
                pending = self._chunks.pop(key, None)
                mine = pending is None
                # Least recently used first: the first is dropped first.
                future = self._chunks[key] = Future() if pending is None else pending
                while len(self._chunks) > CHUNKS_KEPT:
                    del self._chunks[next(iter(self._chunks))]
            if not mine:
                if not wait:
                    return []
                try:
                    return future.result()
                except BaseException:
                    # The other thread failed or was stopped, and reported it there: try again here.
                    self._forget(key, future)
                    continue
            try:
                start = number * together
                future.set_result(fetch(Block(epoch, start, min(start + together, plan.batches), 0), cancelled))
            except BaseException as error:
                self._forget(key, future)
                future.set_exception(error)
                if wait:
                    raise
                return []

    def _forget(self, key: _Key, future: Future[list[Batch]]) -> None:
        with self._lock:
            if self._chunks.get(key) is future:
                del self._chunks[key]


def _rows_of_batch(plan: Plan) -> int:
    """Rows of a batch; of packed rows, about how many."""
    return max([plan.batch_size, *(tensor.shape[0] for tensor in plan.tensors if tensor.name == ROWS)])


def _key(plan: Plan, epoch: int, number: int) -> _Key:
    # The order does not depend on the fields, but where crops begin depends on their shapes.
    others = ("epoch",) if "crop" in plan.params else ("epoch", "fields", "encoded")
    items = frozenset(item for item in plan.params.items() if item[0] not in others)
    return items, epoch, number
