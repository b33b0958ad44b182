"""Which rows the batches of an order have, for those who get the rows themselves from elsewhere."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future

from ..batch import Batch
from ..blocks import Block, Fetch
from ..plan import Plan

ROWS_ASKED_TOGETHER = 1 << 17
"""Row ids of an order that are asked for by one request: a megabyte."""

BATCHES_ASKED_TOGETHER = 1 << 12
"""Batches of such a request at most: each has a header of its own, which is a third of a kilobyte."""

CHUNKS_KEPT = 8
"""Bound on such answers that are kept, for all orders of one cache together."""


_Key = tuple[frozenset[tuple[str, str]], int, int]


class RowIds:
    """The row ids of orders, asked for many batches at a time and before they are needed.

    A later epoch reads its rows from the local disk, but in which order the server alone can tell. One request tells it
    for a hundred thousand rows, and is sent while those before them are being read: no round trip is waited for but the
    first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[_Key, Future[list[Batch]]] = {}

    def after_fork(self) -> None:
        """In the child: what a thread of the parent is asking for never comes here."""
        self._lock = threading.Lock()
        self._chunks = {}

    def batches(self, plan: Plan, fetch: Fetch[Batch], block: Block, cancelled: threading.Event) -> list[Batch]:
        """The batches of a block without any field; `fetch` gets such batches from the server."""
        together = min(BATCHES_ASKED_TOGETHER, max(1, ROWS_ASKED_TOGETHER // plan.batch_size))
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
            # Orders that are not drawn are asked for under the same number again, and are still here then.
            epoch, number = epoch + plan.is_drawn, 0
        with self._lock:
            if _key(plan, epoch, number) in self._chunks:
                return
        # It ends by itself: at once when nobody wants batches any more, else within the client's deadline. Where the
        # system gives no thread, whoever needs the rows asks for them.
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
        """Chunk `number`; without `wait` it need not be the answer, and nothing is raised."""
        key = _key(plan, epoch, number)
        while True:
            with self._lock:
                pending = self._chunks.pop(key, None)
                mine = pending is None
                # The most recently used last: the first is dropped first.
                future = self._chunks[key] = Future() if pending is None else pending
                while len(self._chunks) > CHUNKS_KEPT:
                    del self._chunks[next(iter(self._chunks))]
            if not mine:
                if not wait:
                    return []
                try:
                    return future.result()
                except BaseException:
                    # Whoever asked has failed or was stopped, and said so there: here it is asked for once more.
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


def _key(plan: Plan, epoch: int, number: int) -> _Key:
    # Which fields are asked for does not change the order.
    items = frozenset(item for item in plan.params.items() if item[0] not in ("epoch", "fields", "encoded"))
    return items, epoch, number
