"""A batch: arrays by field name, and the ids of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .buffers import BufferPool
from .csr import SparseRows
from .suggestions import no_field
from .tables import titled_table
from .wire import DATA, INDICES, INDPTR, OFFSETS

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class Batch(Mapping[str, npt.NDArray[Any]]):
    """One batch: a mapping of field names to arrays of equal length along the first axis.

    The arrays are views of one recycled buffer, which is not reused while any of them is referenced.

    Attributes
    ----------
    rows : (batch,) int64
        Row ids in the dataset; of a mixture, in the dataset of their source. With ``pack=``, those of all rows in the
        packed rows, one after the other.
    row_offsets : (batch + 1,) int64 or None
        With ``pack=``: where the rows of each packed row begin in `rows`.
    weight : (batch,) float32 or None
        With ``last="pad"``: 1 for a row, 0 for a padding row.
    source : (batch,) int64 or None
        Of a mixture: the number of the source that each row comes from, in the order of the sources.
    index, epoch : int
    revision : str
    columns : dict of str to int
        The fields with sparse rows, and their numbers of columns. The batch contains each of them as ``NAME.data``,
        ``NAME.indices`` and ``NAME.indptr``: see `sparse` and `dense`.
    """

    __slots__ = ("_fields", "columns", "epoch", "index", "revision", "row_offsets", "rows", "source", "weight")

    def __init__(
        self,
        fields: dict[str, npt.NDArray[Any]],
        rows: npt.NDArray[np.int64],
        weight: npt.NDArray[np.float32] | None = None,
        *,
        index: int,
        epoch: int,
        revision: str,
        source: npt.NDArray[np.int64] | None = None,
        sparse: Mapping[str, int] | None = None,
    ) -> None:
        self._fields = fields
        self.rows = rows
        self.row_offsets: npt.NDArray[np.int64] | None = None
        self.weight = weight
        self.index = index
        self.epoch = epoch
        self.revision = revision
        self.source = source
        self.columns: Mapping[str, int] = {} if sparse is None else sparse

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

    def sparse(self, name: str) -> csr_matrix:
        """The rows of a sparse field as a matrix of scipy, (batch, columns)."""
        return self._sparse_rows(name).scipy()

    def dense(self, name: str) -> npt.NDArray[Any]:
        """The rows of a sparse field as a dense array, (batch, columns), without scipy; other fields as they are."""
        return self[name] if name in self else self._sparse_rows(name).dense()

    def densified(self, pool: BufferPool) -> Batch:
        """The batch with dense arrays instead of sparse rows, in memory of `pool`."""
        dense = {name: self._sparse_rows(name).dense(pool) for name in self.columns}
        parts = {name + suffix for name in dense for suffix in (DATA, INDICES, INDPTR)}
        fields = {name: array for name, array in self._fields.items() if name not in parts} | dense
        return self.with_fields(fields, sparse={})

    def with_fields(self, fields: dict[str, npt.NDArray[Any]], *, sparse: Mapping[str, int] | None = None) -> Batch:
        """The same rows with other arrays; `sparse`: see `columns`, by default as they are."""
        made = Batch(
            fields,
            self.rows,
            self.weight,
            index=self.index,
            epoch=self.epoch,
            revision=self.revision,
            source=self.source,
            sparse=self.columns if sparse is None else sparse,
        )
        made.row_offsets = self.row_offsets
        return made

    def _sparse_rows(self, name: str) -> SparseRows:
        if name not in self.columns:
            raise no_field(name, self.columns, "this batch has no sparse field")
        return SparseRows(self[name + DATA], self[name + INDICES], self[name + INDPTR], self.columns[name])

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
