"""A delimited text file: encoding, delimiter, header and rows."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TextIO, cast

from h5feed.errors import BadParameter, Unreadable

from .image_spec import SUFFIXES

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

DAMAGE = (csv.Error, UnicodeDecodeError, EOFError, OSError, zlib.error)

_NO_VALUE = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
MISSING = frozenset(["", *_NO_VALUE.split("|")])
"""What stands for no value, as in pandas: see the parameter ``na_values`` of ``pandas.read_csv``."""

_BLOCK = 1 << 20
_PROBED = 20
_MAX_VALUE = 1 << 26
"""Characters of one value: the pixels of an image may be one."""

_QUOTED = re.compile(r'"[^"]*"')


class Table:
    """Rows of a CSV or TSV file.

    Attributes
    ----------
    columns : list of str
        Their names, no two alike; numbers where there is no header.
    notes : list of str
        What one might not expect of how it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        csv.field_size_limit(_MAX_VALUE)
        try:
            self._encoding = self._find_encoding()
            with self._open() as stream:
                head = stream.read(_BLOCK)
        except DAMAGE as error:
            raise Unreadable(f"{path.name} cannot be read: {error}") from None
        if not head.strip():
            raise Unreadable(f"{path.name} is empty")
        self.delimiter = self._find_delimiter(head)
        first, second = ([*islice(csv.reader(io.StringIO(head, newline=""), delimiter=self.delimiter), 2), []])[:2]
        self.has_header = _is_header(first, second)
        names = [name.strip() for name in first] if self.has_header else [str(n) for n in range(len(first))]
        self.columns = self._named(names)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """For each row, the line number (from 1) where it ends, and its values."""
        with self._open() as stream:
            reader = csv.reader(stream, delimiter=self.delimiter)
            try:
                if self.has_header:
                    next(reader, None)
                for values in reader:
                    if values:
                        yield reader.line_num, values
            except DAMAGE as error:
                raise Unreadable(f"{self.path.name}, after line {reader.line_num}: {error}") from None

    def number(self, name: str, option: str) -> int:
        """Index of the column with this name.

        Raises
        ------
        BadParameter
        """
        if name not in self.columns:
            known = ", ".join(self.columns[:20])
            raise BadParameter(f"{option}={name!r} is not a column of {self.path.name}: choose from {known}")
        return self.columns.index(name)

    def named(self, pattern: re.Pattern[str]) -> list[int]:
        """Columns whose names match, if there is a header."""
        return [number for number, own in enumerate(self.columns) if self.has_header and pattern.search(own)]

    def _bytes(self) -> IO[bytes]:
        if self.path.name.lower().endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path))
        return self.path.open("rb")

    def _open(self) -> TextIO:
        try:
            return io.TextIOWrapper(self._bytes(), self._encoding, newline="")
        except OSError as error:
            raise Unreadable(f"{self.path} cannot be read: {error.strerror}") from None

    def _find_encoding(self) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self._bytes() as stream:
            begin = stream.read(_BLOCK)
            if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "utf-16"
            try:
                while begin:
                    decoder.decode(begin)
                    begin = stream.read(_BLOCK)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                self.notes.append(f"{self.path.name} is not UTF-8, so it is read as latin-1")
                return "latin-1"
        return "utf-8-sig"

    def _find_delimiter(self, head: str) -> str:
        if self.path.name.lower().removesuffix(".gz").endswith(".tsv"):
            return "\t"
        first = _QUOTED.sub("", head).partition("\n")[0]
        likely = sorted((mark for mark in ",;\t|" if mark in first), key=first.count, reverse=True)
        for mark in likely:
            lines = [*islice(csv.reader(io.StringIO(head, newline=""), delimiter=mark), _PROBED)][:-1]
            widths = Counter(len(line) for line in lines if line)
            # Such as in every line, or nearly.
            if len(widths) <= 1 or widths.most_common(1)[0][1] > len(lines) // 2:
                return mark
        return likely[0] if likely else ","

    def _named(self, names: list[str]) -> list[str]:
        """Column names made unique as pandas does: ``a``, ``a.1``."""
        taken: set[str] = set()
        unique_names = []
        for name in names:
            own, number = name, 0
            while own in taken:
                number += 1
                own = f"{name}.{number}"
            if number:
                self.notes.append(f"several columns are called {name!r}: one of them is renamed to {own!r}")
            taken.add(own)
            unique_names.append(own)
        return unique_names


def _is_header(first: list[str], second: list[str]) -> bool:
    """Whether the first line is a header."""
    if any(is_path(value) for value in first):
        return False
    if any(
        value.strip() and not is_number(value) and is_number(below) for value, below in zip(first, second, strict=False)
    ):
        return True
    return not all(is_number(value) for value in first[1:-1] or first) or not any(is_number(value) for value in first)


def is_number(text: str) -> bool:
    """Whether a value is a number; unlike in Python, ``_`` is not allowed."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def is_missing(text: str) -> bool:
    return text.strip() in MISSING


def is_path(text: str) -> bool:
    """Whether a value is the path of an image."""
    return text.strip().lower().endswith(SUFFIXES)
