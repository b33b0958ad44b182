"""How ranges of an object are fetched: long ones in pieces, and those that touch by one request."""

from __future__ import annotations

from collections.abc import Iterable

from h5feed.stored.source import Int64s

PART_BYTES = 8 << 20
"""Ranges that touch are fetched as one up to this size, and larger ones in parts of it."""

Piece = tuple[int, int]
"""Offset and size of a range, or of a part of a long one."""


def pieces_of(offsets: Int64s, sizes: Int64s) -> set[Piece]:
    """Offset and size of each range once, of long ones in pieces."""
    pairs = set(zip(offsets.tolist(), sizes.tolist(), strict=True))
    if not len(sizes) or sizes.max() <= PART_BYTES:
        return {pair for pair in pairs if pair[1]}
    return {
        (begin, min(PART_BYTES, offset + nbytes - begin))
        for offset, nbytes in pairs
        for begin in range(offset, offset + nbytes, PART_BYTES)
    }


def parts_of(pieces: Iterable[Piece]) -> list[Piece]:
    """Offset and size of what is fetched for some ascending pieces, ascending: no byte is in two parts."""
    parts: list[Piece] = []
    for offset, nbytes in pieces:
        end = offset + nbytes
        if parts and offset <= (reached := sum(parts[-1])):
            begin, held = parts[-1]
            offset = max(offset, reached)
            if end - begin <= PART_BYTES:
                parts[-1] = (begin, max(held, end - begin))
                continue
        while offset < end:
            step = min(PART_BYTES, end - offset)
            parts.append((offset, step))
            offset += step
    return parts
