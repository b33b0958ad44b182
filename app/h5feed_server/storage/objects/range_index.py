"""Which ranges of an object are known, and their checksums, in 16 bytes each: there may be millions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .parts import Piece

_RECENT = 1 << 14
_RECENT_SHARE = 32
"""Ranges that were added lately are in a dictionary of so many, or of this part of the others. Then they are merged."""


class RangeIndex:
    """Checksums by offset and size. Not safe for threads."""

    def __init__(self) -> None:
        self._recent: dict[Piece, int] = {}
        # Ascending by offset. Removed ranges have the size 0.
        self._offsets = np.zeros(0, np.int64)
        self._sizes = np.zeros(0, np.uint32)
        self._checksums = np.zeros(0, np.uint32)

    def __len__(self) -> int:
        return len(self._recent) + len(self._offsets)

    def get(self, piece: Piece) -> int | None:
        """The checksum of a range; None if it is not known."""
        return self.checksums([piece])[0]

    def checksums(self, pieces: Sequence[Piece]) -> list[int | None]:
        """The checksum of each of some ranges; None where it is not known."""
        found = [self._recent.get(piece) for piece in pieces]
        if None not in found or not len(self._offsets):
            return found
        others = [number for number, checksum in enumerate(found) if checksum is None]
        # wanted: (k, 2)
        wanted = np.array([pieces[number] for number in others], np.int64)
        begins = np.searchsorted(self._offsets, wanted[:, 0])
        # As a rule, no two begin at the same byte.
        first = np.minimum(begins, len(self._offsets) - 1)
        is_first = (self._offsets[first] == wanted[:, 0]) & (self._sizes[first] == wanted[:, 1])
        known = zip(others, begins.tolist(), is_first.tolist(), self._checksums[first].tolist(), strict=True)
        for number, begin, is_known, checksum in known:
            if is_known:
                found[number] = checksum
            elif (place := self._place(pieces[number], begin)) is not None:
                found[number] = int(self._checksums[place])
        return found

    def add(self, piece: Piece, checksum: int) -> None:
        """Add a range, or give it another checksum."""
        self._recent[piece] = checksum
        if len(self._recent) > max(_RECENT, len(self._offsets) // _RECENT_SHARE):
            self._merge()

    def remove(self, piece: Piece) -> None:
        """Forget a range."""
        self._recent.pop(piece, None)
        if (place := self._place(piece, int(np.searchsorted(self._offsets, piece[0])))) is not None:
            self._sizes[place] = 0

    def _place(self, piece: Piece, begin: int) -> int | None:
        """Where a range is in the arrays, if those with its offset begin there."""
        offset, size = piece
        while begin < len(self._offsets) and self._offsets[begin] == offset:
            if self._sizes[begin] == size:
                return begin
            begin += 1
        return None

    def _merge(self) -> None:
        for piece in self._recent:
            # It has another checksum now.
            if (place := self._place(piece, int(np.searchsorted(self._offsets, piece[0])))) is not None:
                self._sizes[place] = 0
        kept = self._sizes > 0
        recent = sorted(self._recent)
        offsets = np.array([offset for offset, _ in recent], np.int64)
        places = np.searchsorted(self._offsets[kept], offsets)

        def merged(held: npt.NDArray[np.uint32], added: list[int]) -> npt.NDArray[np.uint32]:
            return np.insert(held[kept], places, np.array(added, np.uint32))

        self._checksums = merged(self._checksums, [self._recent[piece] for piece in recent])
        sizes = merged(self._sizes, [size for _, size in recent])
        self._offsets, self._sizes = np.insert(self._offsets[kept], places, offsets), sizes
        self._recent = {}
