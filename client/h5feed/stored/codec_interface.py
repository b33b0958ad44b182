"""The common interface of codecs: their signature, and the scratch memory that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .scratch import Bytes, Scratch

Source = Any
"""(n,) uint8. Any, because imagecodecs accepts arrays but is annotated for bytes only."""
Options = tuple[int, ...]
Decode = Callable[[Source, Bytes, Options], int]
"""``decode(source, out, options)`` writes to the beginning of `out` and returns how many bytes it decoded."""

scratch = Scratch()
"""The scratch memory of all codecs in this process."""


def prefix(out: Bytes, nbytes: int) -> Bytes:
    """The first `nbytes` of `out`.

    Raises
    ------
    ValueError
        A header in the stored bytes claims no bytes, or more than there is room for.
    """
    if not 0 < nbytes <= len(out):
        raise ValueError(f"it claims {nbytes} decoded bytes")
    return out[:nbytes]
