"""Check that a body matches the server's description of the dataset: dtypes, shapes, offsets and row ids.

A wrong shape or dtype would silently train a wrong model, and a wrong length could use up all memory. Both are detected
here, before anything is allocated or handed out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BadAnswer
from .offsets import MASK, Offsets, axes_of
from .wire import (
    ALIGNMENT,
    CROP,
    DATA,
    DTYPE_NAMES,
    EPISODE,
    INDICES,
    INDPTR,
    ITEMS,
    OFFSETS,
    ROWS,
    WEIGHT,
    Tensor,
    TensorPlace,
    dtype_named,
)

MAX_BODY_BYTES = 4 << 30
"""Maximum size of a response in bytes, whatever the server announces. The server's own default is a sixteenth."""

_HEADER_BYTES, _TENSOR_BYTES, _ESCAPED = 4096, 256, 6
"""Maximum size of a header: bytes in general, per tensor, and per character of a tensor's name."""

DTYPES = {np.dtype(code).name: np.dtype(code) for code in DTYPE_NAMES}
"""The dtypes that can be sent, by numpy name."""

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
    """Numpy name of the dtype, as received."""
    readable: bool
    reason: str | None
    """Why the field is not served, if it is not."""
    ragged: bool = False
    """Whether rows differ in length: they arrive as a flat array, with the start of each row in ``NAME.offsets``."""
    class_names: tuple[str, ...] | None = None
    """Class names in order of the class numbers, if the file has them."""
    index_dtype: str | None = None
    """Numpy name of the dtype of column indices, if rows are sparse. They arrive as the stored values, ``NAME.data``,
    their column indices, ``NAME.indices``, and the start of each row in both, ``NAME.indptr``."""


@dataclass(frozen=True)
class Frame:
    """The expected tensors of every body of an order.

    Attributes
    ----------
    rows : int
        Number of rows of the dataset; row ids are smaller.
    tensors : dict of str to (dtype, tuple of int)
        Dtype and shape without the first axis, by name, including row ids and weights.
    flat : dict of str to str
        Tensors whose rows differ in length, and the names of their offsets.
    sparse : dict of str to int
        Fields with sparse rows, and their numbers of columns.
    masks : frozenset of str
        Tensors that say which rows of samples are real.
    packed : bool
        Whether the rows of a body are those of packed rows, whose number differs. The offsets of the row ids say where
        each packed row begins.
    """

    rows: int
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    flat: Mapping[str, str]
    sparse: Mapping[str, int] = dataclass_field(default_factory=dict)
    masks: frozenset[str] = frozenset()
    packed: bool = False

    @classmethod
    def of(
        cls,
        rows: int,
        fields: Iterable[Field],
        encoded: Iterable[str],
        *,
        weighted: bool,
        offsets: Mapping[str, Offsets] | None = None,
        masked: bool = False,
        cropped_axes: int = 0,
        packed: bool = False,
    ) -> Frame:
        """The frame of some fields of a dataset.

        Parameters
        ----------
        encoded : iterable of str
            Fields that are sent as the bytes of image files.
        weighted : bool
            Whether the tail is padded with repeated rows.
        offsets : mapping of str to int or tuple of int, optional
            Of fields whose rows are not the samples' own.
        masked : bool
            Whether these fields have masks.
        cropped_axes : int
            If rows are cropped, along how many axes; the fields have the shape of the crops.
        packed : bool
            Whether the rows are those of packed rows.

        Raises
        ------
        BadAnswer
            The server sent an unknown dtype.
        """
        tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {ROWS: (np.dtype("<i8"), ())}
        if weighted:
            tensors[WEIGHT] = np.dtype("<f4"), ()
        if cropped_axes:
            tensors[CROP] = np.dtype("<i8"), (cropped_axes,)
        if packed:
            tensors[ROWS + OFFSETS] = np.dtype("<i8"), ()
        flat: dict[str, str] = {}
        sparse: dict[str, int] = {}
        masks = set()
        encoded = set(encoded)
        for field in fields:
            axes = axes_of((offsets or {}).get(field.name, 0))
            is_bytes = field.name in encoded or field.dtype == "string"
            dtype = dtype_named("BF16") if field.dtype == "bfloat16" else DTYPES.get(field.dtype)
            if is_bytes:
                dtype = np.dtype("|u1")
            if dtype is None:
                raise BadAnswer(f"the server sent an unknown dtype {field.dtype!r} for {field.name!r}")
            if field.index_dtype is not None:
                index_dtype = DTYPES.get(field.index_dtype)
                if index_dtype is None or index_dtype.kind not in "iu" or len(field.shape) != 1:
                    raise BadAnswer(f"the server sent invalid column indices {field.index_dtype!r} for {field.name!r}")
                values, indices, starts = _parts_of(field.name)
                tensors |= {values: (dtype, ()), starts: (np.dtype("<i8"), ()), indices: (index_dtype, ())}
                flat |= {values: starts, indices: starts}
                sparse[field.name] = field.shape[0]
            elif is_bytes or field.ragged:
                flat[field.name] = field.name + OFFSETS
                tensors[field.name] = dtype, ()
                tensors[field.name + OFFSETS] = np.dtype("<i8"), ()
            else:
                tensors[field.name] = dtype, (*axes, *field.shape)
            # Behind its field, as in a body.
            if masked and field.name in (offsets or {}):
                masks.add(field.name + MASK)
                tensors[field.name + MASK] = np.dtype("|b1"), axes
        return cls(rows, tensors, flat, sparse, frozenset(masks), packed)

    def only(self, fields: Sequence[str], *, weighted: bool = True) -> Frame:
        """The frame of some of the fields. Rows requested by id have no weights."""
        kept = {ROWS, *([CROP] if fields else []), *([WEIGHT] if weighted else []), *fields}
        sparse = {name: columns for name, columns in self.sparse.items() if name in kept}
        kept |= {part for name in sparse for part in _parts_of(name)}
        kept |= {offsets for name, offsets in self.flat.items() if name in kept}
        kept |= {name + MASK for name in fields if name + MASK in self.masks}
        tensors = {name: kind for name, kind in self.tensors.items() if name in kept}
        flat = {name: offsets for name, offsets in self.flat.items() if name in kept}
        return Frame(self.rows, tensors, flat, sparse, self.masks & kept)

    def row_ids(self, others: Iterable[str], *, episodes: bool) -> Frame:
        """The frame of bodies that have only the ids of the rows that samples are made of.

        Parameters
        ----------
        others : iterable of str
            Names of the tensors with rows of other datasets.
        episodes : bool
            Whether there are those of the episodes.
        """
        kept = {name: self.tensors[name] for name in (ROWS, WEIGHT, CROP, ROWS + OFFSETS) if name in self.tensors}
        int64 = np.dtype("<i8")
        kept |= {EPISODE: (int64, (2,))} if episodes else {}
        kept |= {ITEMS: (int64, (2,))} if self.packed else {}
        return Frame(self.rows, kept | dict.fromkeys(others, (int64, ())), {}, packed=self.packed)

    def without(self, fields: Collection[str]) -> Frame:
        """The frame of all other fields, which do not differ in length."""
        tensors = {name: kind for name, kind in self.tensors.items() if name not in fields}
        return replace(self, tensors=tensors)

    def encoded(self, fields: Collection[str]) -> Frame:
        """The same frame, with some fields as the bytes of image files."""
        tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, kind in self.tensors.items():
            if name in fields:
                tensors |= {name: (np.dtype("|u1"), ()), name + OFFSETS: (np.dtype("<i8"), ())}
            else:
                tensors[name] = kind
        return replace(self, tensors=tensors, flat={**self.flat, **{name: name + OFFSETS for name in fields}})

    @cached_property
    def names(self) -> Sequence[str]:
        """Names of the fields, in the order of an ordinary body."""
        order = {name: place for place, name in enumerate(self.tensors)}
        return sorted(order.keys() - {ROWS, WEIGHT}, key=lambda name: (-self.tensors[name][0].itemsize, order[name]))

    @cached_property
    def fields(self) -> Sequence[str]:
        """Names of the fields as in requests, in the order of `names`: sparse fields have one for all their tensors."""
        whole = {part: name for name in self.sparse for part in _parts_of(name)}
        return list(
            dict.fromkeys(whole.get(name, name) for name in self.names if name in whole or name not in self.offsets)
        )

    @cached_property
    def offsets(self) -> frozenset[str]:
        """Tensors with the start of each row of those whose rows differ in length."""
        return frozenset(self.flat.values())

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row, without fields whose rows differ in length."""
        return sum(math.prod(s) * d.itemsize for name, (d, s) in self.tensors.items() if name not in self.flat)

    def is_aligned(self, rows: int) -> bool:
        """Whether all tensors of a body of `rows` rows start 64-byte aligned if the body does.

        Most bodies do, because of usual batch sizes. True if rows differ in length or are packed, because sizes are not
        known then.
        """
        start = 0
        for dtype, sample in sorted(self.tensors.values(), key=lambda kind: -kind[0].itemsize):
            if start % ALIGNMENT and not self.flat and not self.packed:
                return False
            start += rows * math.prod(sample) * dtype.itemsize
        return True

    def max_bytes(self, rows: int, bodies: int = 1, limit: int = MAX_BODY_BYTES) -> int:
        """Maximum size of `bodies` bodies of `rows` rows; `limit` applies to a body with rows that differ in length."""
        if self.flat or self.packed:
            return min(bodies * limit, MAX_BODY_BYTES)
        head = _HEADER_BYTES + sum(_TENSOR_BYTES + _ESCAPED * len(name) for name in self.tensors)
        return min(bodies * (head + rows * self.row_bytes), MAX_BODY_BYTES)

    def check_plan(self, tensors: Iterable[Tensor], batch_size: int) -> None:
        """Compare with the tensors announced in a plan.

        Raises
        ------
        BadAnswer
        """
        by_name = {tensor.name: tensor for tensor in tensors}
        self._check_names(by_name)
        for name, tensor in by_name.items():
            rows: tuple[int, ...] = (batch_size + (name in self.offsets),)
            if name in self.flat or self.packed:
                rows = tensor.shape[:1]
            if (tensor.dtype, tensor.shape) != (self.tensors[name][0], rows + self.tensors[name][1]):
                raise _wrong(name, tensor.dtype, tensor.shape, *self.tensors[name])

    def check_places(self, tensors: Sequence[TensorPlace], count: int) -> None:
        """Compare with the tensors in the header of a body of `count` rows.

        Raises
        ------
        BadAnswer
        """
        self._check_names(tensor.name for tensor in tensors)
        for name, dtype, shape in ((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors):
            expected, sample = self.tensors[name]
            rows = shape[:1] if name in self.flat else (count + (name in self.offsets),)
            if (dtype, shape) != (expected, rows + sample):
                raise BadAnswer(
                    f"received {name!r} as {dtype.name} of shape {list(shape)} for {count} rows of {expected.name} and "
                    f"shape {list(sample)}"
                )

    def check(self, stacked: Arrays) -> None:
        """Compare with the tensors of a run of bodies, which have an additional first axis.

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
            if name == ROWS + OFFSETS:
                # Of a packed batch: there are as many as packed rows.
                continue
            if array.shape[1] != rows and name not in self.flat:
                if name in self.offsets and array.shape[1] == rows + 1:
                    continue
                raise BadAnswer(f"{name!r} has {array.shape[1]} rows, but there are {rows} row ids")
        for name, offsets in self.flat.items():
            check_offsets(name, stacked[name], stacked[offsets])
        if self.packed:
            check_offsets(ROWS, stacked[ROWS], stacked[ROWS + OFFSETS])
        for name, columns in self.sparse.items():
            indices = stacked[name + INDICES]
            if indices.size and not (indices.min() >= 0 and indices.max() < columns):
                raise BadAnswer(f"received column indices of {name!r} that are not below its {columns} columns")
        # As unsigned integers, negative row ids are too large as well.
        if ids.size and int(ids.view(np.uint64).max()) >= self.rows:
            raise BadAnswer(f"received row ids out of range for the {self.rows:,} rows of the dataset")

    def _check_names(self, served: Iterable[str]) -> None:
        if set(served) != self.tensors.keys():
            names = ", ".join(sorted(map(repr, set(served) ^ self.tensors.keys()))[:8])
            raise BadAnswer(f"received other fields than requested: {names} are missing or unexpected")


def _parts_of(name: str) -> tuple[str, str, str]:
    """Names of the tensors of a field with sparse rows: values, column indices and offsets."""
    return name + DATA, name + INDICES, name + INDPTR


def check_offsets(name: str, flat: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
    """Check that offsets, (bodies, rows + 1), divide a flat tensor, (bodies, items).

    Raises
    ------
    BadAnswer
    """
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
        f"received {name!r} as {dtype.name} of shape {list(shape)}, expected rows of {expected.name} and shape "
        f"{list(sample)}"
    )
