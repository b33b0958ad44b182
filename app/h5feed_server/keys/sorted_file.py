"""A file of hashes and their rows, sorted, of any size: written in bounded memory, and searched by ``pread``.

Writing is an external merge sort: sorted runs go to a temporary file, and are then merged part by part. Each part lies
between two entries of a sample of all runs, so parts have about equal sizes, however often a hash occurs.

The file has no header. A table, which the cache folder keeps, has the first hash and a checksum of each block, so
nothing that is damaged is used.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge
from h5feed.runs import consecutive

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Entries = npt.NDArray[Any]
"""Structured array of `ENTRY`."""

ENTRY = np.dtype([("hash", "<u8"), ("row", "<i8")])

BLOCK = 512
"""Entries of a block, which is read and checked as a whole."""

_BLOCKS_AT_ONCE = 64
"""Blocks that are read together if most are needed."""

RUN = 1 << 20
"""Entries that are sorted at a time."""

_SAMPLED = 1 << 12
"""Distance of sampled entries in a run."""


class Damaged(Exception):
    """The file is missing, or differs from its table."""


class TooManyRows(TooLarge):
    """More rows than a limit have the keys that are looked for."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit} rows have these keys: request fewer keys at once, or use where=")


@dataclass(frozen=True)
class SortedFile:
    """An open index, by its table.

    Attributes
    ----------
    path : Path
    fences : (blocks,) uint64
        First hash of each block.
    sums : (blocks,) uint32
        Checksum of each block.
    entries : int
        Number of entries.
    """

    path: Path
    fences: UInt64s
    sums: npt.NDArray[np.uint32]
    entries: int

    @property
    def nbytes(self) -> int:
        return self.fences.nbytes + self.sums.nbytes

    def find(self, hashes: UInt64s, limit: int) -> tuple[Int64s, Int64s]:
        """All rows with these hashes.

        Parameters
        ----------
        hashes : (k,) uint64, ascending
        limit : int
            Most entries that may be found.

        Returns
        -------
        which : (m,) int64
            Indices of `hashes`, ascending.
        rows : (m,) int64
            Ascending for each hash.

        Raises
        ------
        TooManyRows
        Damaged
        """
        # Blocks that may have each hash.
        first = np.maximum(np.searchsorted(self.fences, hashes, "left") - 1, 0)
        last = np.maximum(np.searchsorted(self.fences, hashes, "right") - 1, first)
        if not self.entries or not len(hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if (int((last - first).max()) - 1) * BLOCK > limit:
            raise TooManyRows(limit)
        # Many blocks are read at a time where most of them are needed.
        step = _BLOCKS_AT_ONCE if len(hashes) > len(self.fences) else 1
        begins, counts = first // step, last // step - first // step + 1
        spans = np.unique(consecutive(begins, counts))
        which, rows, total = [], [], 0
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            raise Damaged from None
        try:
            for begin in (step * spans).tolist():
                entries = self._blocks(descriptor, begin, min(begin + step, len(self.fences)))
                least = int(np.searchsorted(last, begin, "left"))
                wanted = hashes[least : int(np.searchsorted(first, begin + step - 1, "right"))]
                left = np.searchsorted(entries["hash"], wanted, "left")
                counts = np.searchsorted(entries["hash"], wanted, "right") - left
                total += int(counts.sum())
                if total > limit:
                    raise TooManyRows(limit)
                which.append(least + np.repeat(np.arange(len(wanted)), counts))
                rows.append(entries["row"][consecutive(left, counts)])
        finally:
            os.close(descriptor)
        return _joined(which), _joined(rows)

    def _blocks(self, descriptor: int, begin: int, stop: int) -> Entries:
        """Read blocks begin … stop-1, and check them.

        Raises
        ------
        Damaged
        """
        count = min((stop - begin) * BLOCK, self.entries - begin * BLOCK)
        try:
            data = os.pread(descriptor, count * ENTRY.itemsize, begin * BLOCK * ENTRY.itemsize)
        except OSError:
            raise Damaged from None
        view, size = memoryview(data), BLOCK * ENTRY.itemsize
        sums = [zlib.crc32(view[at : at + size]) for at in range(0, len(data), size)]
        if len(data) != count * ENTRY.itemsize or sums != self.sums[begin:stop].tolist():
            raise Damaged
        return np.frombuffer(data, ENTRY)


def write_sorted(path: Path, blocks: Iterable[UInt64s], advance: Callable[[int], None]) -> SortedFile:
    """Write the hashes of all rows, in the order of the rows, to a sorted file.

    Parameters
    ----------
    path : Path
        Replaced when the file is complete.
    blocks : iterable of (n,) uint64
        Consecutive hashes.
    advance : callable
        Called with the number of entries that have been sorted; for each entry twice.

    Raises
    ------
    OSError
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process at a time writes an index, so what a crash has left is replaced.
    part = path.with_name(f".{path.name}.part")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as scratch, open(part, "wb") as out:
            runs = _Runs(scratch.fileno())
            for hashes in _of_size(blocks, RUN):
                runs.add(hashes)
                advance(len(hashes))
            fences: list[Any] = []
            sums: list[int] = []
            rest = np.zeros(0, ENTRY)
            for merged in runs.merged():
                advance(len(merged))
                rest = np.concatenate([rest, merged])
                whole = len(rest) - len(rest) % BLOCK
                _write(out, rest[:whole], fences, sums)
                rest = rest[whole:]
            _write(out, rest, fences, sums)
            out.flush()
            os.fdatasync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return SortedFile(path, np.array(fences, np.uint64), np.array(sums, np.uint32), runs.entries)


class _Runs:
    """Sorted runs in a temporary file, with a sample of the entries of each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._samples: list[Entries] = []
        self._counts: list[int] = []
        self.entries = 0

    def add(self, hashes: UInt64s) -> None:
        """Sort the next hashes and write them."""
        run = np.empty(len(hashes), ENTRY)
        # Stable: rows of equal hashes ascend.
        order = np.argsort(hashes, kind="stable")
        run["hash"], run["row"] = hashes[order], order + self.entries
        view = memoryview(run.view(np.uint8).data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._samples.append(run[::_SAMPLED].copy())
        self._counts.append(len(run))
        self.entries += len(run)

    def merged(self) -> Iterable[Entries]:
        """All entries, sorted by hash and row, in parts of about `RUN` entries."""
        if not self._counts:
            return
        samples = np.concatenate(self._samples)
        samples = samples[np.lexsort((samples["row"], samples["hash"]))]
        bounds = samples[RUN // _SAMPLED :: RUN // _SAMPLED]
        cuts = np.zeros(len(self._counts), np.int64)
        for bound in [*bounds, None]:
            ends = np.array([self._cut(run, bound) for run in range(len(cuts))], np.int64)
            parts = [self._read(run, int(cuts[run]), int(ends[run])) for run in range(len(cuts))]
            part = np.concatenate(parts)
            # Runs are in the order of their rows.
            yield part[np.argsort(part["hash"], kind="stable")]
            cuts = ends

    def _cut(self, run: int, bound: Any) -> int:
        """Number of entries of a run that come before `bound`; all without one."""
        if bound is None:
            return self._counts[run]
        sample = self._samples[run]
        first = max(0, _before(sample, bound) - 1) * _SAMPLED
        return first + _before(self._read(run, first, min(first + _SAMPLED, self._counts[run])), bound)

    def _read(self, run: int, first: int, stop: int) -> Entries:
        begin = sum(self._counts[:run]) + first
        part = np.empty(stop - first, ENTRY)
        view, offset = memoryview(part.view(np.uint8).data), begin * ENTRY.itemsize
        while view:
            read = os.preadv(self._descriptor, [view], offset)
            if not read:
                raise OSError("a temporary file of the cache folder was cut off")
            view, offset = view[read:], offset + read
        return part


def _before(entries: Entries, bound: Any) -> int:
    """Number of sorted entries that come before `bound`."""
    left, right = (int(np.searchsorted(entries["hash"], bound["hash"], side)) for side in ("left", "right"))
    return left + int(np.searchsorted(entries["row"][left:right], bound["row"]))


def _of_size(blocks: Iterable[UInt64s], size: int) -> Iterable[UInt64s]:
    """Arrays put together or divided into such of `size`; the last may be smaller."""
    rest: list[UInt64s] = []
    count = 0
    for block in blocks:
        rest.append(block)
        count += len(block)
        while count >= size:
            whole = np.concatenate(rest)
            yield whole[:size]
            rest, count = [whole[size:]], count - size
    if count:
        yield np.concatenate(rest)


def _write(out: Any, entries: Entries, fences: list[Any], sums: list[int]) -> None:
    for first in range(0, len(entries), BLOCK):
        block = entries[first : first + BLOCK]
        fences.append(block["hash"][0])
        data = block.tobytes()
        sums.append(zlib.crc32(data))
        out.write(data)


def _joined(parts: list[npt.NDArray[Any]]) -> Int64s:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
