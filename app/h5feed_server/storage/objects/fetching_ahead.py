"""Ranges of objects that are fetched before somebody asks for them, in bounded memory.

Whoever asks for such a range joins its fetch, or gets what has come: see `FetchedRanges`. What has come is also kept on
the local disk, where the other workers find it; until then they wait for it, see `Claims`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s

from .claims import Claims
from .parts import Piece, parts_of, pieces_of

if TYPE_CHECKING:
    from .object_file import ObjectFile
    from .range_cache import RangeCache

_ORDER_SECONDS = 60.0
"""What was fetched for an order that nobody has read for this long is dropped."""

_PAUSE_SECONDS = 5.0
"""After this long, it is dropped if others need the room."""

_WASTE_SHARE = 8
"""Of what is fetched without sharing it, the part that may be dropped without use."""

_MOST_PIECES = 1 << 15
"""Ranges that are in flight, or have come and are not used yet: each takes some KiB of memory, however short it is."""

_LATE = 256
"""Batches that may be asked for so much later than others, if connections overtake each other."""

_KEEPERS = 2
"""Threads that write to the local disk."""

Order = Hashable
"""Names an order of batches."""

_READS = "reads"
"""The order of what was not fetched ahead."""


class Begun(NamedTuple):
    """What `FetchingAhead.fetch` has begun."""

    has_room: bool = True
    """Whether there was room for all ranges."""
    was_needed: bool = False
    """Whether any range was not on the disk yet."""


@dataclass(eq=False)
class Part:
    """Ranges that are fetched by one request.

    Attributes
    ----------
    number : int
        Of the last batch that needs one of them.
    left : dict
        How often each range is still needed.
    """

    file: ObjectFile
    begin: int
    nbytes: int
    future: Future[Bytes]
    number: int
    left: dict[Piece, int]
    is_kept: bool = False
    """Whether it is on the disk, or will never be."""
    is_dropped: bool = False


@dataclass
class _Read:
    """What is fetched for one order."""

    asked: float
    parts: OrderedDict[Part, None] = field(default_factory=OrderedDict)
    """In the order of their batches."""


class FetchingAhead:
    """What is fetched ahead in one process, from all its stores.

    Parameters
    ----------
    cache : RangeCache or None
        Keeps what has come on the local disk.
    max_bytes : int
        Bound on what is in flight, or has come and is not used or not on the disk yet.
    claims : Claims or None
        Those of the other workers, if there are any and a disk to share.
    is_alone : bool
        Whether no other process reads for the same clients.
    """

    def __init__(self, cache: RangeCache | None, max_bytes: int, claims: Claims | None, is_alone: bool) -> None:
        self.max_bytes = max_bytes
        self.claims = claims
        self._cache = cache
        self._is_alone = is_alone
        self._lock = threading.Lock()
        self._parts: dict[tuple[bytes, Piece], Part] = {}
        self._orders: OrderedDict[Order, _Read] = OrderedDict()
        self._nbytes = 0
        self._keepers = ThreadPoolExecutor(_KEEPERS, "h5feed-keep")
        self._fetched_bytes = 0
        self.unused_bytes = 0
        """Fetched ahead, dropped without use, and not kept on the disk, so far."""

    def close(self) -> None:
        """End the threads."""
        self._keepers.shutdown(wait=False, cancel_futures=True)

    @property
    def nbytes(self) -> int:
        """What is in flight or has come, in bytes."""
        return self._nbytes

    @property
    def is_shared(self) -> bool:
        """Whether what one worker fetches is also there for all others that read for the same clients."""
        cache = self._cache
        return self._is_alone or (self.claims is not None and cache is not None and cache.has_room)

    @property
    def is_worthwhile(self) -> bool:
        """Whether most of what was fetched ahead without sharing it has been used."""
        return self.unused_bytes <= self._fetched_bytes // _WASTE_SHARE + self.max_bytes // _WASTE_SHARE

    def fetch(
        self, order: Order, number: int, file: ObjectFile, offsets: Int64s, sizes: Int64s, *, urgent: bool = False
    ) -> Begun:
        """Begin to fetch ranges that a batch needs, unless they are here or on their way. Does not wait.

        Parameters
        ----------
        order : hashable
        number : int
            Of the batch.
        offsets, sizes : (k,) int64
        urgent : bool
            The batch has been asked for.
        """
        size = file.object.size
        if not len(offsets) or (offsets < 0).any() or (sizes < 0).any() or (offsets > size - sizes).any():
            # Whoever reads them gets the error.
            return Begun()
        pieces = sorted(pieces_of(offsets, sizes))
        with self._lock:
            known = self._order(order)
            missing = []
            for piece in pieces:
                if (part := self._parts.get((file.digest, piece))) is not None:
                    part.left[piece] = part.left.get(piece, 0) + 1
                    part.number = max(part.number, number)
                else:
                    missing.append(piece)
            is_joined = len(missing) < len(pieces)
            missing = self._not_held(file.digest, missing)
            if not missing:
                return Begun(was_needed=is_joined)
            fits = self._make_room(sum(nbytes for _, nbytes in missing), len(missing), order, number)
            if not fits:
                missing = _first(missing[: max(0, _MOST_PIECES - len(self._parts))], self.max_bytes - self._nbytes)
            if self.claims is not None:
                theirs = self.claims.take(file.digest, missing)
                mine = [piece for piece in missing if piece not in theirs]
                # Another worker may have kept and released it since it was looked for.
                missing = self._not_held(file.digest, mine)
                self.claims.release(file.digest, set(mine).difference(missing))
            wanted = parts_of(missing)
            futures = file.store.begin(file.object, wanted, ahead=not urgent)
            parts = []
            for (begin, nbytes), future in zip(wanted, futures, strict=True):
                first, end = bisect_left(missing, (begin, 0)), bisect_left(missing, (begin + nbytes, 0))
                part = Part(file, begin, nbytes, future, number, dict.fromkeys(missing[first:end], 1))
                self._nbytes += nbytes
                self._fetched_bytes += nbytes
                known.parts[part] = None
                for piece in part.left:
                    self._parts[file.digest, piece] = part
                parts.append(part)
        for part in parts:
            # Without the lock: it is called at once if the fetch is over.
            part.future.add_done_callback(partial(self._arrived, part))
        return Begun(fits, was_needed=True)

    def claim(self, file: ObjectFile, pieces: set[Piece]) -> bool:
        """Begin to fetch ranges that are being read, and that nobody fetches yet. Returns whether that is possible,
        which it is if workers share what they fetch.
        """
        if self.claims is None or not self.max_bytes:
            return False
        ranges = np.array(sorted(pieces), np.int64)
        self.fetch(_READS, 0, file, ranges[:, 0], ranges[:, 1], urgent=True)
        return True

    def join(self, digest: bytes, pieces: Iterable[Piece]) -> dict[Piece, Part]:
        """Those of some ranges of an object that are here, or on their way."""
        if not self._parts:
            return {}
        with self._lock:
            found = ((piece, self._parts.get((digest, piece))) for piece in pieces)
            return {piece: part for piece, part in found if part is not None}

    def claimed_by_others(self, digest: bytes, pieces: Iterable[Piece]) -> set[Piece]:
        """Those of some ranges of an object that other workers are fetching ahead."""
        return set() if self.claims is None else self.claims.theirs(digest, pieces)

    def used(self, part: Part, piece: Piece) -> None:
        """A range that was joined has been read."""
        with self._lock:
            part.left[piece] = part.left.get(piece, 0) - 1
            self._let_go(part)

    def drop_old(self, seconds: float) -> None:
        """Drop what was fetched for orders that nobody has read for this many seconds."""
        with self._lock:
            for order in [order for order, read in self._orders.items() if time.monotonic() - read.asked >= seconds]:
                self._drop(order)

    def _order(self, order: Order) -> _Read:
        now = time.monotonic()
        while self._orders and now - next(iter(self._orders.values())).asked > _ORDER_SECONDS:
            self._drop(next(iter(self._orders)))
        if order not in self._orders:
            self._leave_to_disk()
        known = self._orders.setdefault(order, _Read(now))
        known.asked = now
        self._orders.move_to_end(order)
        return known

    def _leave_to_disk(self) -> None:
        """Drop what is on the disk: of the orders so far, most batches have been asked for, if only from others."""
        if (cache := self._cache) is None or not cache.has_room:
            return
        for read in self._orders.values():
            for part in [part for part in read.parts if part.is_kept]:
                self._forget(part)

    def _make_room(self, nbytes: int, count: int, order: Order, number: int) -> bool:
        """Drop what will probably not be needed. Returns whether there is room for so many bytes, and ranges."""

        def fits() -> bool:
            return self._nbytes + nbytes <= self.max_bytes and len(self._parts) + count <= _MOST_PIECES

        for other, read in list(self._orders.items()):
            if fits():
                return True
            if other != order and time.monotonic() - read.asked > _PAUSE_SECONDS:
                self._drop(other)
        # Of batches that were asked for from other workers, which have found it on the disk.
        for part in list(self._orders[order].parts):
            if fits():
                return True
            if part.is_kept and part.number < number - (0 if self.is_shared else _LATE):
                self._forget(part)
        return fits()

    def _not_held(self, digest: bytes, pieces: list[Piece]) -> list[Piece]:
        """Those that are not on the disk."""
        cache = self._cache
        if cache is None or not pieces:
            return pieces
        held = cache.held(digest, pieces)
        return [piece for piece in pieces if piece not in held]

    def _drop(self, order: Order) -> None:
        for part in list(self._orders.pop(order).parts):
            self._forget(part)

    def _let_go(self, part: Part) -> None:
        if part.is_kept and not part.is_dropped and all(left <= 0 for left in part.left.values()):
            self._forget(part)

    def _forget(self, part: Part) -> None:
        """Whoever has joined it has it nevertheless."""
        if part.is_dropped:
            return
        part.is_dropped = True
        for read in self._orders.values():
            read.parts.pop(part, None)
        for piece, left in part.left.items():
            if self._parts.get((part.file.digest, piece)) is part:
                del self._parts[part.file.digest, piece]
                self.unused_bytes += piece[1] if left > 0 and not self.is_shared else 0
        if part.is_kept:
            self._nbytes -= part.nbytes

    def _arrived(self, part: Part, future: Future[Bytes]) -> None:
        """Called by the thread of the store, which must not wait."""
        # The server may be stopping, and its claims with it.
        with contextlib.suppress(RuntimeError):
            self._keepers.submit(self._keep, part)

    def _keep(self, part: Part) -> None:
        failed = part.future.exception() is not None
        pieces = list(part.left)
        try:
            if not failed and (cache := self._cache) is not None:
                data = part.future.result()
                for offset, nbytes in pieces:
                    within = offset - part.begin
                    cache.keep(part.file.digest, offset, data[within : within + nbytes])
        finally:
            if self.claims is not None:
                self.claims.release(part.file.digest, pieces)
            with self._lock:
                part.is_kept = True
                if part.is_dropped:
                    self._nbytes -= part.nbytes
                elif failed:
                    # Whoever needs it asks again.
                    self._forget(part)
                else:
                    self._let_go(part)


def _first(pieces: list[Piece], nbytes: int) -> list[Piece]:
    """As many of some pieces as have no more bytes than that."""
    chosen = []
    for piece in pieces:
        nbytes -= piece[1]
        if nbytes < 0:
            break
        chosen.append(piece)
    return chosen
