"""Divides any number of rows in bounded memory: the rows of each class are taken in the order of a keyed hash.

scikit-learn's splitters shuffle a list of all rows. A billion rows need another rule:

- How many rows of each class each part gets is decided as scikit-learn decides it.
- Which rows: the rows of a class are sorted by a hash of the row id, whose key depends on the seed. The first ones go
  to the first part, the next ones to the second, and so on. So each part is a simple random sample of each class.

The hash is a bijection, so there are no ties, and a row is in the same part however the rows are read. Sorting needs no
list: one pass counts the rows of each class in each bin of the hash, which tells the part of all bins but the few in
which one part ends and another begins. The next pass finds the part of each row, and sorts the rows of these few bins.

`DIVISION_VERSION` changes whenever a result changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.order import hashed
from h5feed.runs import consecutive

from ..row_bits import BitPacker, Bits
from .as_sklearn import Codes

DIVISION_VERSION = 1

MAX_CLASSES = 10_000
"""Maximum number of classes: each has its own bins."""

_STEP = 1 << 14
"""Rows processed at a time, few enough for the CPU's caches."""

_LOG_CELLS, _LEAST_LOG_BINS = 15, 9
"""Logarithms of the number of bins of all classes together, and of the least number of bins of a class."""

_REST, _EDGE = 254, 255

_EDGES_AT_ONCE = 1024

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_Edges = tuple[Int64s, UInt64s, Int64s]
"""Rows, their hashes and their cells."""


class Take(NamedTuple):
    """How many rows of each class a part takes, (classes,) int64, after those of the `Take` before.

    Rows of the part ``""`` are left.
    """

    part: str
    rows: Int64s


def division_key(seed: int) -> bytes:
    """The key of the hash: 64 bytes."""
    return hashlib.blake2b(f"h5feed division {DIVISION_VERSION}\0{seed}".encode()).digest()


def divide_by_hash(
    rows: int,
    blocks: Callable[[], Iterable[Codes]],
    takes: Sequence[Take],
    seed: int | None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Mapping[str, Bits]:
    """The rows that the parts take, a bit for each row of the dataset. Rows that are left have no bit in any of them.

    Parameters
    ----------
    rows : int
        Rows of the dataset.
    blocks : callable
        Reads the classes, called twice: consecutive arrays of the class of each row, below the number of classes.
    takes : sequence of Take
        The same part may take rows several times.
    seed : int or None
        With None, the rows of a class are taken in ascending order.
    advance : callable
        Called with numbers of rows, ``2 * rows`` in all.

    Raises
    ------
    RuntimeError
        The classes of the second pass were not those of the first.
    """
    key = None if seed is None else division_key(seed)
    classes = len(takes[0].rows)
    log_bins = max(_LEAST_LOG_BINS, _LOG_CELLS - (classes - 1).bit_length())
    bins = 1 << log_bins
    # counts, below: (classes, bins)
    counts = np.zeros(classes * bins, np.int64)
    for _, _, cells in _cells(rows, blocks(), key, log_bins):
        _count(counts, cells)
        advance(len(cells))
    ends = np.cumsum(counts.reshape(classes, bins), axis=1)
    below = ends - counts.reshape(classes, bins)
    # bounds: (classes, takes), where each take ends in the sorted rows of a class
    bounds = np.cumsum(np.stack([take.rows for take in takes], axis=1), axis=1)
    names = list(dict.fromkeys(take.part for take in takes if take.part))
    numbers = np.array([*(names.index(take.part) if take.part else _REST for take in takes), _REST], np.uint8)
    first, last = _take_at(bounds, below), _take_at(bounds, np.maximum(below, ends - 1))
    parts = np.where(first == last, numbers[first], np.uint8(_EDGE)).reshape(-1)
    packers = {name: BitPacker(rows) for name in names}
    edges: list[_Edges] = []
    all_edges: list[_Edges] = []
    for start, hashes, cells in _cells(rows, blocks(), key, log_bins):
        part = parts[cells]
        for number, packer in enumerate(packers.values()):
            packer.add(part == number)
        on_edge = np.flatnonzero(part == _EDGE)
        if len(on_edge):
            edges.append((on_edge + start, hashes[on_edge], cells[on_edge]))
        if len(edges) == _EDGES_AT_ONCE:
            # Many small arrays take more memory than their content.
            all_edges.append(_together(edges))
            edges = []
        advance(len(cells))
    bits = {name: packer.bits() for name, packer in packers.items()}
    _place_edges(bits, [*all_edges, *edges], below.reshape(-1), bounds, numbers, bins)
    for name, own in bits.items():
        wanted = sum(int(take.rows.sum()) for take in takes if take.part == name)
        if int(np.bitwise_count(own).sum(dtype=np.int64)) != wanted:
            raise RuntimeError("the classes of rows have changed while they were read")
    return bits


def _place_edges(
    bits: Mapping[str, Bits],
    edges: Sequence[_Edges],
    below: Int64s,
    bounds: Int64s,
    numbers: npt.NDArray[np.uint8],
    bins: int,
) -> None:
    """Sort the rows of the bins in which parts begin or end, and set their bits."""
    if not edges:
        return
    rows, hashes, cells = _together(edges)
    order = np.lexsort((hashes, cells))
    rows, cells = rows[order], cells[order]
    begins = np.flatnonzero(np.diff(cells, prepend=-1))
    within = consecutive(0, np.diff(begins, append=len(cells)))
    part = numbers[_take_at(bounds[cells // bins], (below[cells] + within)[:, None])[:, 0]]
    for number, own in enumerate(bits.values()):
        chosen = rows[part == number]
        np.bitwise_or.at(own, chosen // 8, (128 >> (chosen % 8)).astype(np.uint8))


def _together(edges: Sequence[_Edges]) -> _Edges:
    rows, hashes, cells = zip(*edges, strict=True)
    return np.concatenate(rows), np.concatenate(hashes), np.concatenate(cells)


def _take_at(bounds: Int64s, places: Int64s) -> npt.NDArray[np.uint8]:
    """Number of the take that has each place in the sorted rows of a class.

    Parameters
    ----------
    bounds : (n, takes) int64
    places : (n, m) int64

    Returns
    -------
    (n, m) uint8
        The number of takes for places after all of them.
    """
    number = np.zeros(places.shape, np.uint8)
    for bound in bounds.T:
        number += bound[:, None] <= places
    return number


def _cells(
    rows: int, blocks: Iterable[Codes], key: bytes | None, log_bins: int
) -> Iterator[tuple[int, UInt64s, Int64s]]:
    """Of a few rows at a time: the first row, their hashes, and their cells, which are bins of their classes."""
    start = 0
    to_bin = np.uint64(64 - log_bins)
    to_top = np.uint64(64 - max(1, (rows - 1).bit_length()))
    for block in blocks:
        for first in range(0, len(block), _STEP):
            codes = block[first : first + _STEP]
            numbers = np.arange(start, start + len(codes), dtype=np.int64)
            hashes = numbers.astype(np.uint64) << to_top if key is None else hashed(numbers, key)
            cells = (hashes >> to_bin).view(np.int64)
            if len(codes):
                cells += codes.astype(np.int64) << log_bins
            yield start, hashes, cells
            start += len(codes)
    if start != rows:
        raise RuntimeError(f"{start} of {rows} classes were read")


def _count(counts: Int64s, cells: Int64s) -> None:
    if len(counts) <= 4 * _STEP:
        counts += np.bincount(cells, minlength=len(counts))
    else:
        np.add.at(counts, cells, 1)
