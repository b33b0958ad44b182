"""Rows, made by all cores and written where they belong; what is on disk is noted in the journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from .options import BuildOptions
from .placed_rows import PlacedRows
from .progress import OnProgress, Progress
from .source import Block, Source

COMMIT_SECONDS = 2.0
"""An interruption costs no more work than this."""

_COMMIT_BYTES = 256 << 20
"""What is written is on disk before so much more is."""

AHEAD = 2
"""Pieces of work for each thread that are under way or wait: the bound on memory."""


class Notes(Protocol):
    """Where finished rows are noted, such as the journal.

    Attributes
    ----------
    done : (rows of the source,) bool
    """

    done: npt.NDArray[np.bool_]

    def add(self, blocks: list[Block]) -> None:
        """Note rows whose bytes are on disk."""


class RowMaker:
    """Makes the rows of a build that are missing.

    Parameters
    ----------
    wanted : (rows of the source,) bool
        Which rows are built.
    rows : PlacedRows
        Where they are written.

    Attributes
    ----------
    written : int
        Bytes so far.
    """

    def __init__(
        self,
        source: Source,
        wanted: npt.NDArray[np.bool_],
        rows: PlacedRows,
        journal: Notes,
        options: BuildOptions,
        threads: ThreadPoolExecutor,
        on_progress: OnProgress,
    ) -> None:
        self._source = source
        self._wanted = wanted
        self._rows = rows
        self._journal = journal
        self._strict = options.strict
        self._at_once = options.workers * AHEAD
        self._threads = threads
        self._on_progress = on_progress
        self._done = int(journal.done.sum())
        self._total = int(wanted.sum())
        self.written = 0
        self._finished: list[Block] = []
        """Not noted yet."""
        self._unnoted, self._noted = 0, time.monotonic()
        self._noting: Future[None] | None = None

    def run(self) -> None:
        """Make all that is missing; what was made is written and noted, whatever ends this.

        Raises
        ------
        Unreadable
        """
        pending: set[Future[Block]] = set()
        keeper = ThreadPoolExecutor(1, "h5feed-build-journal")
        try:
            for work in self._source.work(self._journal.done | ~self._wanted):
                pending.add(self._threads.submit(self._make, work))
                if len(pending) < self._at_once:
                    continue
                some, pending = wait(pending, return_when=FIRST_COMPLETED)
                self._collect(some)
                if self._unnoted >= _COMMIT_BYTES or time.monotonic() - self._noted >= COMMIT_SECONDS:
                    self._note(keeper)
            while pending:
                some, pending = wait(pending, return_when=FIRST_COMPLETED)
                self._collect(some)
        finally:
            for future in pending:
                future.cancel()
            with contextlib.suppress(Exception):
                # What the threads have still finished counts as well.
                self._take({future for future in wait(pending).done if not future.cancelled()})
            with keeper:
                if self._noting is not None:
                    self._noting.result()
                self._keep(self._finished)
        missing = np.flatnonzero(self._wanted & ~self._journal.done)
        if len(missing):
            raise Unreadable(f"{self._source.name(int(missing[0]))}: it is no longer in the source")

    def _make(self, work: Callable[[], Block]) -> Block:
        block = work()
        self._rows.write(block)
        block.arrays = {}
        return block

    def _collect(self, some: set[Future[Block]]) -> None:
        self._take(some)
        self._on_progress(Progress("rows", self._done, self._total, self.written))

    def _take(self, some: set[Future[Block]]) -> None:
        # Those that have failed last: what the others have finished counts.
        for future in sorted(some, key=lambda future: future.exception() is not None):
            block = future.result()
            if block.broken and self._strict:
                row, reason = next(iter(block.broken.items()))
                raise Unreadable(f"{self._source.name(row)}: {reason}")
            self._finished.append(block)
            self._done += len(block.rows)
            nbytes = (len(block.rows) - len(block.broken)) * self._rows.row_bytes
            self._unnoted += nbytes
            self.written += nbytes

    def _note(self, keeper: ThreadPoolExecutor) -> None:
        """Note what is finished, beside the threads that make rows: a disk may take its time."""
        if self._noting is not None and not self._noting.done():
            return
        if self._noting is not None:
            self._noting.result()
        self._noting = keeper.submit(self._keep, self._finished.copy())
        self._finished.clear()
        self._unnoted, self._noted = 0, time.monotonic()

    def _keep(self, blocks: list[Block]) -> None:
        """Note rows when their bytes are on disk."""
        self._rows.sync()
        self._journal.add(blocks)
