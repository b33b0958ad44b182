"""What codecs have in common: how each is called, and the memory that it may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .scratch import Bytes, Scratch

Source = Any
"""(n,) uint8; imagecodecs reads arrays, but its annotations know only bytes."""
Options = tuple[int, ...]
Decode = Callable[[Source, Bytes, Options], int]
"""``decode(source, out, options)`` writes to the beginning of `out` and returns how many bytes it decoded."""

scratch = Scratch()
"""Of all codecs in this process."""


def prefix(out: Bytes, nbytes: int) -> Bytes:
    """The first `nbytes` of `out`; ValueError where a stored header claims more than there is room for."""
    if not 0 < nbytes <= len(out):
        raise ValueError(f"it claims {nbytes} decoded bytes")
    return out[:nbytes]
