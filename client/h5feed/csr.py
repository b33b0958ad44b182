"""Sparse rows as scipy stores them (CSR), and as dense arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .buffers import BufferPool
from .errors import TooLarge
from .extras import needing
from .runs import equal_runs

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MAX_DENSE_BYTES = 4 << 30
"""Maximum size of the dense array of a batch."""


@dataclass(frozen=True)
class SparseRows:
    """Rows of a sparse matrix.

    Attributes
    ----------
    data : (n,) array
        The stored values of all rows, back to back.
    indices : (n,) int32 or int64
        Their columns.
    indptr : (rows + 1,) int64
        Where the values of each row begin, and where those of the last end.
    columns : int
    """

    data: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    indptr: npt.NDArray[np.int64]
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indptr) - 1, self.columns

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense array."""
        return self.shape[0] * self.columns * self.data.dtype.itemsize

    def dense(self, pool: BufferPool | None = None) -> npt.NDArray[Any]:
        """The rows as a dense array, (rows, columns); values that are stored several times are added up, as in scipy.

        Parameters
        ----------
        pool : BufferPool, optional
            Provides the memory.

        Raises
        ------
        TooLarge
        """
        if self.dense_bytes > MAX_DENSE_BYTES:
            rows, columns = self.shape
            raise TooLarge(
                f"{rows} dense rows of {columns} columns have {self.dense_bytes} bytes, more than {MAX_DENSE_BYTES}: "
                'use a smaller batch_size, or sparse="csr"'
            )
        if pool is None:
            flat = np.zeros(self.shape[0] * self.columns, self.data.dtype)
        else:
            flat = pool.lease_or_new(self.dense_bytes).view(self.data.dtype)
            flat.fill(0)
        places = self._places()
        if (places[1:] > places[:-1]).all():
            flat[places] = self.data
        else:
            np.add.at(flat, places, self.data)
        return flat.reshape(self.shape)

    def summed(self) -> npt.NDArray[Any]:
        """The stored values, (n,), with those of the same place added up."""
        places = self._places()
        if (places[1:] > places[:-1]).all():
            return self.data
        order = np.argsort(places, kind="stable")
        places = places[order]
        begins, _ = equal_runs(places)
        summed: npt.NDArray[Any] = np.add.reduceat(self.data[order], begins, dtype=self.data.dtype)
        return summed

    def _places(self) -> npt.NDArray[np.int64]:
        """Where each value goes in the flat dense array, (n,)."""
        places = np.repeat(np.arange(self.shape[0], dtype=np.int64) * self.columns, np.diff(self.indptr))
        places += self.indices.astype(np.int64, copy=False)
        return places

    def scipy(self) -> csr_matrix:
        """The rows as a matrix of scipy, which shares their memory where the dtype of the indices allows it.

        Raises
        ------
        ModuleNotFoundError
        """
        with needing("a sparse matrix", "scipy", "`pip install scipy`, or use dense()"):
            from scipy.sparse import csr_matrix
        return csr_matrix((self.data, self.indices, self.indptr), self.shape)
