"""Rows in the contiguous fields of unfinished files: written and read past HDF5, by any thread, in any order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError

from .hdf5_writer import create_file
from .plan import Part, Plan
from .source import Block, FieldSpec, Source

_COPY_BYTES = 8 << 20
"""Bytes that are copied at a time."""


class PlacedRows:
    """The rows of a plan in contiguous fields: where each lies, to write and to read them.

    It can be pickled, for a machine that sees the files at the same paths; see `open_for`.
    """

    def __init__(self, plan: Plan, parts: dict[Path, Path], source: Source, *, fresh: bool) -> None:
        self.row_bytes = sum(spec.row_bytes for spec in source.fields)
        self._fields = {spec.name: spec for spec in source.fields}
        # Which file a row of the source is in, and where in it its part of each field begins.
        self._file = np.zeros(source.rows, np.int32)
        self._offset = {name: np.full(source.rows, -1, np.int64) for name in self._fields}
        self._paths = [parts[path] for path in plan.files]
        self._descriptors: dict[int, int] = {}
        try:
            for number, (path, own) in enumerate(plan.files.items()):
                offsets = _create(parts[path], own, source, fresh=fresh)
                self._open(number)
                for part in own:
                    self._file[part.rows] = number
                    for name, spec in self._fields.items():
                        self._offset[name][part.rows] = offsets[part.group, name] + spec.begins(part.rows)[:-1]
        except BaseException:
            self.close()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def open_for(self, rows: npt.NDArray[np.int64]) -> None:
        """In a copy that was unpickled: open the files in which these rows are."""
        for number in np.unique(self._file[rows]).tolist():
            if number not in self._descriptors:
                self._open(number)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def sync(self) -> None:
        """Have everything on disk."""
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor)

    def write(self, block: Block) -> None:
        """Write the rows that are not broken, from any thread."""
        whole = np.flatnonzero(block.details["broken"] == 0)
        for name, array in block.arrays.items():
            spec = self._fields[name]
            if isinstance(array, list):
                for index in whole.tolist():
                    row = int(block.rows[index])
                    data = np.frombuffer(array[index], np.uint8)
                    _write_all(self._descriptors[self._file[row]], data, int(self._offset[name][row]))
                continue
            if array.shape[1:] != spec.shape or array.dtype != spec.dtype:
                raise TypeError(f"{name}: {array.dtype}{array.shape[1:]} is not {spec.dtype}{spec.shape}")
            data = np.ascontiguousarray(array)
            for start, stop, descriptor, offset in self._runs(name, block.rows[whole]):
                _write_all(descriptor, data[whole[start] : whole[stop - 1] + 1], offset)

    def read(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows (n, *shape), from any thread."""
        spec = self._fields[name]
        values = np.empty((len(rows), *spec.shape), spec.dtype)
        flat = values.reshape(len(rows), -1).view(np.uint8) if spec.row_bytes else values
        for start, stop, descriptor, offset in self._runs(name, rows):
            view = memoryview(flat[start:stop]).cast("B")
            while len(view):
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise FeedError("the unfinished file has become shorter: delete it and start again")
                view, offset = view[count:], offset + count
        return values

    def read_bytes(self, name: str, row: int) -> npt.NDArray[np.uint8]:
        """One row of a field of bytes."""
        spec = self._fields[name]
        assert spec.lengths is not None
        nbytes = int(spec.lengths[row]) * spec.dtype.itemsize
        data = os.pread(self._descriptors[self._file[row]], nbytes, int(self._offset[name][row]))
        if len(data) != nbytes:
            raise FeedError("the unfinished file has become shorter: delete it and start again")
        return np.frombuffer(data, np.uint8)

    def _open(self, number: int) -> None:
        self._descriptors[number] = os.open(self._paths[number], os.O_RDWR | os.O_CLOEXEC)

    def _runs(self, name: str, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int, int]]:
        """Rows that follow each other in a file too: first, after the last, descriptor, offset."""
        nbytes = self._fields[name].row_bytes
        if not len(rows) or not nbytes:
            return
        offsets, files = self._offset[name][rows], self._file[rows]
        breaks = np.flatnonzero((np.diff(offsets) != nbytes) | (np.diff(files) != 0) | (np.diff(rows) != 1)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for start, stop in pairwise(edges):
            yield start, stop, self._descriptors[files[start]], int(offsets[start])


def _create(path: Path, parts: tuple[Part, ...], source: Source, *, fresh: bool) -> dict[tuple[str, str], int]:
    groups = {part.group: part.rows for part in parts}
    if fresh:
        path.unlink(missing_ok=True)
        return create_file(path, groups, source.fields)
    # The structure depends on nothing but the rows: where they lie in a file that is made again, they lie in this one.
    again = path.with_name(f"{path.name}.again")
    try:
        return create_file(again, groups, source.fields)
    finally:
        again.unlink(missing_ok=True)


def copy_rows(
    rows: PlacedRows, unfinished: Path, parts: tuple[Part, ...], source: Source, on_rows: Callable[[int], None]
) -> None:
    """Write a contiguous file of rows that lie in others."""
    offsets = create_file(unfinished, {part.group: part.rows for part in parts}, source.fields)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for part in parts:
            for number, spec in enumerate(source.fields):
                if spec.lengths is not None:
                    _copy_lists(rows, spec, part, descriptor, offsets[part.group, spec.name])
                    if number == 0:
                        on_rows(len(part.rows))
                    continue
                step = max(1, _COPY_BYTES // max(1, spec.row_bytes))
                for start in range(0, len(part.rows), step):
                    values = rows.read(spec.name, part.rows[start : start + step])
                    _write_all(descriptor, values, offsets[part.group, spec.name] + start * spec.row_bytes)
                    if number == 0:
                        on_rows(len(values))
    finally:
        os.close(descriptor)


def copy_lists(
    rows: PlacedRows, unfinished: Path, parts: tuple[Part, ...], source: Source, offsets: dict[tuple[str, str], int]
) -> None:
    """Write the fields of lists of a file whose other fields are written already."""
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for part in parts:
            for spec in source.fields:
                if spec.lengths is not None:
                    _copy_lists(rows, spec, part, descriptor, offsets[part.group, spec.name])
    finally:
        os.close(descriptor)


def _copy_lists(rows: PlacedRows, spec: FieldSpec, part: Part, descriptor: int, offset: int) -> None:
    begins = offset + spec.begins(part.rows)
    for row, begin in zip(part.rows.tolist(), begins.tolist(), strict=False):
        _write_all(descriptor, rows.read_bytes(spec.name, row), begin)


def _write_all(descriptor: int, array: npt.NDArray[Any], offset: int) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
