"""Determines what the columns of a table hold, from all their values: numbers, texts, labels or running numbers."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .source import Column, label_column, text_column
from .table_file import Table, is_missing, is_number

_BLOCK_VALUES = 1 << 18
_SHOWN = 10
_COMMA = re.compile(r"^\s*[+-]?\d+,\d+(e[+-]?\d+)?\s*$", re.I)
_EXPONENT = re.compile(r"[.,eE]")
_TRUTH = {"true": 1.0, "false": 0.0}
_FEW = 100
"""One in so many values that are none of a column's numbers is a slip; more make it a column of texts."""

EXACT_FLOAT32, EXACT_FLOAT64 = 1 << 24, 1 << 53
"""Whole numbers up to these are exact."""

_LEAST_STEPS = 1 << 12
"""Numbers that float32 is to tell apart between the smallest and the largest of a column."""

ID_NAMES = re.compile(
    r"^(unnamed: \d+|index|idx|row|row_?(number|num)|uuid|guid)?$|(^|[_\-. ])(id|ids|uuid)$|[a-z0-9]I[dD]$|^(id|ID|Id)$"
)
"""Columns that number the rows; pandas writes an index without a name."""


@dataclass
class Kind:
    """What one column holds.

    Attributes
    ----------
    numbers, truths, missing : int
        How many values are numbers (with truths, which are ``True`` and ``False``), and how many are none at all.
    texts : int
        How many are something else.
    text, line : str, int
        The first of those, and where it is.
    whole : bool
        Whether all numbers are whole.
    low, high : float
        The smallest and the largest.
    is_float32 : bool
        Whether float32 has all of the numbers exactly.
    has_exponents : bool
        Whether a whole number beyond 2⁵³ is written as floats are: ``1.5e20``.
    commas : int
        How many numbers have a decimal comma.
    ones : bool
        Whether all numbers are 0 or 1.
    """

    numbers: int = 0
    truths: int = 0
    missing: int = 0
    texts: int = 0
    text: str = ""
    line: int = 0
    whole: bool = True
    low: float = math.inf
    high: float = -math.inf
    is_float32: bool = True
    has_exponents: bool = False
    commas: int = 0
    ones: bool = True

    @property
    def is_number(self) -> bool:
        """Whether it is a column of numbers, apart from a few other values."""
        if self.truths and self.truths != self.numbers:
            return False
        few = max(1, (self.numbers + self.texts) // _FEW)
        return not self.texts or (self.texts <= few and self.texts < self.numbers)

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(-self.low, self.high, 0.0)

    @property
    def is_long(self) -> bool:
        """Whether integers are written with more digits than float64 has."""
        return self.whole and not self.has_exponents and self.largest > EXACT_FLOAT64

    @property
    def needs_float64(self) -> bool:
        """Whether float32 would lose integers or merge nearby values, such as timestamps."""
        narrow = self.largest / EXACT_FLOAT32 > (self.high - self.low) / _LEAST_STEPS
        return not self.is_float32 and (self.largest > EXACT_FLOAT32 or (narrow and self.high > self.low))

    def look(self, values: Sequence[str], lines: Sequence[int], comma: bool) -> None:
        """Take more values into account."""
        try:
            numbers = np.array(values, np.float64)
            if "_" in "".join(values):
                raise ValueError
        except ValueError:
            numbers = np.array([self._one(value, line, comma) for value, line in zip(values, lines, strict=True)])
            self._measure(numbers, values)
        else:
            self.look_at_numbers(numbers, values)

    def look_at_numbers(self, numbers: npt.NDArray[np.float64], values: Sequence[str]) -> None:
        """Same, for values known to be numbers."""
        missing = int(np.isnan(numbers).sum())
        self.missing += missing
        self.numbers += len(numbers) - missing
        self._measure(numbers, values)

    def _measure(self, numbers: npt.NDArray[np.float64], values: Sequence[str]) -> None:
        there = np.isfinite(numbers)
        if not there.all():
            self.has_exponents = self.has_exponents or bool(np.isinf(numbers).any())
            values = [values[place] for place in np.flatnonzero(there).tolist()] if self.whole else ()
            numbers = numbers[there]
        if not len(numbers):
            return
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
        self.whole = self.whole and bool((numbers == np.rint(numbers)).all())
        self.ones = self.ones and bool(((numbers == 0) | (numbers == 1)).all())
        with np.errstate(over="ignore"):
            self.is_float32 = self.is_float32 and bool((numbers.astype(np.float32) == numbers).all())
        if self.whole and self.largest > EXACT_FLOAT64:
            large = np.flatnonzero(np.abs(numbers) > EXACT_FLOAT64).tolist()
            self.has_exponents = self.has_exponents or any(_EXPONENT.search(values[place]) for place in large)

    def _one(self, value: str, line: int, comma: bool) -> float:
        number = as_number(value, comma)
        if number is None:
            self.texts += 1
            if self.texts == 1:
                self.text, self.line = value, line
            return math.nan
        if math.isnan(number):
            self.missing += 1
            return number
        self.numbers += 1
        self.truths += value.strip().lower() in _TRUTH
        self.commas += "," in value
        return number


def are_numbers(values: Sequence[str]) -> bool:
    """Whether all values are numbers or missing."""
    try:
        np.array(values, np.float64)
    except ValueError:
        return all(as_number(value, True) is not None for value in values)
    return "_" not in "".join(values)


def as_number(value: str, comma: bool) -> float | None:
    """The number a value stands for; NaN if missing, None if it is not a number."""
    if is_missing(value):
        return math.nan
    if is_number(value):
        return float(value)
    if comma and _COMMA.match(value):
        return float(value.replace(",", "."))
    return _TRUTH.get(value.strip().lower())


def first_of(items: Sequence[str]) -> str:
    """The first few items for a note, and how many more there are."""
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


@dataclass
class Read:
    """A table that was read once.

    Attributes
    ----------
    lines : (rows,) int64
        Where each row ends.
    kinds : list of Kind
        Of each column.
    texts : dict of int to list of str
        All values of the columns that were to be kept.
    left_out : dict of str to str
    """

    lines: npt.NDArray[np.int64]
    kinds: list[Kind]
    texts: dict[int, list[str]]
    left_out: dict[str, str]


def read_table(table: Table, kept: set[int], problem: Callable[[Sequence[str]], str | None]) -> Read:
    """Determine what the columns hold, and keep the texts of some.

    Parameters
    ----------
    problem : callable
        Why values are no row; None where they are one.
    """
    width = len(table.columns)
    kinds = [Kind() for _ in range(width)]
    texts: dict[int, list[str]] = {number: [] for number in kept}
    left_out: dict[str, str] = {}
    lines: list[int] = []
    block: list[list[str]] = []
    comma = table.delimiter != ","

    def look() -> None:
        for number in kept:
            texts[number] += [values[number].strip() for values in block]
        numbers = None
        if not any(kind.texts for kind in kinds):
            with contextlib.suppress(ValueError):
                # All at once is twice as fast as column by column.
                numbers = np.array(block, np.float64)
        if numbers is not None and not any("_" in "".join(values) for values in block):
            for kind, own, column in zip(kinds, numbers.T.copy(), zip(*block, strict=True), strict=True):
                kind.look_at_numbers(own, column)
        else:
            for kind, column in zip(kinds, zip(*block, strict=True), strict=True):
                kind.look(column, lines[-len(block) :], comma)
        block.clear()

    for line, values in table.rows():
        if len(values) != width:
            left_out[f"line {line}"] = f"it has {len(values)} values, but the first line has {width}"
        elif (reason := problem(values)) is not None:
            left_out[f"line {line}"] = reason
        else:
            lines.append(line)
            block.append(values)
            if len(block) * width >= _BLOCK_VALUES:
                look()
    if block:
        look()
    return Read(np.array(lines, np.int64), kinds, texts, left_out)


def gather(table: Table, lines: npt.NDArray[np.int64], columns: Sequence[int]) -> dict[int, list[str]]:
    """All values of some columns."""
    cells: dict[int, list[str]] = {number: [] for number in columns}
    wanted = set(lines.tolist())
    for line, values in table.rows() if columns else ():
        if line in wanted:
            for number in columns:
                cells[number].append(values[number].strip())
    return cells


def labels_of(texts: Sequence[str]) -> Column:
    """Integers, numbers on a scale, or class names."""
    whole = whole_numbers(texts, zeros=True)
    if whole is not None:
        return Column(whole)
    if all(map(is_number, texts)):
        return Column(np.array([float(text) for text in texts], np.float64))
    return label_column(list(texts))


def values_of(texts: Sequence[str], kind: Kind, comma: bool) -> Column:
    """A column on its own: integers if all values are, numbers if some are missing, else texts."""
    whole = whole_numbers(texts)
    if whole is not None:
        return Column(whole)
    if kind.is_number and not kind.texts and kind.numbers and not kind.is_long:
        if kind.truths and not kind.missing:
            return Column(np.array([_TRUTH[text.lower()] for text in texts], np.bool_))
        written = [text for text in texts if not is_missing(text)]
        if not any(text.lstrip("+-")[:1] == "0" and text[1:2].isdigit() for text in written):
            return Column(np.array([as_number(text, comma) for text in texts], np.float64))
    return text_column(["" if is_missing(text) else text for text in texts])


def whole_numbers(texts: Sequence[str], *, zeros: bool = False) -> npt.NDArray[Any] | None:
    """Whole numbers of 64 bits; None where some are not, or (unless `zeros`) begin with zeros that would be lost."""
    try:
        values = [int(text) for text in texts]
    except ValueError:
        return None
    if "_" in "".join(texts):
        return None
    if not zeros and any(len(text) > 1 and text[0] == "0" for text in texts):
        return None
    low, high = min(values, default=0), max(values, default=0)
    for dtype in (np.int64, np.uint64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.array(values, dtype)
    return None
