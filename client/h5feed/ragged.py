"""How rows of different lengths become arrays of few shapes: the options ``pad`` and ``pack``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .errors import BadParameter, UnsupportedField
from .frames import DTYPES, Field
from .suggestions import no_field
from .wire import dtype_named

LENGTHS, MASK = ".lengths", ".mask"
"""Suffixes of the arrays that come with a padded field."""

SEGMENT_IDS, POSITIONS = "segment_ids", "positions"
"""Arrays that come with packed fields."""

PAD_TO = 8
"""Without ``max_length``, a batch is as wide as its longest row, rounded up to a multiple of this."""

_OF_PADDING = ("max_length", "truncate", "pad_to")
OPTIONS = ("pad", *_OF_PADDING, "pad_value")
"""Options of the client. The server gets `Layout.params`."""


@dataclass(frozen=True)
class Layout:
    """The arrays made of rows that differ in length.

    Attributes
    ----------
    fields : tuple of str
        The fields that are padded, or packed.
    dtypes : mapping of str to dtype
        Of each of them.
    most : mapping of str to int
        Padding: the maximum length of each field that has one.
    truncate : ``"start"``, ``"end"`` or None
        Which part to keep of rows that are longer than that; None: they are an error.
    pad_to : int, tuple of int or None
        Padding: round the longest row up to a multiple, or to the next of these lengths. None: fields with a maximum
        length have this length, others a multiple of `PAD_TO`.
    values : mapping of str to number
        What fills the rest of each field.
    pack : int or None
        Packing: items of a packed row.
    """

    fields: tuple[str, ...]
    dtypes: Mapping[str, np.dtype[Any]]
    most: Mapping[str, int] = field(default_factory=dict)
    truncate: Literal["start", "end"] | None = None
    pad_to: int | tuple[int, ...] | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    pack: int | None = None

    @property
    def derived(self) -> dict[str, str | None]:
        """The arrays that are made besides the fields, by name: the field that each belongs to, or None for all."""
        if self.pack is not None:
            return {SEGMENT_IDS: None, POSITIONS: None}
        return {name + suffix: name for name in self.fields for suffix in (LENGTHS, MASK)}

    @property
    def is_fixed(self) -> bool:
        """Whether all batches of a pass have the same shape, apart from the number of rows."""
        return self.pack is not None or all(map(self.is_fixed_of, self.fields))

    def is_fixed_of(self, name: str) -> bool:
        """Whether the padded rows of a field have the same length in all batches."""
        if name not in self.most:
            return False
        least = self.pad_to[0] if isinstance(self.pad_to, tuple) else self.pad_to
        return least is None or least >= self.most[name]

    @property
    def params(self) -> dict[str, str | list[str]]:
        """Parameters for the server, which cuts rows before it sends them."""
        names = [name for name in self.fields if name in self.most]
        if not names:
            return {}
        numbers = {self.most[name] for name in names}
        most = str(numbers.pop()) if len(numbers) == 1 else ",".join(str(self.most[name]) for name in names)
        cut = {} if self.truncate is None else {"truncate": self.truncate}
        return {"pad": names, "max_length": most, **cut}

    def width_of(self, name: str, longest: int, row: int) -> int:
        """Length of the padded rows of a field in a batch whose longest row is `row`, of `longest` items.

        Raises
        ------
        BadParameter
            It is longer than all lengths of ``pad_to``, and there is no maximum.
        """
        if self.is_fixed_of(name):
            return self.most[name]
        most = self.most.get(name)
        if isinstance(self.pad_to, tuple):
            width = next((bound for bound in self.pad_to if longest <= bound), most)
            if width is None:
                raise BadParameter(
                    f"pad_to={list(self.pad_to)}: row {row} of {name!r} has {longest} items, more than the last of "
                    "these lengths: add a longer one, or use max_length= and truncate="
                )
        else:
            multiple = self.pad_to or PAD_TO
            width = max(1, -(-longest // multiple)) * multiple
        return width if most is None else min(width, most)

    def nbytes(self, rows: int) -> int:
        """Bytes of the arrays made of `rows` rows, without those whose length is not known."""
        if self.pack is not None:
            return rows * self.pack * (8 + sum(dtype.itemsize for dtype in self.dtypes.values()))
        return sum(rows * (width * (self.dtypes[name].itemsize + 1) + 4) for name, width in self.most.items())


def layout_of(fields: Mapping[str, Field], chosen: Sequence[str] | None, options: Mapping[str, Any]) -> Layout | None:
    """The layout that options ask for; None if lists come flat, with offsets.

    Parameters
    ----------
    fields : mapping of str to Field
        Of the dataset.
    chosen : sequence of str or None
        The requested fields; None: not said.
    options : mapping
        ``pad``, ``max_length``, ``truncate``, ``pad_to``, ``pad_value``, ``pack``, ``pack_by``.

    Raises
    ------
    BadParameter, FieldNotFound, UnsupportedField
    """
    given = {name: options.get(name) for name in OPTIONS if options.get(name) is not None}
    pack = options.get("pack")
    if pack is not None:
        for name in ("pad", *_OF_PADDING):
            if given.get(name):
                raise BadParameter(f"{name}= cannot be used with pack=: packed rows all have {pack} items")
        _check_count("pack", pack)
        names = _packed(fields, chosen, options.get("pack_by"))
    else:
        names = _padded(fields, chosen, given.pop("pad", None))
        if not names:
            for name in given:
                raise BadParameter(f"{name}= needs pad=, which names the fields to pad, or pack=")
            return None
    values = given.get("pad_value", 0)
    for name in values if isinstance(values, Mapping) else ():
        if name not in names:
            what = "padded" if pack is None else "packed"
            raise BadParameter(
                f"pad_value= names {name!r}, which is not {what}. The {what} fields are {', '.join(map(repr, names))}"
            )
    dtypes = {name: _dtype_of(fields[name]) for name in names}
    layout = Layout(
        tuple(names),
        dtypes,
        _maxima(given.get("max_length"), names),
        given.get("truncate"),
        None if "pad_to" not in given else _pad_to(given["pad_to"]),
        {name: _value_of(values, name, dtype) for name, dtype in dtypes.items()},
        pack,
    )
    if layout.truncate not in (None, "start", "end"):
        raise BadParameter(f"truncate={layout.truncate!r} must be 'start' or 'end', the part of longer rows to keep")
    if layout.truncate is not None and not layout.most:
        raise BadParameter("truncate= needs max_length=: it has no effect without it")
    if layout.pad_to is not None and layout.is_fixed:
        raise BadParameter(
            f"pad_to={given['pad_to']} has no effect with max_length={given['max_length']}, which is not longer: leave "
            "out one of them, or pad to shorter lengths"
        )
    for name in layout.derived:
        if name in fields and (chosen is None or name in chosen):
            what = "packed rows" if pack is not None else "padded rows"
            raise BadParameter(f"the field {name!r} has the name of an array that comes with {what}: leave it out")
    return layout


def check_bucket(layout: Layout | None, fields: Mapping[str, Field], options: Mapping[str, Any]) -> None:
    """Check that ``bucket`` can reduce padding.

    Parameters
    ----------
    fields : mapping of str to Field
        Of the dataset, without those of joined ones.

    Raises
    ------
    BadParameter
        All rows of the field whose lengths count get the same length.
    """
    if layout is None or options.get("bucket") is None:
        return
    by = options.get("bucket_by")
    lists = [one.name for one in fields.values() if one.readable and one.ragged and one.dtype != "string"]
    counting = [by] if by is not None else lists or [one.name for one in fields.values() if one.readable and one.ragged]
    if len(counting) == 1 and layout.is_fixed_of(counting[0]):
        raise BadParameter(
            f"bucket={options['bucket']} has no effect on {counting[0]!r}, whose rows "
            f"max_length={layout.most[counting[0]]} makes equally long: also give the lengths to choose from, with "
            "pad_to=, or name another list with bucket_by="
        )


def padded_fields(fields: Mapping[str, Field], chosen: Sequence[str] | None) -> list[str]:
    """What ``pad=True`` stands for: all list fields of the chosen ones, or else all text fields."""
    ragged = [one for one in fields.values() if one.readable and one.ragged]
    if chosen is not None:
        return [one.name for one in ragged if one.name in chosen]
    of_model = [one for one in ragged if one.role in ("input", "label")] or ragged
    return [one.name for one in of_model if one.dtype != "string"] or [one.name for one in of_model]


def _padded(fields: Mapping[str, Field], chosen: Sequence[str] | None, pad: Any) -> list[str]:
    if pad is None or pad is False:
        return []
    if pad is True:
        if names := padded_fields(fields, chosen):
            return names
        raise BadParameter("pad=True: there are no lists or text among the fields, so there is nothing to pad")
    names = [pad] if isinstance(pad, str) else list(dict.fromkeys(pad))
    for name in names:
        _check_ragged(fields, name, "pad")
        if chosen is not None and name not in chosen:
            raise BadParameter(f"pad={name!r}: this field is not among the requested ones")
    return names


def _packed(fields: Mapping[str, Field], chosen: Sequence[str] | None, pack_by: str | None) -> list[str]:
    if chosen is not None:
        found = [name for name in chosen if name in fields and fields[name].ragged]
        if not found and chosen and all(name in fields for name in chosen):
            others = [one.name for one in fields.values() if one.readable and one.ragged]
            there = f"choose from {', '.join(map(repr, others))}" if others else "the dataset has none"
            raise BadParameter(f"pack=: {', '.join(map(repr, chosen))} are no lists or text: {there}")
        return found
    if pack_by is not None:
        _check_ragged(fields, pack_by, "pack_by")
        return [pack_by]
    found = padded_fields(fields, None)
    if len(found) != 1:
        has = f"several fields of lists or text ({', '.join(map(repr, found))})" if found else "no lists or text"
        raise BadParameter(f"pack=: the dataset has {has}: name the fields to pack with fields=")
    return found


def _check_ragged(fields: Mapping[str, Field], name: str, option: str) -> None:
    if name not in fields:
        raise no_field(name, [one.name for one in fields.values() if one.ragged], f"{option}=: no list or text field")
    if not fields[name].readable:
        raise UnsupportedField(f"the field {name!r} cannot be served: {fields[name].reason}")
    if not fields[name].ragged:
        raise BadParameter(f"{option}={name!r}: all rows of {name!r} have the same shape already")


def _dtype_of(one: Field) -> np.dtype[Any]:
    """Dtype of the items of a field, or of the bytes of text."""
    if one.dtype == "string":
        return np.dtype(np.uint8)
    return dtype_named("BF16") if one.dtype == "bfloat16" else DTYPES.get(one.dtype, np.dtype(np.uint8))


def _maxima(given: Any, names: Sequence[str]) -> dict[str, int]:
    if given is None:
        return {}
    widths = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, width in widths.items():
        if name not in names:
            raise BadParameter(
                f"max_length= names {name!r}, which is not padded. The padded fields are {', '.join(map(repr, names))}"
            )
        _check_count("max_length", width)
    return {name: int(width) for name, width in widths.items()}


def _pad_to(given: Any) -> int | tuple[int, ...]:
    if isinstance(given, (list, tuple, np.ndarray)):
        bounds = tuple(given)
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise BadParameter(f"pad_to={list(bounds)} must be a number, or lengths in ascending order")
        for bound in bounds:
            _check_count("pad_to", bound)
        return tuple(map(int, bounds))
    _check_count("pad_to", given)
    return int(given)


def _check_count(option: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise BadParameter(f"{option}={given!r} must be a number of items, 1 or more")


def _value_of(given: Any, name: str, dtype: np.dtype[Any]) -> float:
    value = given.get(name, 0) if isinstance(given, Mapping) else given
    with np.errstate(all="ignore"):
        try:
            stored = np.array([value]).astype(dtype)[0]
            fits = bool(stored == value) or (value != value and bool(stored != stored)) or dtype.kind == "f"
        except (TypeError, ValueError, OverflowError):
            fits = False
    if not fits:
        raise BadParameter(f"pad_value={value!r} is not a value of {name!r}, which has {dtype.name} items")
    number: float = value
    return number
