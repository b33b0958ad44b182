"""CSV and TSV, gzipped or not: a label column, and pixels, features or the paths of images.

The file is read twice: once to count its rows and to learn their labels, once to convert the values.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, Unreadable

from ..split_names import SPLIT_WORDS
from ..split_record import SplitRecord
from .array_source import converted
from .image_source import ImageSource, split_codes
from .images import SUFFIXES
from .members import MAX_MEMBER_BYTES, BrokenMember, Everywhere, Listing, Member
from .options import BuildOptions
from .source import Block, Column, FieldSpec, Work, digest_of, label_column

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

_LABEL_NAMES = re.compile(r"^(labels?|class(es|_id|_?name)?|targets?|y|category|species|breed)$", re.I)
_IMAGE_NAMES = re.compile(r"^(images?|image_?path|paths?|files?|file_?names?|img)$", re.I)
_SPLIT_NAMES = re.compile(r"^(split|set|subset|partition|fold)$", re.I)
_PIXEL_NAMES = re.compile(r"^(pixel[_ ]?\d+|\d+x\d+|p\d+)$", re.I)
_BLOCK_VALUES = 1 << 18
_DAMAGE = (csv.Error, UnicodeDecodeError, EOFError, OSError, zlib.error)
_PROBED_ROWS = 200
_MAX_HEAD = 1 << 20
"""Characters of the first line."""


class _Table:
    """A delimited file: its header, and its rows as texts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._open() as stream:
                head = stream.readline(_MAX_HEAD)
        except _DAMAGE as error:
            raise Unreadable(f"{path.name} cannot be read: {error}") from None
        if not head.strip():
            raise Unreadable(f"{path.name} is empty")
        tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
        self.delimiter = "\t" if tabs else max(",;\t|", key=head.count)
        first = next(csv.reader([head], delimiter=self.delimiter))
        self.has_header = not all(_is_number(value) for value in first[1:-1] or first) or not any(
            _is_number(value) for value in first
        )
        self.columns = [name.strip() for name in first] if self.has_header else [str(n) for n in range(len(first))]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the line, from 1, and its values, whatever their number."""
        with self._open() as stream:
            reader = csv.reader(stream, delimiter=self.delimiter)
            try:
                for values in reader:
                    if values and not (self.has_header and reader.line_num == 1):
                        yield reader.line_num, values
            except _DAMAGE as error:
                raise Unreadable(f"{self.path.name}, after line {reader.line_num}: {error}") from None

    def column(self, name: str | None, pattern: re.Pattern[str], option: str) -> int | None:
        """Where a column is, by its name, or by names that it often has."""
        if name is not None:
            if name not in self.columns:
                raise BadParameter(f"{option}={name!r}: {self.path.name} has {', '.join(self.columns[:20])}")
            return self.columns.index(name)
        return next((number for number, own in enumerate(self.columns) if pattern.match(own)), None)

    def _open(self) -> TextIO:
        try:
            if self.path.name.lower().endswith(".gz"):
                return io.TextIOWrapper(gzip.open(self.path), "utf-8-sig", newline="")
            return open(self.path, encoding="utf-8-sig", newline="")
        except OSError as error:
            raise Unreadable(f"{self.path} cannot be read: {error.strerror}") from None


def delimited(path: Path, options: BuildOptions) -> ImageSource | DelimitedSource:
    """Rows of a CSV or TSV file.

    Raises
    ------
    Unreadable, BadParameter
    """
    table = _Table(path)
    sample = [values for _, (_, values) in zip(range(_PROBED_ROWS), table.rows(), strict=False)]
    sample = [values for values in sample if len(values) == len(table.columns)]
    if not sample:
        raise Unreadable(f"{path.name} has no row of as many values as its first line, {len(table.columns)}")
    image = table.column(options.image_column, _IMAGE_NAMES, "image_column")
    if image is not None and options.image_column is None and not _is_path(sample[0][image]):
        image = None
    if image is None and options.image_column is None:
        image = next((number for number, value in enumerate(sample[0]) if _is_path(value)), None)
    label = table.column(options.label_column, _LABEL_NAMES, "label_column")
    if label is None and not table.has_header and len(table.columns) > 1:
        # As MNIST is often passed on; or a word at the end, as the UCI's tables have it.
        label = len(table.columns) - 1 if not _is_number(sample[0][-1]) else 0
    split = table.column(None, _SPLIT_NAMES, "split")
    if split is not None and sample[0][split].strip().lower() not in SPLIT_WORDS:
        split = None
    if image is not None:
        return _listed_images(table, image, label if label != image else None, split, options)
    return DelimitedSource(table, label, split, options)


class DelimitedSource:
    """Numbers of a table: `features`, or `images` where the columns are the pixels of squares."""

    images = False
    split_record: SplitRecord | None = None

    def __init__(self, table: _Table, label: int | None, split: int | None, options: BuildOptions) -> None:
        self._table, self._options = table, options
        said = _Said(table, label, split)
        self.left_out, self.columns = said.left_out, said.columns
        self.splits, self.label = said.splits, "labels" if "labels" in said.columns else None
        self._lines, self.rows = said.lines, len(said.lines)
        skipped = {number for number in (label, split) if number is not None}
        self._values = [number for number in range(len(table.columns)) if number not in skipped]
        self.notes: list[str] = []
        self._leave_out_texts()
        names = [table.columns[number] for number in self._values]
        side = math.isqrt(len(names))
        pixels = side * side == len(names) > 1 and all(_PIXEL_NAMES.match(name) for name in names)
        pixels = pixels or (not table.has_header and side * side == len(names) >= 64)
        shape = (side, side) if pixels else (len(names),)
        name = "images" if pixels else "features"
        attributes: dict[str, Any] = {"channels": "grey"} if pixels else {"columns": names}
        self.fields: tuple[FieldSpec, ...] = (
            FieldSpec((options.rename or {}).get(name, name), shape, self._dtype(pixels), attributes),
        )
        status = table.path.stat()
        self.digest = digest_of([status.st_size, status.st_mtime_ns, self.rows, *names])

    def name(self, row: int) -> str:
        return f"line {self._lines[row]}"

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        step = max(1, _BLOCK_VALUES // len(self._values))
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
        """Nothing is held open."""

    def _converting(self, rows: npt.NDArray[np.int64], texts: list[list[str]]) -> Work:
        return lambda: self._convert(rows, texts)

    def _convert(self, rows: npt.NDArray[np.int64], texts: list[list[str]]) -> Block:
        spec = self.fields[0]
        broken: dict[int, str] = {}
        chosen = [[values[number] for number in self._values] for values in texts]
        try:
            numbers = np.array(chosen, np.float64)
        except ValueError:
            numbers = np.zeros((len(chosen), len(self._values)))
            for index, values in enumerate(chosen):
                try:
                    numbers[index] = np.array([value or "nan" for value in values], np.float64)
                except ValueError:
                    bad = next(value for value in values if value and not _is_number(value))
                    broken[int(rows[index])] = f"{bad[:40]!r} is no number"
        if spec.dtype.kind in "iu":
            missing = np.isnan(numbers).any(axis=1)
            for index in np.flatnonzero(missing).tolist():
                broken.setdefault(int(rows[index]), f"a value is missing, and {spec.dtype} has none for that")
            numbers[missing] = 0
        shaped = converted(numbers, spec.dtype, self._options.rescale, spec.name).reshape(-1, *spec.shape)
        block = Block.of(0, {spec.name: shaped}, spec.name)
        block.rows, block.broken = rows, broken
        block.details["broken"] = np.isin(rows, list(broken))
        return block

    def _leave_out_texts(self) -> None:
        """Columns whose first values are no numbers."""
        first = next(iter(values for line, values in self._table.rows() if line == self._lines[0]))
        texts = [number for number in self._values if first[number] and not _is_number(first[number])]
        for number in texts:
            self.left_out[f"column {self._table.columns[number]}"] = "it holds texts, and is not the label"
        self._values = [number for number in self._values if number not in texts]
        if not self._values:
            raise Unreadable(f"{self._table.path.name} has no column of numbers")

    def _dtype(self, pixels: bool) -> np.dtype[Any]:
        if self._options.dtype is not None:
            return np.dtype(self._options.dtype)
        return np.dtype("uint8" if pixels else "float32")


class _Said:
    """What a first pass over a table learns: lines that are rows, labels, splits, and what is left out."""

    def __init__(self, table: _Table, label: int | None, split: int | None, path: int | None = None) -> None:
        self.left_out: dict[str, str] = {}
        self.paths: list[str] = []
        labels: list[str] = []
        splits: list[str] = []
        lines: list[int] = []
        width = len(table.columns)
        for line, values in table.rows():
            if len(values) != width:
                self.left_out[f"line {line}"] = f"it has {len(values)} values, where the first line has {width}"
                continue
            word = values[split].strip().lower() if split is not None else ""
            if split is not None and word not in SPLIT_WORDS:
                self.left_out[f"line {line}"] = f"{word!r} is no split: train, val and test are"
                continue
            if label is not None and not values[label].strip():
                self.left_out[f"line {line}"] = "it has no label"
                continue
            lines.append(line)
            if label is not None:
                labels.append(values[label].strip())
            if split is not None:
                splits.append(SPLIT_WORDS[word])
            if path is not None:
                self.paths.append(values[path].strip())
        if not lines:
            raise Unreadable(f"{table.path.name} has no rows")
        self.lines = np.array(lines, np.int64)
        self.splits = split_codes(splits) if split is not None else None
        self.columns = {} if label is None else {"labels": _labels(labels)}


def _labels(texts: Sequence[str]) -> Column:
    """Whole numbers, numbers on a scale, or names of classes."""
    try:
        return Column(np.array([int(text) for text in texts], np.int64))
    except ValueError:
        pass
    try:
        return Column(np.array([float(text) for text in texts], np.float64))
    except ValueError:
        return label_column(list(texts))


class _Paths(Everywhere):
    """Images by their paths, relative to the table."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self.listing = Listing()
        for name in names:
            try:
                status = os.stat(folder / name)
                regular = stat.S_ISREG(status.st_mode)
            except (OSError, ValueError):
                regular = False
            size, stamp = (status.st_size, f"{status.st_size} {status.st_mtime_ns}") if regular else (0, "missing")
            self.listing.members.append(Member(name, size, stamp))

    def read(self, index: int) -> bytes:
        member = self.listing.members[index]
        if member.stamp == "missing":
            raise BrokenMember("there is no such file")
        if member.size > MAX_MEMBER_BYTES:
            raise BrokenMember(f"it has {member.size} bytes, more than the {MAX_MEMBER_BYTES} that are read")
        try:
            return (self._folder / member.name).read_bytes()
        except OSError as error:
            raise BrokenMember(f"it cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""


def _listed_images(
    table: _Table, image: int, label: int | None, split: int | None, options: BuildOptions
) -> ImageSource:
    said = _Said(table, label, split, image)
    members = _Paths(table.path.parent, said.paths)
    members.listing.left_out = said.left_out
    used = {number for number in (image, label, split) if number is not None}
    other = [name for number, name in enumerate(table.columns) if number not in used]
    notes = [f"columns that are neither image nor label are left out: {', '.join(other[:10])}"] if other else []
    chosen = range(len(said.paths))
    name = "labels" if label is not None else None
    return ImageSource(members, chosen, said.paths, said.columns, name, said.splits, options, notes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_path(text: str) -> bool:
    return text.strip().lower().endswith(SUFFIXES)
