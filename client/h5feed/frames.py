"""What a body must hold, by what the server has said of the dataset: dtypes, shapes, offsets and row ids.

A batch of another shape or dtype would train a model wrongly without a word, and one that is announced too long would
take all memory. Both are found here, before anything is allocated or handed out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BadAnswer
from .wire import DTYPE_NAMES, OFFSETS, ROWS, WEIGHT, Tensor, dtype_named

MAX_BODY_BYTES = 4 << 30
"""Bytes of one answer at most, whatever the server says of itself: its own default is a sixteenth of that."""

_HEADER_BYTES, _TENSOR_BYTES, _ESCAPED = 4096, 256, 6
"""Bytes that a header may have for itself, for each of its tensors, and for each character of a name in it."""

DTYPES = {np.dtype(code).name: np.dtype(code) for code in DTYPE_NAMES}
"""numpy's dtypes that travel, by numpy's names."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Field:
    """One array of a dataset, without its row axis."""

    name: str
    role: str
    """``input``, ``label``, ``weight`` or ``other``."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """numpy's name of the dtype of the arrays that arrive."""
    readable: bool
    reason: str | None
    """Why it is not served, where it is not."""
    ragged: bool = False
    """Whether rows have lengths of their own: they arrive flat, with where each begins in ``NAME.offsets``."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes that its numbers stand for, where the file says them."""


@dataclass(frozen=True)
class Frame:
    """The tensors of every body of an order.

    Attributes
    ----------
    rows : int
        Of the dataset: row ids are below it.
    tensors : dict of str to (dtype, tuple of int)
        Dtype and shape without the first axis, by name; the row ids and weights included.
    flat : frozenset of str
        Those whose rows have lengths of their own.
    """

    rows: int
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    flat: frozenset[str]

    @classmethod
    def of(cls, rows: int, fields: Iterable[Field], encoded: Iterable[str], *, weighted: bool) -> Frame:
        """The frame of a dataset's fields.

        Parameters
        ----------
        encoded : iterable of str
            Those that come as the bytes of image files.
        weighted : bool
            Whether repeated rows pad the tail.

        Raises
        ------
        BadAnswer
            The server has told of a dtype that there is not.
        """
        tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {ROWS: (np.dtype("<i8"), ())}
        if weighted:
            tensors[WEIGHT] = np.dtype("<f4"), ()
        flat = set()
        encoded = set(encoded)
        for field in fields:
            is_bytes = field.name in encoded or field.dtype == "string"
            dtype = dtype_named("BF16") if field.dtype == "bfloat16" else DTYPES.get(field.dtype)
            if is_bytes:
                dtype = np.dtype("|u1")
            if dtype is None:
                raise BadAnswer(f"the server says that {field.name!r} is of the dtype {field.dtype!r}: there is none")
            if is_bytes or field.ragged:
                flat.add(field.name)
                tensors[field.name] = dtype, ()
                tensors[field.name + OFFSETS] = np.dtype("<i8"), ()
            else:
                tensors[field.name] = dtype, field.shape
        return cls(rows, tensors, frozenset(flat))

    def only(self, fields: Sequence[str], *, weighted: bool = True) -> Frame:
        """The same of some of the fields; rows that are asked for by their ids have no weights."""
        kept = {
            ROWS,
            *([WEIGHT] if weighted else []),
            *fields,
            *(name + OFFSETS for name in fields if name in self.flat),
        }
        tensors = {name: kind for name, kind in self.tensors.items() if name in kept}
        return Frame(self.rows, tensors, self.flat & kept)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row, without what has lengths of its own."""
        return sum(math.prod(s) * d.itemsize for name, (d, s) in self.tensors.items() if name not in self.flat)

    def max_bytes(self, rows: int, bodies: int = 1, limit: int = MAX_BODY_BYTES) -> int:
        """Bytes that so many bodies of `rows` rows may have; `limit` is that of one body with lengths of its own."""
        if self.flat:
            return min(bodies * limit, MAX_BODY_BYTES)
        head = _HEADER_BYTES + sum(_TENSOR_BYTES + _ESCAPED * len(name) for name in self.tensors)
        return min(bodies * (head + rows * self.row_bytes), MAX_BODY_BYTES)

    def check_plan(self, tensors: Iterable[Tensor], batch_size: int) -> None:
        """Compare with the tensors that a plan promises.

        Raises
        ------
        BadAnswer
        """
        by_name = {tensor.name: tensor for tensor in tensors}
        self._check_names(by_name)
        for name, tensor in by_name.items():
            rows = tensor.shape[:1] if name in self.flat else (batch_size + (name[: -len(OFFSETS)] in self.flat),)
            if (tensor.dtype, tensor.shape) != (self.tensors[name][0], rows + self.tensors[name][1]):
                raise _wrong(name, tensor.dtype, tensor.shape, *self.tensors[name])

    def check(self, stacked: Arrays) -> None:
        """Compare with the tensors of a run of bodies, which have one axis more in front.

        Raises
        ------
        BadAnswer
        """
        if stacked.keys() != self.tensors.keys():
            self._check_names(stacked)
        ids = stacked[ROWS]
        rows = ids.shape[1] if ids.ndim == 2 else -1
        for name, (dtype, sample) in self.tensors.items():
            array = stacked[name]
            if array.dtype != dtype or array.shape[2:] != sample or array.ndim < 2:
                raise _wrong(name, array.dtype, array.shape[1:], dtype, sample)
            if array.shape[1] != rows and name not in self.flat:
                if name[: -len(OFFSETS)] in self.flat and array.shape[1] == rows + 1:
                    continue
                raise BadAnswer(f"{name!r} has {array.shape[1]} rows where {rows} row ids came with it")
        for name in self.flat:
            _check_offsets(name, stacked[name], stacked[name + OFFSETS])
        # As unsigned numbers, those below zero are beyond every row.
        if ids.size and int(ids.view(np.uint64).max()) >= self.rows:
            raise BadAnswer(f"rows came that are none of the {self.rows:,} of the dataset")

    def _check_names(self, served: Iterable[str]) -> None:
        if set(served) != self.tensors.keys():
            names = ", ".join(sorted(map(repr, set(served) ^ self.tensors.keys()))[:8])
            raise BadAnswer(f"other fields came than were asked for: {names} are too many, or missing")


def _check_offsets(name: str, flat: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
    """Whether offsets, (bodies, rows + 1), divide a flat tensor, (bodies, items)."""
    if (
        not offsets.shape[1]
        or offsets[:, 0].any()
        or (offsets[:, -1] != flat.shape[1]).any()
        or (offsets[:, 1:] < offsets[:, :-1]).any()
    ):
        raise BadAnswer(f"the offsets of {name!r} do not divide its {flat.shape[1]} items into rows")


def _wrong(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], expected: np.dtype[Any], sample: tuple[int, ...]
) -> BadAnswer:
    return BadAnswer(
        f"{name!r} came as {dtype.name} of shape {list(shape)}, but the server says that its rows are {expected.name} "
        f"of shape {list(sample)}"
    )
