"""How far a build is, as whoever has asked for it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes
    ----------
    phase : str
        ``rows``: made and written; ``layout``: put into their final layout. Of object stores: ``fetch``, what is copied
        of the source; ``check`` and ``upload`` of the finished files.
    rows, total : int
        Finished, with those of an interrupted build; and in all. Bytes in the phases of object stores.
    written : int
        Bytes by this process.
    """

    phase: str
    rows: int
    total: int
    written: int


OnProgress = Callable[[Progress], None]
