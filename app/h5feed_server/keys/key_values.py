"""The values of a field that rows are found by: integers or text, with their hashes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge, UnsupportedField
from h5feed.runs import consecutive

from ..catalog.dataset import Dataset, Field
from ..catalog.roles import class_names
from ..storage.reader import Reader

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

HASH_VERSION = 1
"""Part of the names of indexes; changes whenever a hash changes."""

_BLOCK = 1 << 18
"""Rows read at a time, fewer where they are long."""

_BLOCK_BYTES = 16 << 20

_HASHED_BYTES = 256
"""Of longer texts, only the first and the last half of so many bytes are hashed: keys are compared in full anyway."""

_LANE = 8
"""Bytes hashed at a time."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,30}", re.ASCII)

_SHOWN_CHARS = 100


class Values(ABC):
    """Values of rows, or keys to look for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def hashes(self) -> UInt64s:
        """(k,) uint64."""

    @abstractmethod
    def equal(self, places: Int64s, other: Values, other_places: Int64s) -> Bools:
        """Whether the values at `places` are those of `other` at `other_places`, (n,)."""

    @abstractmethod
    def text(self, place: int) -> str:
        """One value as text."""

    def shown(self, place: int) -> str:
        """One value for a message."""
        return self.text(place)[:_SHOWN_CHARS]


@dataclass(frozen=True)
class Integers(Values):
    """Integers of 64 bits, signed or not.

    Attributes
    ----------
    bits : (k,) uint64
        Modulo 2⁶⁴.
    negative : (k,) bool
    """

    bits: UInt64s
    negative: Bools

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Integers:
        if values.dtype.kind == "u":
            return cls(values.astype(np.uint64), np.zeros(len(values), np.bool_))
        return cls(values.astype(np.int64).view(np.uint64), values < 0)

    def __len__(self) -> int:
        return len(self.bits)

    def hashes(self) -> UInt64s:
        return _mix(self.bits + np.uint64(0x9E37_79B9_7F4A_7C15))

    def equal(self, places: Int64s, other: Values, other_places: Int64s) -> Bools:
        assert isinstance(other, Integers)
        same = self.bits[places] == other.bits[other_places]
        return np.asarray(same & (self.negative[places] == other.negative[other_places]), np.bool_)

    def text(self, place: int) -> str:
        return str(int(self.bits[place]) - (1 << 64) * int(self.negative[place]))


@dataclass(frozen=True)
class Texts(Values):
    """Texts in UTF-8.

    Attributes
    ----------
    items : (n,) uint8
    offsets : (k + 1,) int64
        Where each text begins.
    """

    items: npt.NDArray[np.uint8]
    offsets: Int64s

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
        return cls(np.frombuffer(b"".join(texts), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def hashes(self) -> UInt64s:
        lengths = np.diff(self.offsets)
        hashes = _mix(lengths.astype(np.uint64))
        half = _HASHED_BYTES // 2
        is_long = lengths > _HASHED_BYTES
        parts = [(self.offsets[:-1], np.where(is_long, half, lengths))]
        if is_long.any():
            parts.append((self.offsets[1:] - half, np.where(is_long, half, 0)))
        for begins, sizes in parts:
            active = np.arange(len(sizes))
            for first in range(0, _HASHED_BYTES, _LANE):
                active = active[sizes[active] > first]
                if not len(active):
                    break
                # lanes: (active, 8), the next bytes of each text that has some; 0 behind its end
                within = first + np.arange(_LANE)
                places = begins[active, None] + within
                lanes = self.items[np.minimum(places, len(self.items) - 1)]
                lanes[within >= sizes[active, None]] = 0
                hashes[active] = _mix(hashes[active] ^ lanes.view("<u8").reshape(-1))
        return hashes

    def equal(self, places: Int64s, other: Values, other_places: Int64s) -> Bools:
        assert isinstance(other, Texts)
        lengths = np.diff(self.offsets)[places]
        same = lengths == np.diff(other.offsets)[other_places]
        # Texts of equal lengths, of which those that are not empty are compared byte by byte.
        compared = np.flatnonzero(same & (lengths > 0))
        lengths = lengths[compared]
        stops = np.cumsum(lengths)
        first = 0
        while first < len(compared):
            # As many as fit into a block: the places of bytes take eight times the memory of the text.
            begin = int(stops[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(stops, begin + _BLOCK_BYTES // 8, "right")))
            part, sizes = compared[first:last], lengths[first:last]
            own = self.items[consecutive(self.offsets[places[part]], sizes)]
            theirs = other.items[consecutive(other.offsets[other_places[part]], sizes)]
            same[part] = ~np.logical_or.reduceat(own != theirs, np.cumsum(sizes) - sizes)
            first = last
        return np.asarray(same, np.bool_)

    def text(self, place: int) -> str:
        begin, end = self.offsets[place : place + 2].tolist()
        return self.items[begin:end].tobytes().decode("utf-8", "replace")

    def shown(self, place: int) -> str:
        return repr(super().shown(place))


def key_field(dataset: Dataset, name: str) -> Field:
    """The field that rows are found by.

    Raises
    ------
    FieldNotFound
    UnsupportedField
        It does not have one integer or text per row.
    """
    field = dataset.field(name)
    is_one = field.is_text or (not field.is_ragged and math.prod(field.sample_shape) == 1)
    if not is_one or field.images is not None or (not field.is_text and field.dtype.kind not in "iu"):
        others = "lists" if field.is_ragged else f"rows of shape {[*field.sample_shape]}"
        said = f"one {field.type_name} per row" if is_one else f"{others} of {field.type_name}"
        raise UnsupportedField(
            f"key={name}: a key is a field with one integer or text per row, but {name!r} has {said}"
        )
    return field


def values_of_keys(field: Field, keys: Sequence[str | int], *, are_words: bool = False) -> Values:
    """Keys from a request as values of the field. If it has class names, a text is one of these, as in ``where``.

    Parameters
    ----------
    are_words : bool
        Whether the keys are words of a URL, which may also be the numbers of classes.

    Raises
    ------
    BadParameter
        A key is no integer, but the field has integers; or a word is the name of one class and the number of another.
    """
    if field.is_text:
        return Texts.of([str(key).encode("utf-8", "surrogatepass") for key in keys])
    numbers = None if field.class_names is None else {name: code for code, name in enumerate(field.class_names)}
    bits, negative = np.zeros(len(keys), np.uint64), np.zeros(len(keys), np.bool_)
    for place, key in enumerate(keys):
        number = _number(field, key) if numbers is None else _class(field, numbers, key, are_words)
        # No row has an integer of more than 64 bits, nor a negative one whose bits are 0.
        is_possible = number is not None and -(1 << 63) <= number < 1 << 64
        number = number if number is not None and is_possible else 0
        bits[place] = number % (1 << 64)
        negative[place] = number < 0 or not is_possible
    return Integers(bits, negative)


def _number(field: Field, key: str | int) -> int:
    if isinstance(key, str) and not _WHOLE.fullmatch(key):
        raise BadParameter(f"{field.name!r} has integers, so {key[:_SHOWN_CHARS]!r} cannot be one of its values")
    return int(key)


def _class(field: Field, numbers: Mapping[str, int], key: str | int, is_word: bool) -> int | None:
    """The number of a class; None: there is no such class."""
    if isinstance(key, int):
        return key
    named = numbers.get(key)
    if not is_word or not _WHOLE.fullmatch(key):
        return named
    if named not in (None, int(key)):
        raise BadParameter(
            f"{field.name!r} has a class named {key!r}, which is number {named}, and another with this number: POST "
            'keys, where "…" is a name and an integer a number'
        )
    return int(key)


def as_other(field: Field, other: Field) -> Callable[[Values], tuple[Values, Int64s]]:
    """How to translate values of a field to those of the field that it is joined by.

    The numbers of classes differ from dataset to dataset, so classes are compared by name, also with text. Values
    without a name, such as the -1 of pandas for missing values, are found nowhere. If only one of the fields has class
    names and the other has integers, the stored numbers are compared.

    Returns
    -------
    callable
        Takes (n,) values of `field`. Returns (k,) values of `other`, and which of the n they are, (k,) int64.
    """
    own, theirs = field.class_names, other.class_names
    if own is not None and (theirs is not None or other.is_text):
        names = [name.encode("utf-8", "surrogatepass") for name in own]
        numbers = {} if theirs is None else {name: number for number, name in enumerate(theirs)}
        # table: (classes,), the number of each class there; -1: there is none
        table = np.array([numbers.get(name, -1) for name in own], np.int64)

        def of_classes(values: Values) -> tuple[Values, Int64s]:
            assert isinstance(values, Integers)
            places = np.flatnonzero(~values.negative & (values.bits < np.uint64(len(table))))
            codes = values.bits[places].astype(np.int64)
            if theirs is None:
                return Texts.of([names[code] for code in codes.tolist()]), places
            found = table[codes]
            return Integers.of(found[found >= 0]), places[found >= 0]

        return of_classes
    if field.is_text and theirs is not None:
        by_text = {name.encode("utf-8", "surrogatepass"): number for number, name in enumerate(theirs)}

        def of_texts(values: Values) -> tuple[Values, Int64s]:
            assert isinstance(values, Texts)
            bounds = pairwise(values.offsets.tolist())
            found = np.array([by_text.get(values.items[a:b].tobytes(), -1) for a, b in bounds], np.int64)
            places = np.flatnonzero(found >= 0)
            return Integers.of(found[places]), places

        return of_texts
    return lambda values: (values, np.arange(len(values)))


def classes_told(field: Field) -> frozenset[tuple[int, str]] | tuple[str, ...] | None:
    """What the numbers of a field are said to stand for where they are stored; None if nothing is said.

    Returns
    -------
    frozenset of (int, str), tuple of str, or None
        Each number with its name, by class names or an enum. Or only the names, if these are not its class names: one
        of them occurs twice, they do not fit its numbers, or they are in another attribute, and it is no label.
    """
    if field.class_names is not None:
        return frozenset(enumerate(field.class_names))
    if field.array.enum_names:
        return frozenset((number, name) for name, number in field.array.enum_names.items())
    about = field.column.segments[0].about
    names = about.class_names if about is not None and about.class_names else class_names(field.array, {})
    return tuple(names) if names else None


def values_at(reader: Reader, field: Field, rows: Int64s) -> Values:
    """The values of these rows."""
    column = field.column
    if field.is_text:
        return Texts(*reader.read_ragged(column, rows))
    out = np.empty((len(rows), *column.sample_shape), column.dtype)
    reader.read(column, rows, out)
    return Integers.of(out.reshape(-1))


def values_of_rows(reader: Reader, field: Field) -> Iterator[Values]:
    """The values of all rows in order, in blocks."""
    column = field.column
    start, step = 0, block_rows(reader, field)
    while start < column.rows:
        stop = min(start + step, column.rows)
        if field.is_text:
            try:
                yield Texts(*reader.read_ragged(column, np.arange(start, stop, dtype=np.int64)))
            except TooLarge:
                # Texts are much longer here than elsewhere in the field: read fewer at once.
                if step == 1:
                    raise
                step = max(1, step // 8)
                continue
        else:
            yield Integers.of(reader.read_block(column, start, stop).reshape(-1))
        start = stop


def block_rows(reader: Reader, field: Field) -> int:
    """How many rows to read at a time: whole chunks, if these are not too long."""
    column = field.column
    row_bytes = max(16, column.row_bytes, reader.typical_items(column) if field.is_text else 0)
    step = max(1, min(_BLOCK, _BLOCK_BYTES // row_bytes))
    return step // field.block_rows * field.block_rows if step > field.block_rows else step


def _mix(values: UInt64s) -> UInt64s:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31)) ^ np.uint64(0x2545_F491_4F6C_DD1D)
