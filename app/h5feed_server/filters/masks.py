"""Finds the rows that meet conditions: reads a field once for each condition, and caches one bit per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache

from ..cache_folder.folder import CacheFolder
from ..catalog.dataset import Dataset, Field
from ..catalog.names import Key, key_of
from ..jobs.registry import Progress
from ..row_bits import BitPacker, Bits
from ..storage.reader import Reader
from .predicates import Predicate

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int32]

QUICK_BYTES = 128 << 20
"""Maximum bytes to read and decode while the request waits: about 0.1 s, too short for a job."""

QUICK_H5PY_BYTES = 16 << 20
"""The same for fields that only h5py can read."""

_KEPT_BYTES = 32 << 20
"""Maximum bytes of masks in memory."""

_BLOCK = 1 << 18
"""Maximum rows of a field to read at once."""

_BLOCK_BYTES = 8 << 20
"""Approximate bytes to read at once."""


class Masks:
    """Finds the rows that meet conditions; one per process.

    Results are cached in memory, within bounds, and in the cache folder, by the revision of the dataset. Only one
    process computes each of them.

    Parameters
    ----------
    timeout : float
        Seconds to wait for another thread that computes the same.
    """

    def __init__(self, reader: Reader, folder: CacheFolder, timeout: float) -> None:
        self._reader = reader
        self._folder = folder
        self._masks: ByteCache[Bits] = ByteCache(_KEPT_BYTES, timeout)

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds. The cache folder keeps it."""
        self._masks.drop_old(seconds)

    def missing(self, dataset: Dataset, predicates: Sequence[Predicate]) -> list[Predicate]:
        """The predicates whose result is not cached."""
        named = [(one, _name(dataset, one)) for one in predicates]
        return [one for one, name in named if name.here not in self._masks and name.kept not in self._folder]

    def mask(self, dataset: Dataset, predicates: Sequence[Predicate], progress: Progress | None = None) -> Bools:
        """Whether each row meets all predicates, of which there is at least one; (rows,) bool.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout, ReaderCrashed, TooLarge
        """
        return np.unpackbits(self.bits(dataset, predicates, progress), count=dataset.rows).view(np.bool_)

    def rows(self, dataset: Dataset, predicates: Sequence[Predicate]) -> Rows:
        """Ascending ids of the rows that meet all predicates, of which there is at least one; (k,) int32.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout, ReaderCrashed, TooLarge
        """
        bits = self.bits(dataset, predicates)
        rows = np.empty(int(np.bitwise_count(bits).sum(dtype=np.int64)), np.int32)
        done = 0
        for start in range(0, len(bits), _BLOCK // 8):
            # In blocks, because numpy returns int64. The bits after the last row are 0.
            found = _ones(bits[start : start + _BLOCK // 8])
            block = rows[done : done + len(found)]
            block[:] = found
            block += np.int32(8 * start)
            done += len(found)
        return rows

    def bits(self, dataset: Dataset, predicates: Sequence[Predicate], progress: Progress | None = None) -> Bits:
        """One bit per row that meets all predicates, as `numpy.packbits` packs them, (⌈rows / 8⌉,) uint8.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout, ReaderCrashed, TooLarge
        """
        passes = self._bits(dataset, predicates[0], progress)
        for other in predicates[1:]:
            passes = passes & self._bits(dataset, other, progress)
        return passes

    def _bits(self, dataset: Dataset, predicate: Predicate, progress: Progress | None) -> Bits:
        """One bit per row, as `numpy.packbits` packs them, (⌈rows / 8⌉,) uint8."""
        name = _name(dataset, predicate)

        def find() -> Bits:
            data = self._folder.get(name.kept, compute, behind=True)
            return load_arrays(data)[1]["bits"]

        def compute() -> bytes:
            holds = BitPacker(dataset.rows)
            for values in self._blocks(predicate.field, predicate.width):
                holds.add(predicate.holds(values))
                if progress is not None:
                    progress.advance(len(values))
            return dump_arrays({}, {"bits": holds.bits()})

        return self._masks.get(name.here, find, lambda bits: bits.nbytes)

    def _blocks(self, field: Field, width: int) -> Iterator[npt.NDArray[Any]]:
        """The values of a field with one value per row, in blocks. Variable-length text is cut to `width` bytes."""
        column = field.column
        row_bytes = max(1, column.row_bytes)
        if column.has_lists:
            row_bytes = max(16, width, self._reader.typical_items(column) * column.dtype.itemsize)
        step = max(1, min(_BLOCK, _BLOCK_BYTES // row_bytes) // field.block_rows) * field.block_rows
        start = 0
        while start < column.rows:
            stop = min(start + step, column.rows)
            if not column.has_lists:
                yield self._reader.read_block(column, start, stop).reshape(-1)
            else:
                try:
                    items, offsets = self._reader.read_ragged(column, np.arange(start, stop, dtype=np.int64))
                except TooLarge:
                    # Texts are much longer here than elsewhere in the field: read fewer at once.
                    if step == 1:
                        raise
                    step = max(1, step // 8)
                    continue
                yield cut_text(items, offsets, width)
            start = stop


def _ones(bits: Bits) -> npt.NDArray[np.int64]:
    """Positions of the bits that are 1, ascending."""
    count = int(np.bitwise_count(bits).sum(dtype=np.int64))
    if _FEW < count / (8 * len(bits)) <= _MANY:
        bits = np.concatenate([bits, np.full(len(bits) // 7, 255, np.uint8)])
    return np.flatnonzero(np.unpackbits(bits).view(np.bool_))[:count]


_FEW, _MANY = 0.03, 0.1
"""Between these shares, numpy's search for the next 1 is up to twice as slow as its way for more: it takes a branch for
each, which the processor cannot predict. Ones after the end make them more."""


def is_quick(predicates: Sequence[Predicate]) -> bool:
    """Whether all fields can be read while the request waits."""
    columns = {one.field.name: one.field.column for one in predicates}.values()
    slow = [one for one in columns if any(segment.array.by_h5py for segment in one.segments)]
    return (
        sum(one.stored_nbytes for one in columns) <= QUICK_BYTES
        and sum(max(one.stored_nbytes, 64 * one.rows) for one in slow) <= QUICK_H5PY_BYTES
    )


def cut_text(items: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[Any]:
    """Cut texts to at most `width` bytes each, (rows,) of S.

    Parameters
    ----------
    items : (n,) uint8
    offsets : (rows + 1,) int64
        Where each text begins.
    """
    lengths = np.minimum(np.diff(offsets), width)
    out = np.zeros((len(lengths), width), np.uint8)
    within = np.arange(width)
    step = max(1, _BLOCK_BYTES // (8 * width))
    for first in range(0, len(lengths), step):
        wanted = within < lengths[first : first + step, None]
        # In blocks, because the indices need eight times the memory of the text.
        places = offsets[first : first + step, None][: len(wanted)] + within
        out[first : first + step][wanted] = items[places[wanted]]
    return out.reshape(-1).view(f"S{width}")


def _name(dataset: Dataset, predicate: Predicate) -> Key:
    return key_of("filters/1", dataset.name, dataset.names, predicate.text)
