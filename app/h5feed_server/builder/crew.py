"""Who makes the rows of a build, and writes them in their final layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .hdf5_writer import Packing, create_chunked
from .journal import Journal
from .options import BuildOptions
from .placed_rows import PlacedRows, copy_lists, copy_rows
from .plan import Part, Plan
from .progress import OnProgress, Progress
from .row_maker import AHEAD, RowMaker
from .source import Source


@dataclass(frozen=True)
class Job:
    """A build that has been planned.

    Attributes
    ----------
    source : Source
    path : Path
        Of the source.
    wanted : (rows of the source,) bool
        Which rows are built.
    plan : Plan
        Where they go.
    """

    source: Source
    path: Path
    options: BuildOptions
    wanted: npt.NDArray[np.bool_]
    plan: Plan
    on_progress: OnProgress


class Crew(Protocol):
    """Those who do the work of a build."""

    def make_rows(self, job: Job, rows: PlacedRows, journal: Journal) -> int:
        """Make the rows that are missing, write them to the disk and note them; returns the bytes written.

        Raises
        ------
        Unreadable
        """

    def lay_out(self, job: Job, rows: PlacedRows, files: dict[Path, tuple[Part, ...]], written: int) -> None:
        """Write rows that were made into files of their final layout.

        Parameters
        ----------
        files : dict of Path to tuple of Part
            What each file gets.
        written : int
            What `make_rows` has returned.
        """


class Threads:
    """Threads of this process."""

    def make_rows(self, job: Job, rows: PlacedRows, journal: Journal) -> int:
        with ThreadPoolExecutor(job.options.workers, "h5feed-build") as threads:
            maker = RowMaker(job.source, job.wanted, rows, journal, job.options, threads, job.on_progress)
            maker.run()
        return maker.written

    def lay_out(self, job: Job, rows: PlacedRows, files: dict[Path, tuple[Part, ...]], written: int) -> None:
        total, done = sum(len(part.rows) for parts in files.values() for part in parts), 0

        def on_rows(count: int) -> None:
            nonlocal done
            done += count
            job.on_progress(Progress("layout", done, total, written))

        with ThreadPoolExecutor(job.options.workers, "h5feed-build") as threads:
            for path, parts in files.items():
                write_file(path, parts, rows, job.source, job.options, threads, on_rows)


def write_file(
    path: Path,
    parts: tuple[Part, ...],
    rows: PlacedRows,
    source: Source,
    options: BuildOptions,
    threads: ThreadPoolExecutor,
    on_rows: Callable[[int], None],
) -> None:
    """Write rows that were made into one file of the final layout; an unfinished one is replaced.

    Parameters
    ----------
    on_rows : callable
        Told how many rows were written.
    """
    path.unlink(missing_ok=True)
    if options.compression == "none":
        copy_rows(rows, path, parts, source, on_rows)
        return

    def read(group: str, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        (own,) = [part.rows for part in parts if part.group == group]
        return rows.read(name, own[start:stop])

    offsets = create_chunked(
        path,
        {part.group: part.rows for part in parts},
        source.fields,
        Packing(options.compression, options.level, options.chunk_rows),
        read,
        threads,
        options.workers * AHEAD,
        on_rows,
    )
    copy_lists(rows, path, parts, source, offsets)


def sync_file(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
