"""A source of arrays that share their first axis: NumPy files, MNIST, other HDF5 files.

Arrays of one field for different splits (``x_train``, ``x_test``) are concatenated. One thread reads them in order,
in blocks; others convert and write.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, Unreadable

from ..catalog.split_names import SPLITS, without_split
from ..catalog.split_record import SplitRecord
from .options import BuildOptions
from .source import Block, Column, FieldSpec, Work, digest_of, label_column

_BLOCK_BYTES = 4 << 20
"""Bytes that are read at a time."""

_MAX_LABEL_BYTES = 1 << 10
"""Of a row: labels are held in memory."""

_LABEL = re.compile(r"(^|[_.\-/])(y|labels?|targets?|class(es)?|category|fine_labels)($|[_.\-])", re.I)
_ORDER = ("", *SPLITS)
_MOST_BYTES = {"f": 8, "c": 16}
"""Of the widest numbers that are served: what is wider differs from machine to machine."""


class Array(Protocol):
    """An array that is read sequentially.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    step : int
        Rows that are best read together, or a divisor of them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any]
    step: int

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows (n, *sample); `start` is never less than the previous `stop`."""

    def close(self) -> None: ...


class Opener(Protocol):
    """Opens arrays at their first row."""

    def open(self, name: str) -> Array: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class NamedArray:
    """An array, and what its name says."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    split: str
    path: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


def named_array(
    path: str, shape: tuple[int, ...], dtype: np.dtype[Any], attributes: Mapping[str, Any] | None = None
) -> NamedArray:
    """Split and field from a path such as ``train/images``, ``x_train`` or ``train_set_x``."""
    parts, split = [], ""
    for part in path.split("/"):
        rest, word = without_split(part)
        split = word or split
        if rest:
            parts.append(rest)
    return NamedArray("/".join(parts) or path, shape, dtype, split, path, attributes or {})


class ArraySource:
    """A source of arrays.

    Parameters
    ----------
    arrays : sequence of NamedArray
    stamp : str
        Changes with their content.
    classes : list of str, optional
        Names of the label's numbers.
    coded : bool
        Whether labels that are texts become numbers, with the names of the classes beside them.
    """

    images = False
    split_record: SplitRecord | None = None
    may_break = False

    def __init__(
        self,
        arrays: Sequence[NamedArray],
        opener: Opener,
        options: BuildOptions,
        stamp: str,
        *,
        classes: list[str] | None = None,
        coded: bool = False,
    ) -> None:
        self._opener, self._options, self._coded = opener, options, coded
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        fields: dict[str, dict[str, NamedArray]] = defaultdict(dict)
        for array in arrays:
            if array.split in fields[array.name]:
                raise BadParameter(
                    f"{array.path} and {fields[array.name][array.split].path} are arrays of the same field and split"
                )
            fields[array.name][array.split] = array
        self._lengths = self._agreed(fields)
        fields = {name: own for name, own in fields.items() if self._fits(own)}
        self.rows = sum(self._lengths.values())
        if not fields or not self.rows:
            raise Unreadable("it contains no arrays with rows")
        self._parts = [split for split in _ORDER if split in self._lengths]
        codes = [np.full(self._lengths[split], max(0, _ORDER.index(split) - 1), np.uint8) for split in self._parts]
        self.splits = None if self._parts == [""] else np.concatenate(codes)
        self.split_rows = {split: self._lengths[split] for split in self._parts if split}
        names = options.rename or {}
        unknown = next((name for name in names if name not in fields), None)
        if unknown is not None:
            raise BadParameter(f"rename: there is no field {unknown!r}: choose from {', '.join(fields)}")
        self.columns: dict[str, Column] = {}
        self.label: str | None = None
        for name in [name for name in fields if len(fields) > 1 and self._is_label(name, fields)]:
            own = fields.pop(name)
            self.columns[names.get(name, name)] = self._column(own)
            self.label = self.label or names.get(name, name)
        if classes is not None and self.label is not None:
            self._name_classes(classes)
        elif classes is not None:
            self.left_out["names of classes"] = f"there is no label for the classes {', '.join(classes[:5])}"
        if self.label is None and options.label_column is None and len(fields) > 1:
            self.notes.append(f"no field has the name of a label: choose one of {', '.join(fields)} with label_column")
        ordered = sorted(fields, key=lambda name: -self._row_bytes(fields[name]))
        self._sources = [fields[name] for name in ordered]
        self.fields: tuple[FieldSpec, ...] = tuple(
            self._spec(names.get(name, name), fields[name], main=number == 0) for number, name in enumerate(ordered)
        )
        self.digest = digest_of([stamp, *((a.path, a.shape, a.dtype.str) for a in arrays)])

    def name(self, row: int) -> str:
        return f"row {row}"

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        first = 0
        for split in self._parts:
            length = self._lengths[split]
            own = done[first : first + length]
            if not own.all():
                arrays = [self._opener.open(source[split].path) for source in self._sources]
                try:
                    yield from self._blocks(arrays, first, length, own)
                finally:
                    for array in arrays:
                        array.close()
            first += length

    def close(self) -> None:
        self._opener.close()

    def _blocks(self, arrays: Sequence[Array], first: int, length: int, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        step = max(1, _BLOCK_BYTES // max(1, sum(spec.row_bytes for spec in self.fields)))
        chunk = max(array.step for array in arrays)
        step = max(1, round(step / chunk)) * chunk
        for start in range(0, length, step):
            stop = min(length, start + step)
            missing = np.flatnonzero(~done[start:stop])
            if len(missing):
                # As much as is missing and no more, in one run.
                begin, end = start + int(missing[0]), start + int(missing[-1]) + 1
                read = [array.read(begin, end) for array in arrays]
                yield self._converting(first + begin, read, ~done[begin:end])

    def _converting(self, row: int, read: list[npt.NDArray[Any]], wanted: npt.NDArray[np.bool_]) -> Work:
        def work() -> Block:
            arrays = {}
            for spec, rows in zip(self.fields, read, strict=True):
                main = spec is self.fields[0]
                arrays[spec.name] = converted(rows, spec.dtype, self._options.rescale if main else 1.0, spec.name)
            block = Block.of(row, arrays, self.fields[0].name)
            if not wanted.all():
                block.rows, block.details = block.rows[wanted], block.details[wanted]
                block.arrays = {name: array[wanted] for name, array in arrays.items()}
            return block

        return work

    def _agreed(self, fields: Mapping[str, Mapping[str, NamedArray]]) -> dict[str, int]:
        """Rows of each split, as most of the bytes agree on."""
        weights: Counter[tuple[tuple[str, int], ...]] = Counter()
        for own in fields.values():
            lengths = tuple(sorted((split, array.shape[0]) for split, array in own.items() if array.shape))
            weights[lengths] += 1 + sum(math.prod(a.shape) * a.dtype.itemsize for a in own.values())
        best = max(weights, key=lambda lengths: (len(lengths), weights[lengths]), default=())
        return dict(best)

    def _fits(self, own: Mapping[str, NamedArray]) -> bool:
        lengths = {split: array.shape[0] for split, array in own.items() if array.shape}
        first = next(iter(own.values()))
        if not lengths:
            self.left_out[first.path] = "it is a single value, not rows"
        elif lengths != self._lengths:
            said = ", ".join(f"{count}{f' {split}' if split else ''}" for split, count in lengths.items())
            self.left_out[first.path] = f"its numbers of rows ({said or 'none'}) differ from those of the other arrays"
        elif any((a.shape[1:], a.dtype) != (first.shape[1:], first.dtype) for a in own.values()):
            self.left_out[first.path] = "its type or row shape differs between splits"
        elif first.dtype.kind not in "biufcSV" or first.dtype.hasobject:
            self.left_out[first.path] = f"it holds {first.dtype}, not numbers"
        elif first.dtype.kind in "fc" and first.dtype.itemsize > _MOST_BYTES[first.dtype.kind]:
            self.left_out[first.path] = f"it holds {first.dtype}, which is not served: save it as float64 or complex128"
        else:
            return True
        return False

    def _is_label(self, name: str, fields: Mapping[str, Mapping[str, NamedArray]]) -> bool:
        array = next(iter(fields[name].values()))
        wanted = self._options.label_column
        if wanted is not None and wanted not in fields:
            raise BadParameter(f"label_column={wanted!r} is not a field: choose from {', '.join(fields)}")
        if wanted is not None and wanted == name:
            return True
        small = self._row_bytes(fields[name]) <= _MAX_LABEL_BYTES and array.dtype.kind in "biufS"
        return wanted is None and small and len(array.shape) <= 2 and bool(_LABEL.search(name))

    def _column(self, own: Mapping[str, NamedArray]) -> Column:
        values = []
        for split in self._parts:
            array = self._opener.open(own[split].path)
            try:
                values.append(array.read(0, self._lengths[split]))
            finally:
                array.close()
        together = np.concatenate(values)
        if self._coded and together.dtype.kind == "S" and together.ndim == 1:
            return label_column([value.decode("utf-8", "replace") for value in together.tolist()])
        dtype = together.dtype.newbyteorder("<")
        return Column(together.astype(dtype), next(iter(own.values())).attributes)

    def _name_classes(self, classes: list[str]) -> None:
        assert self.label is not None
        column = self.columns[self.label]
        if "class_names" not in column.attributes:
            self.columns[self.label] = Column(column.values, {**column.attributes, "class_names": classes})

    def _row_bytes(self, own: Mapping[str, NamedArray]) -> int:
        array = next(iter(own.values()))
        return math.prod(array.shape[1:]) * array.dtype.itemsize

    def _spec(self, name: str, own: Mapping[str, NamedArray], *, main: bool) -> FieldSpec:
        array = next(iter(own.values()))
        dtype = array.dtype.newbyteorder("<") if array.dtype.kind != "V" else array.dtype
        if main and self._options.dtype is not None:
            dtype = np.dtype(self._options.dtype)
        return FieldSpec(name, array.shape[1:], dtype, array.attributes)


def converted(rows: npt.NDArray[Any], dtype: np.dtype[Any], rescale: float, name: str) -> npt.NDArray[Any]:
    """Rows converted to the requested dtype.

    Raises
    ------
    BadParameter
        They do not fit.
    """
    if dtype.kind in "iu" and rows.dtype.kind in "iuf" and rows.size and not np.can_cast(rows.dtype, dtype):
        limits = np.iinfo(dtype)
        low, high = rows.min(), rows.max()
        whole = rows.dtype.kind != "f" or bool((rows == np.rint(rows)).all())
        if not (whole and limits.min <= low and high <= limits.max):
            raise BadParameter(
                f"{name} holds values such as {high if whole else rows.flat[0]}, which do not fit {dtype}"
            )
    if rescale != 1.0:
        return (rows * rescale).astype(dtype)
    return rows.astype(dtype, copy=False)
