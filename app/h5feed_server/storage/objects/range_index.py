"""Which ranges of an object are known, and their checksums, in 16 bytes each: there may be millions."""

from __future__ import annotations

from collections.abc import Iterable

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
        recent = self._recent.get(piece)
        if recent is not None or not len(self._offsets):
            return recent
        place = self._place(piece, int(np.searchsorted(self._offsets, piece[0])))
        return None if place is None else int(self._checksums[place])

    def known(self, pieces: Iterable[Piece]) -> set[Piece]:
        """Those of some ranges that are known."""
        found, others = set(), []
        for piece in pieces:
            if piece in self._recent:
                found.add(piece)
            else:
                others.append(piece)
        if others and len(self._offsets):
            begins = np.searchsorted(self._offsets, np.array([offset for offset, _ in others], np.int64)).tolist()
            found.update(
                piece for piece, begin in zip(others, begins, strict=True) if self._place(piece, begin) is not None
            )
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
