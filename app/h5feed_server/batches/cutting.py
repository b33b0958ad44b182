"""Which items of a list or text are sent, if not all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.runs import consecutive

Int64s = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """Consecutive items of each of some rows.

    Attributes
    ----------
    skipped : (k,) int64
        Number of items before them.
    lengths : (k,) int64
        How many they are.
    """

    skipped: Int64s
    lengths: Int64s

    @property
    def offsets(self) -> Int64s:
        """Where the items of each row begin when they are back to back, (k + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def taken(self, items: npt.NDArray[Any], offsets: Int64s) -> npt.NDArray[Any]:
        """These items only, back to back, of all `items`, which `offsets` divides into rows."""
        return np.asarray(items[consecutive(offsets[:-1] + self.skipped, self.lengths)])


@dataclass(frozen=True)
class Cut:
    """Rows of at most `most` items; longer ones keep their start or their end."""

    most: int
    keep: Literal["start", "end"] = "start"

    def spans(self, lengths: Int64s) -> Spans:
        """What is left of rows of these lengths, (k,) int64."""
        kept = np.minimum(lengths, self.most)
        return Spans(lengths - kept if self.keep == "end" else np.zeros_like(kept), kept)
