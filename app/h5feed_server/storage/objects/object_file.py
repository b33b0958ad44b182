"""Objects of a store as sources of stored bytes."""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt, SourceUnavailable
from h5feed.stored.local_file import FileSource, Identity
from h5feed.stored.no_store import may_keep
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s, Ranges, Scratch, Source

from .backend import StoredObject
from .fetching_ahead import Part
from .parts import Piece, parts_of, pieces_of
from .range_cache import RangeCache
from .store import ObjectStore

WINDOW_BYTES = 32 << 20
"""Bytes of one read that are fetched and not used yet. A single part may be all of it."""

_MOST_RANGES = 1024
"""Ranges of one read that are on their way: each takes some KiB of memory, however short it is."""


class ObjectFile(FileSource):
    """One version of an object.

    Parameters
    ----------
    store : ObjectStore
    stored : StoredObject
    path, identity
        Of the file in the data folder that stands for it.
    """

    answers_late = True

    def __init__(self, store: ObjectStore, stored: StoredObject, path: str, identity: Identity) -> None:
        super().__init__(path, identity, stored.digest(store.place))
        self.store = store
        self.object = stored
        self.remote_bytes = stored.size

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """There is no handle: each range is of this version, or RevisionChanged is raised."""
        yield -1

    def ahead(self, ranges: Callable[[], Ranges]) -> Source:
        """Begin to fetch those of these ranges that are not on the local disk."""
        offsets, sizes = ranges()
        if not len(offsets):
            return self
        if (cache := self.store.cache) is None or not cache.holds(self.digest, offsets, sizes):
            return FetchedRanges(self, offsets, sizes)
        if self.store.ahead.join(self.digest, zip(offsets.tolist(), sizes.tolist(), strict=True)):
            # What was fetched ahead can be let go of only when it has been used.
            return FetchedRanges(self, offsets, sizes)
        return RangesOnDisk(self, cache, offsets, sizes)

    def found(self, pieces: set[Piece]) -> tuple[dict[Piece, Part], set[Piece], set[Piece]]:
        """Which of some ranges this process fetches ahead, which other workers do, and which are on the local disk."""
        # In this order: what is not in flight any more is on the disk.
        joined = self.store.ahead.join(self.digest, pieces)
        others = pieces.difference(joined)
        theirs = self.store.ahead.claimed_by_others(self.digest, others)
        cache = self.store.cache
        return joined, theirs, set() if cache is None else cache.held(self.digest, others)

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """See `FetchedRanges.read_rows`."""
        FetchedRanges(self, offsets, sizes).read_rows(offsets, sizes, target, begins)

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `FetchedRanges.read_rows`."""
        self._alone(offset, len(target)).fill(handle, offset, target)

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """See `FetchedRanges.read_rows`."""
        return self._alone(offset, nbytes).stored(handle, offset, nbytes, scratch)

    def _alone(self, offset: int, nbytes: int) -> FetchedRanges:
        return FetchedRanges(self, np.array([offset], np.int64), np.array([nbytes], np.int64))


class _Announced(Source):
    """Ranges of an object that one read has announced."""

    def __init__(self, file: ObjectFile) -> None:
        self._file = file

    @property
    def key(self) -> tuple[Hashable, ...]:
        """That of the object."""
        return self._file.key

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """There is no handle."""
        yield -1

    def ahead(self, ranges: Callable[[], Ranges]) -> Source:
        """They are fetched already."""
        return self


class RangesOnDisk(_Announced):
    """Ranges of an object that are all in the cache on the local disk, most likely: reads look there first, and plan
    what to fetch only if something is missing or damaged.

    Parameters
    ----------
    file : ObjectFile
    cache : RangeCache
    offsets, sizes : (k,) int64
    """

    def __init__(self, file: ObjectFile, cache: RangeCache, offsets: Int64s, sizes: Int64s) -> None:
        super().__init__(file)
        self._cache = cache
        self._ranges = offsets, sizes
        self._fetched: FetchedRanges | None = None
        self._lock = threading.Lock()

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """See `FetchedRanges.read_rows`."""
        left = np.flatnonzero(~self._cache.find_rows(self._file.digest, offsets, sizes, target, begins))
        if len(left):
            self._others().read_rows(offsets[left], sizes[left], target, begins[left])

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `FetchedRanges.read_rows`."""
        self._others().fill(handle, offset, target)

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """See `FetchedRanges.read_rows`."""
        data = self._cache.find(self._file.digest, offset, nbytes)
        return self._others().stored(handle, offset, nbytes, scratch) if data is None else data

    def _others(self) -> FetchedRanges:
        """For ranges that are not there, and those that lie across what was announced."""
        with self._lock:
            if self._fetched is None:
                self._fetched = FetchedRanges(self._file, *self._ranges)
            return self._fetched


class FetchedRanges(_Announced):
    """Ranges of an object that are fetched together, for one read of each.

    Parameters
    ----------
    file : ObjectFile
    offsets, sizes : (k,) int64
        In the order in which they will be read, as far as that is known.

    Raises
    ------
    DatasetCorrupt
        The object ends before a range does.
    """

    def __init__(self, file: ObjectFile, offsets: Int64s, sizes: Int64s) -> None:
        super().__init__(file)
        size = file.object.size
        if (beyond := np.flatnonzero((offsets < 0) | (sizes < 0) | (offsets > size - sizes))).size:
            end = int(offsets[beyond[0]]) + int(sizes[beyond[0]])
            raise DatasetCorrupt(f"the object ends at byte {size}, but an array in it ends at {end}")
        pieces = pieces_of(offsets, sizes)
        joined, theirs, held = file.found(pieces)
        missing = pieces - joined.keys() - theirs - held
        # Nobody else fetches what is claimed: other workers may be fetching ahead.
        if missing and may_keep() and file.store.ahead.claim(file, missing):
            joined, theirs, held = file.found(pieces)
            missing = pieces - joined.keys() - theirs - held
        self._pieces = sorted(missing)
        """What is fetched for this read."""
        self._on_disk = held
        here = held | theirs
        parts = sorted([*parts_of(self._pieces), *joined, *here])
        self._joined = [joined.get(part) for part in parts]
        """The fetches ahead that bring a part."""
        self._is_held = [part in here for part in parts]
        """Whether a part is in the cache on the local disk, or will soon be."""
        self._theirs = theirs - held
        self._begins = [begin for begin, _ in parts]
        self._sizes = [nbytes for _, nbytes in parts]
        self._futures: list[Future[Bytes] | None] = [None] * len(parts)
        self._uses = [0] * len(parts)
        order: dict[int, None] = {}
        for offset, nbytes in zip(offsets.tolist(), sizes.tolist(), strict=True):
            for number in self._touched(offset, nbytes):
                self._uses[number] += 1
                order[number] = None
        self._waiting = iter(list(order))
        self._next = next(self._waiting, None)
        self._outstanding = 0
        self._on_the_way = 0
        self._lock = threading.Lock()
        with self._lock:
            self._start_more()

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """Wait for all ranges and copy them. Others than those that were announced are fetched now.

        Raises
        ------
        RevisionChanged
            The object was replaced.
        SourceUnavailable
            The store has not answered before the deadline.
        Unreadable
            The object was deleted, or the store refuses the server's credentials.
        DatasetCorrupt
            The object ends before a range does.
        """
        left = self._not_on_disk(offsets, sizes, target, begins)
        offsets, sizes, begins = offsets[left], sizes[left], begins[left]
        for offset, nbytes, begin in zip(offsets.tolist(), sizes.tolist(), begins.tolist(), strict=True):
            self._copy(offset, target[begin : begin + nbytes])

    def _not_on_disk(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> npt.NDArray[np.intp]:
        """Read what is in the cache on the local disk, all at once; returns the indices of the other ranges."""
        ranges = zip(offsets.tolist(), sizes.tolist(), strict=True)
        on_disk = np.fromiter((one in self._on_disk for one in ranges), np.bool_, len(offsets))
        if (cache := self._file.store.cache) is not None and on_disk.any():
            on_disk[on_disk] = cache.find_rows(
                self._file.digest, offsets[on_disk], sizes[on_disk], target, begins[on_disk]
            )
        return np.flatnonzero(~on_disk)

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `read_rows`."""
        self._copy(offset, np.frombuffer(target, np.uint8))

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """A view of what was fetched if possible. See `read_rows`."""
        numbers = self._touched(offset, nbytes)
        is_one = len(numbers) == 1 and self._holds(numbers[0], offset, nbytes)
        if is_one and (data := self._take(numbers[0])) is not None:
            within = offset - self._begins[numbers[0]]
            return data[within : within + nbytes]
        target = scratch("stored", nbytes)
        self._copy(offset, target)
        return target

    def _copy(self, offset: int, target: Bytes) -> None:
        done = 0
        for number in self._touched(offset, len(target)):
            within = offset + done - self._begins[number]
            if within < 0 or (data := self._take(number)) is None:
                break
            nbytes = min(len(target) - done, len(data) - within)
            target[done : done + nbytes] = data[within : within + nbytes]
            done += nbytes
        if done < len(target):
            self._file.fill(-1, offset + done, memoryview(target[done:]))

    def _touched(self, offset: int, nbytes: int) -> range:
        """Numbers of the parts that have some of these bytes."""
        first = max(0, bisect_right(self._begins, offset) - 1)
        if first < len(self._begins) and self._begins[first] + self._sizes[first] <= offset:
            first += 1
        last = first
        while last < len(self._begins) and self._begins[last] < offset + nbytes:
            last += 1
        return range(first, last)

    def _holds(self, number: int, offset: int, nbytes: int) -> bool:
        begin = self._begins[number]
        return begin <= offset and offset + nbytes <= begin + self._sizes[number]

    def _take(self, number: int) -> Bytes | None:
        """A part, once it is there, for one of its uses; None if it has been used up."""
        with self._lock:
            if self._uses[number] <= 0:
                return None
        data = self._from_disk(number) if self._is_held[number] else self._from_ahead(number)
        if data is None:
            with self._lock:
                future = self._futures[number] or self._start([number])[0]
            data = self._file.store.wait(self._file.object, future)
            self._keep(number, data)
        with self._lock:
            self._uses[number] -= 1
            is_over = self._uses[number] == 0
            if is_over:
                if self._futures[number] is not None:
                    self._outstanding -= self._sizes[number]
                    self._on_the_way -= 1
                self._futures[number] = None
                self._start_more()
        if is_over and (part := self._joined[number]) is not None:
            self._file.store.ahead.used(part, (self._begins[number], self._sizes[number]))
        return data

    def _from_disk(self, number: int) -> Bytes | None:
        store, piece = self._file.store, (self._begins[number], self._sizes[number])
        if piece in self._theirs:
            store.wait_for_others(self._file.object, self._file.digest, piece)
        assert store.cache is not None
        return store.cache.find(self._file.digest, *piece)

    def _from_ahead(self, number: int) -> Bytes | None:
        """None if the part is not fetched ahead, or this has failed for a while and is to be tried again."""
        if (part := self._joined[number]) is None:
            return None
        try:
            data = self._file.store.wait(self._file.object, part.future)
        except SourceUnavailable:
            if not part.future.done():
                raise
            return None
        begin = self._begins[number] - part.begin
        return data[begin : begin + self._sizes[number]]

    def _keep(self, number: int, data: Bytes) -> None:
        """Store the pieces of a part on the local disk: the next time, they may be parts of others."""
        if (cache := self._file.store.cache) is None or not may_keep():
            return
        begin, end = self._begins[number], self._begins[number] + self._sizes[number]
        for piece in range(bisect_left(self._pieces, (begin, 0)), len(self._pieces)):
            offset, nbytes = self._pieces[piece]
            if offset + nbytes > end:
                break
            cache.keep(self._file.digest, offset, data[offset - begin : offset - begin + nbytes])

    def _start_more(self) -> None:
        if self._on_the_way > _MOST_RANGES // 2:
            # Many at a time take less work.
            return
        numbers: list[int] = []
        nbytes = self._outstanding
        while (
            self._next is not None
            and self._on_the_way + len(numbers) < _MOST_RANGES
            and (not nbytes or nbytes + self._sizes[self._next] <= WINDOW_BYTES)
        ):
            # It may have been started out of order.
            is_wanted = self._futures[self._next] is None and self._uses[self._next] > 0
            if is_wanted and not self._is_held[self._next] and self._joined[self._next] is None:
                numbers.append(self._next)
                nbytes += self._sizes[self._next]
            self._next = next(self._waiting, None)
        if numbers:
            self._start(numbers)

    def _start(self, numbers: list[int]) -> list[Future[Bytes]]:
        ranges = [(self._begins[number], self._sizes[number]) for number in numbers]
        futures = self._file.store.begin(self._file.object, ranges)
        for number, future in zip(numbers, futures, strict=True):
            self._futures[number] = future
            self._outstanding += self._sizes[number]
            self._on_the_way += 1
        return futures
