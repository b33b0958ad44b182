"""The actor that writes files of a build on a node."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError

from .. import __version__
from ..builder.crew import sync_file, write_file
from ..builder.opening import open_source
from ..builder.options import BuildOptions
from ..builder.placed_rows import PlacedRows
from ..builder.plan import Part
from ..builder.row_maker import RowMaker
from ..builder.source import Block, Source


@dataclass(frozen=True)
class Task:
    """One file to make.

    Attributes
    ----------
    number : int
        Of the task, in the build.
    placed : ObjectRef
        The `PlacedRows` of the build.
    missing : (n,) int64
        Rows of the source to make; with `path`, none.
    path : Path or None
        Of the file in its final layout.
    parts : tuple of Part
        What this file gets.
    """

    number: int
    name: str
    placed: Any
    missing: npt.NDArray[np.int64]
    path: Path | None = None
    parts: tuple[Part, ...] = ()

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The rows of the source that it deals with."""
        return self.missing if self.path is None else np.concatenate([part.rows for part in self.parts])


@dataclass(frozen=True)
class BuilderReport:
    """What a builder has done.

    Attributes
    ----------
    task : int or None
        Number of the task that it works on.
    finished : int or None
        Number of the task that it has finished since the last report.
    blocks : tuple of Block
        Rows that have come to the disk since the last report, without their values.
    rows : int
        Rows put into their final layout since the last report.
    error : Exception or None
        Why the build cannot go on.
    unfit : str
        Why this node cannot take part in the build; empty if it can.
    """

    task: int | None
    finished: int | None
    blocks: tuple[Block, ...]
    rows: int
    error: Exception | None
    unfit: str


class NodeBuilder:
    """Makes one file after the other, in a thread.

    Parameters
    ----------
    version : str
        Of h5feed-server in the process that plans the build.
    path : Path
        Of the source.
    digest : str
        That of the source that the build was planned for.
    """

    def __init__(self, version: str, path: Path, options: BuildOptions, digest: str, threads: int) -> None:
        self._version, self._path, self._digest = version, path, digest
        self._options = replace(options, threads=threads)
        self._lock = threading.Lock()
        self._task: int | None = None
        self._finished: int | None = None
        self._blocks: list[Block] = []
        self._rows = 0
        self._error: Exception | None = None
        self._unfit = ""
        self._tasks: queue.Queue[Task] = queue.Queue(1)
        threading.Thread(target=self._run, name="h5feed-builder", daemon=True).start()

    def report(self, task: Task | None) -> BuilderReport:
        """What was done since the last report. Begins with `task`, which is given to a builder without one."""
        if task is not None:
            self._task = task.number
            self._tasks.put_nowait(task)
        with self._lock:
            report = BuilderReport(
                self._task, self._finished, tuple(self._blocks), self._rows, self._error, self._unfit
            )
            if self._finished is not None:
                self._task = self._finished = None
            self._blocks, self._rows = [], 0
        return report

    def note(self, blocks: Iterable[Block]) -> None:
        """Rows have come to the disk."""
        with self._lock:
            self._blocks += blocks

    def _run(self) -> None:
        try:
            source = self._open()
        except FeedError as error:
            self._unfit = str(error)
            return
        except Exception as error:
            self._unfit = f"{type(error).__name__}: {error}"
            return
        with contextlib.closing(source):
            while self._error is None:
                task = self._tasks.get()
                try:
                    self._do(source, task)
                except (FeedError, OSError) as error:
                    self._error = error
                except Exception as error:
                    # Of a class that the other side may not know.
                    self._error = RuntimeError(f"{task.name}: {type(error).__name__}: {error}")
                else:
                    with self._lock:
                        self._finished = task.number

    def _open(self) -> Source:
        if self._version != __version__:
            raise FeedError(f"it has h5feed-server {__version__}, not {self._version}: install the same version")
        source = open_source(self._path, self._options)
        if source.digest != self._digest:
            source.close()
            raise FeedError(f"{self._path} is not the same there: all nodes need the same files and packages")
        return source

    def _do(self, source: Source, task: Task) -> None:
        import ray

        rows: PlacedRows = ray.get(task.placed)
        with contextlib.closing(rows), ThreadPoolExecutor(self._options.workers, "h5feed-build") as threads:
            rows.open_for(task.rows)
            if task.path is None:
                wanted = np.zeros(source.rows, np.bool_)
                wanted[task.missing] = True
                RowMaker(source, wanted, rows, _Notes(self, ~wanted), self._options, threads, lambda _: None).run()
            else:
                write_file(task.path, task.parts, rows, source, self._options, threads, self._count)
                sync_file(task.path)

    def _count(self, rows: int) -> None:
        with self._lock:
            self._rows += rows


class _Notes:
    """Passes on what comes to the disk."""

    def __init__(self, builder: NodeBuilder, done: npt.NDArray[np.bool_]) -> None:
        self._builder = builder
        self.done = done

    def add(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.done[block.rows] = True
        self._builder.note(blocks)
