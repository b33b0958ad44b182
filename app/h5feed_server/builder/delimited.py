"""CSV and TSV files, gzipped or not: features, pixels, texts, or images stored beside the table.

The file is read once in full to determine the type of each column, and then again to convert numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from ..catalog.split_record import SplitRecord
from .array_source import converted
from .image_paths import ListedFiles
from .image_source import ImageSource
from .options import BuildOptions
from .source import Block, FieldSpec, Work, digest_of
from .table_columns import (
    Kind,
    Read,
    as_number,
    first_of,
    read_table,
)
from .table_file import Table
from .table_roles import PIXEL_NAMES, Roles

if TYPE_CHECKING:
    from .store_files import StoreFiles

_SEPARATORS = re.compile(r"[ ,;]+")
_BLOCK_VALUES = 1 << 18
_PROBED_ROWS = 200


def delimited(path: Path, options: BuildOptions, files: StoreFiles | None = None) -> ImageSource | DelimitedSource:
    """A source from a CSV or TSV file.

    Parameters
    ----------
    files : StoreFiles, optional
        What the files beside it stand for.

    Raises
    ------
    Unreadable, BadParameter
    """
    table = Table(path)
    sample = [values for _, values in islice(table.rows(), _PROBED_ROWS) if len(values) == len(table.columns)]
    if not sample:
        raise Unreadable(f"{path.name} has no row with {len(table.columns)} values, like its first line")
    said = Roles(table, sample, options)
    read = read_table(table, said.kept, said.problem)
    if not len(read.lines):
        raise Unreadable(f"{path.name} has no rows")
    said.settle(read)
    if said.image is not None:
        return _listed_images(table, said, read, options, files)
    return DelimitedSource(table, said, read, options)


class DelimitedSource:
    """Numbers of a table as `features`, as `images` if they are pixels of square images, or texts only."""

    images = False
    split_record: SplitRecord | None = None
    may_break = True

    def __init__(self, table: Table, said: Roles, read: Read, options: BuildOptions) -> None:
        self._table, self._options = table, options
        self._lines, self.rows = read.lines, len(read.lines)
        self._comma = table.delimiter != ","
        self.splits = said.splits(read)
        self.columns, self.label = said.columns(read)
        self.left_out, self.notes = read.left_out, said.notes
        self._values, self._pixels = said.features, said.pixels
        self._texts: npt.NDArray[Any] | None = None
        rename = options.rename or {}
        names = [table.columns[number] for number in self._values]
        if self._pixels is not None:
            shape, attributes = self._pixel_shape()
            name = "images" if attributes else "features"
            dtype = np.dtype(options.dtype or "uint8")
        elif names:
            side = math.isqrt(len(names))
            pixels = side * side == len(names) > 1 and all(PIXEL_NAMES.match(name) for name in names)
            pixels = pixels or (not table.has_header and side * side == len(names) >= 64)
            shape = (side, side) if pixels else (len(names),)
            name = "images" if pixels else "features"
            attributes = {"channels": "grey"} if pixels else {"columns": names}
            dtype = self._dtype(pixels, names, [read.kinds[number] for number in self._values])
        else:
            texts = [
                own for own, column in self.columns.items() if column.values.dtype.kind == "S" and own != self.label
            ]
            texts = texts or [own for own in self.columns if own != self.label]
            if not texts:
                raise Unreadable(f"{table.path.name} has no column besides the label")
            name = max(texts, key=lambda own: self.columns[own].values.dtype.itemsize)
            self._texts = self.columns.pop(name).values
            shape, attributes, dtype = (), {}, self._texts.dtype
        self.columns = {rename.get(own, own): column for own, column in self.columns.items()}
        self.label = rename.get(self.label, self.label) if self.label else None
        self.fields: tuple[FieldSpec, ...] = (FieldSpec(rename.get(name, name), shape, dtype, attributes),)
        status = table.path.stat()
        self.digest = digest_of([status.st_size, status.st_mtime_ns, self.rows, *names, *self.columns])

    def name(self, row: int) -> str:
        return f"line {self._lines[row]}"

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        step = max(1, _BLOCK_VALUES // max(1, self.fields[0].values))
        rows: list[int] = []
        texts: list[list[str]] = []
        row, last = -1, int(np.flatnonzero(~done)[-1]) if not done.all() else -1
        lines = iter(self._lines.tolist())
        wanted = next(lines, None)
        for line, values in self._table.rows():
            if line != wanted:
                continue
            row, wanted = row + 1, next(lines, None)
            if not done[row]:
                rows.append(row)
                texts.append(values)
            if len(rows) == step or (row == last and rows):
                yield self._converting(np.array(rows), texts)
                rows, texts = [], []
            if row >= last:
                return

    def close(self) -> None:
        """Nothing to close."""

    def _converting(self, rows: npt.NDArray[np.int64], texts: list[list[str]]) -> Work:
        return lambda: self._convert(rows, texts)

    def _convert(self, rows: npt.NDArray[np.int64], texts: list[list[str]]) -> Block:
        spec = self.fields[0]
        broken: dict[int, str] = {}
        if self._texts is not None:
            block = Block.of(0, {spec.name: self._texts[rows]}, spec.name)
            block.rows = rows
            return block
        chosen = [self._chosen(values) for values in texts]
        try:
            if any(len(values) != spec.values for values in chosen):
                raise ValueError
            numbers = np.array(chosen, np.float64)
        except ValueError:
            numbers = np.zeros((len(chosen), spec.values))
            for index, values in enumerate(chosen):
                if len(values) != spec.values:
                    broken[int(rows[index])] = f"it has {len(values)} pixels, but the first image has {spec.values}"
                    continue
                own = [as_number(value, self._comma) for value in values]
                if None in own:
                    broken[int(rows[index])] = f"{values[own.index(None)][:40]!r} is not a number"
                else:
                    numbers[index] = own
        if spec.dtype.kind in "iu":
            missing = np.isnan(numbers).any(axis=1)
            for index in np.flatnonzero(missing).tolist():
                broken.setdefault(int(rows[index]), f"a value is missing, which {spec.dtype} cannot represent")
            numbers[missing] = 0
        shaped = converted(numbers, spec.dtype, self._options.rescale, spec.name).reshape(-1, *spec.shape)
        block = Block.of(0, {spec.name: shaped}, spec.name)
        block.rows, block.broken = rows, broken
        block.details["broken"] = np.isin(rows, list(broken))
        return block

    def _chosen(self, values: list[str]) -> list[str]:
        if self._pixels is not None:
            return _SEPARATORS.split(values[self._pixels].strip())
        return [values[number] for number in self._values]

    def _pixel_shape(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Shape of images stored in one column: square and grey, else a vector."""
        first = next(values for line, values in self._table.rows() if line == self._lines[0])
        count = len(self._chosen(first))
        side = math.isqrt(count)
        if side * side == count:
            return (side, side), {"channels": "grey"}
        self.notes.append(f"{count} pixels do not form a square: they are written as features")
        return (count,), {}

    def _dtype(self, pixels: bool, names: Sequence[str], kinds: Sequence[Kind]) -> np.dtype[Any]:
        if self._options.dtype is not None:
            return np.dtype(self._options.dtype)
        if pixels:
            return np.dtype("uint8")
        wide = [name for name, kind in zip(names, kinds, strict=True) if kind.needs_float64]
        if wide:
            named = first_of([repr(name) for name in wide])
            self.notes.append(f"features are float64, because float32 would make different values of {named} equal")
        missing = sum(kind.missing for kind in kinds)
        if missing:
            self.notes.append(f"{missing:,} values are missing: they are written as NaN, which mean and std ignore")
        return np.dtype("float64" if wide else "float32")


def _listed_images(
    table: Table, said: Roles, read: Read, options: BuildOptions, files: StoreFiles | None
) -> ImageSource:
    assert said.image is not None
    values = read.texts[said.image]
    place = said.place(values)
    existing = sum(path is not None for path in place.paths)
    name = table.columns[said.image]
    if not existing:
        raise Unreadable(
            f"none of the {len(values):,} images that column {name!r} of {table.path.name} names, such as "
            f"{values[0]!r}, is below {place.root}: pass their folder as image_dir"
        )
    names = [path if path is not None else value for path, value in zip(place.paths, values, strict=True)]
    splits = said.splits(read)
    columns, label = said.columns(read)
    members = ListedFiles(place, names, files)
    members.listing.left_out = read.left_out
    notes = [*([place.said] if place.said else []), *said.notes]
    return ImageSource(members, range(len(values)), names, columns, label, splits, options, notes)
