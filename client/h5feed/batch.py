"""A batch: arrays by field name, and the ids of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .suggestions import no_field
from .tables import titled_table
from .wire import OFFSETS


class Batch(Mapping[str, npt.NDArray[Any]]):
    """One batch: a mapping of field names to arrays of equal length along the first axis.

    The arrays are views of one recycled buffer, which is not reused while any of them is referenced.

    Attributes
    ----------
    rows : (batch,) int64
        Row ids in the dataset. With ``pack=``, those of all rows in the packed rows, one after the other.
    row_offsets : (batch + 1,) int64 or None
        With ``pack=``: where the rows of each packed row begin in `rows`.
    weight : (batch,) float32 or None
        With ``last="pad"``: 1 for a row, 0 for a padding row.
    index, epoch : int
    revision : str
    """

    __slots__ = ("_fields", "epoch", "index", "revision", "row_offsets", "rows", "weight")

    def __init__(
        self,
        fields: dict[str, npt.NDArray[Any]],
        rows: npt.NDArray[np.int64],
        weight: npt.NDArray[np.float32] | None = None,
        *,
        index: int,
        epoch: int,
        revision: str,
    ) -> None:
        self._fields = fields
        self.rows = rows
        self.row_offsets: npt.NDArray[np.int64] | None = None
        self.weight = weight
        self.index = index
        self.epoch = epoch
        self.revision = revision

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        try:
            return self._fields[name]
        except KeyError:
            raise no_field(name, self._fields, "this batch has no field") from None

    def text(self, name: str) -> list[str]:
        """The strings of a text field, one per row. The batch contains them as flat bytes and ``NAME.offsets``."""
        flat, offsets = self[name].tobytes(), self[name + OFFSETS].tolist()
        return [flat[begin:end].decode("utf-8", "replace") for begin, end in pairwise(offsets)]

    def lists(self, name: str) -> list[npt.NDArray[Any]]:
        """The rows of a ragged field, one array each: views of the flat array, divided at ``NAME.offsets``."""
        return np.split(self[name], self[name + OFFSETS][1:-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self._fields.items())
        return f"<Batch {self.index} of epoch {self.epoch}, {len(self.rows)} rows, {fields}>"

    def _repr_html_(self) -> str:
        title = f"Batch {self.index} of epoch {self.epoch}, {len(self.rows)} rows, revision {self.revision}"
        return titled_table(
            title, ("field", "dtype", "shape"), [(name, a.dtype, list(a.shape)) for name, a in self._fields.items()]
        )

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._fields)
