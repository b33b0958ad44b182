"""Unpacks packed numbers of netCDF: ``scale_factor``, ``add_offset``, ``_FillValue`` …

See the CF conventions, https://cfconventions.org/cf-conventions/cf-conventions.html, sections 2.5.1 and 8.1. The
float type follows xarray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")
"""The attributes that describe packing."""

_MOST_MISSING = 16
"""Maximum number of values of an attribute that stand for missing values."""


@dataclass(frozen=True)
class Packing:
    """How numbers are packed.

    Attributes
    ----------
    dtype : str
        NumPy type string of the unpacked numbers: a float, or an unsigned integer if they are only `unsigned`.
    scale, offset : float or None
        Unpacked numbers are ``stored * scale + offset``.
    missing : tuple of int or float
        Stored numbers that stand for missing values: they become NaN.
    unsigned : bool
        The stored integers are signed, but to be interpreted as unsigned.
    problem : str or None
        Why the attributes do not tell how to unpack the numbers; None if they do.
    """

    dtype: str
    scale: float | None = None
    offset: float | None = None
    missing: tuple[int | float, ...] = ()
    unsigned: bool = False
    problem: str | None = None

    def unpack(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The unpacked numbers; `stored` is not modified."""
        if self.unsigned:
            stored = stored.view(stored.dtype.str.replace("i", "u"))
        values: npt.NDArray[Any] = stored.astype(self.dtype)
        one = np.dtype(self.dtype).type
        # Numbers that stand for missing values may overflow.
        with np.errstate(all="ignore"):
            if self.scale is not None:
                values *= one(self.scale)
            if self.offset is not None:
                values += one(self.offset)
        for number in self.missing:
            values[stored == number] = np.nan
        return values

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        parts = [] if self.scale is None else [f"times {self.scale:g}"]
        parts += [] if self.offset is None else [f"plus {self.offset:g}"]
        parts += [f"{number:g} means missing" for number in self.missing[:2]]
        parts += ["unsigned"] if self.unsigned else []
        return ", ".join(parts)


def packing_of(attributes: Mapping[str, npt.NDArray[Any] | None], dtype: np.dtype[Any]) -> Packing | None:
    """The packing described by attributes; None if there is none.

    Parameters
    ----------
    attributes : mapping of str to ndarray or None
        Those of `PACKING` that the array has; None for values that cannot be read.
    dtype : np.dtype
        Stored dtype of the array.
    """
    if dtype.kind not in "iuf":
        return None
    try:
        scale, offset = _number(attributes, "scale_factor"), _number(attributes, "add_offset")
        unsigned = _is_unsigned(attributes, dtype)
        marks = [*_marks(attributes, "_FillValue"), *_marks(attributes, "missing_value")]
    except _Unclear as why:
        return Packing(_unpacked(dtype, None, None).newbyteorder("<").str, problem=str(why))
    if scale is None and offset is None and not marks and not unsigned:
        return None
    if scale is None and offset is None and not marks:
        return Packing(np.dtype(f"u{dtype.itemsize}").newbyteorder("<").str, unsigned=True)
    missing = {number: None for mark in marks for number in _as_stored(mark, dtype, unsigned)}
    unpacked = _unpacked(dtype, scale, offset)
    if dtype.kind == "f" and not marks and {"_FillValue", "missing_value"} & attributes.keys():
        # Where only NaN is missing, xarray keeps the type of floats.
        unpacked = dtype.newbyteorder("=")
    return Packing(
        unpacked.newbyteorder("<").str,
        None if scale is None else float(scale),
        None if offset is None else float(offset),
        tuple(missing),
        unsigned,
    )


class _Unclear(Exception):
    """An attribute has a value that has no meaning. The message says which."""


def _values(attributes: Mapping[str, npt.NDArray[Any] | None], name: str) -> npt.NDArray[Any]:
    """The numbers of an attribute, one-dimensional; empty if there is no such attribute.

    Raises
    ------
    _Unclear
    """
    if name not in attributes:
        return np.zeros(0)
    given = attributes[name]
    if given is None:
        raise _Unclear(f"its attribute {name} cannot be read")
    values = np.asarray(given).reshape(-1)
    if values.dtype.kind not in "iuf":
        said = ", ".join(str(_shown(one)) for one in values[:2].tolist())
        raise _Unclear(f"its attribute {name} is not a number, but {said[:40]!r}")
    return values


def _number(attributes: Mapping[str, npt.NDArray[Any] | None], name: str) -> Any:
    """The attribute, which must be a single finite number; None if there is no such attribute."""
    values = _values(attributes, name)
    if name not in attributes:
        return None
    if len(values) != 1:
        raise _Unclear(f"its attribute {name} has {len(values)} values instead of one")
    if not np.isfinite(values[0]):
        raise _Unclear(f"its attribute {name} is {values[0]}, which leaves no number")
    return values[0]


def _marks(attributes: Mapping[str, npt.NDArray[Any] | None], name: str) -> list[Any]:
    """The numbers of an attribute that stand for missing values. NaN is left out: it is what they become."""
    values = _values(attributes, name)
    if len(values) > _MOST_MISSING:
        raise _Unclear(f"its attribute {name} has {len(values)} values, more than {_MOST_MISSING}")
    return [value for value in values if value == value]


def _is_unsigned(attributes: Mapping[str, npt.NDArray[Any] | None], dtype: np.dtype[Any]) -> bool:
    name = "_Unsigned"
    if name not in attributes or dtype.kind == "f":
        return False
    given = attributes[name]
    said = [_shown(one) for one in np.asarray(given).reshape(-1).tolist()]
    if given is None or said not in (["true"], ["True"], ["false"], ["False"]):
        raise _Unclear(f"its attribute {name} is neither 'true' nor 'false'")
    if said[0] in ("false", "False") and dtype.kind == "u":
        raise _Unclear(f"its attribute {name} is {said[0]!r}, but it is stored as unsigned integers")
    return said[0] in ("true", "True") and dtype.kind == "i"


def _shown(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _as_stored(mark: Any, dtype: np.dtype[Any], unsigned: bool) -> list[int | float]:
    """The stored number that an attribute means; none if the array cannot hold it."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return [float(mark.astype(dtype))]
    limits = np.iinfo(dtype)
    number = int(mark) if np.isfinite(mark) and mark == int(mark) else None
    if unsigned and number is not None:
        # Signed, as the array is stored, or already as it is meant.
        span = 1 << limits.bits
        return [number % span] if limits.min <= number < span else []
    return [number] if number is not None and limits.min <= number <= limits.max else []


def _unpacked(dtype: np.dtype[Any], scale: Any, offset: Any) -> np.dtype[Any]:
    """The float type of the unpacked numbers, chosen like ``xarray.coding.variables._choose_float_dtype``."""
    floats: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float64)]
    if scale is not None or offset is not None:
        numbers = [number for number in (scale, offset) if number is not None]
        given: list[np.dtype[Any]] = [number.dtype.newbyteorder("=") for number in numbers]
        # Adding a large offset loses digits in float32. If scale and offset have the same float type, trust the writer.
        if given[0] not in floats or len({*given}) > 1 or (scale is None):
            return floats[1]
        if offset is not None and dtype.kind in "iu" and dtype.itemsize == 4:
            return floats[1]
        return given[0]
    if dtype.kind == "f":
        return dtype.newbyteorder("=")
    return floats[0] if dtype.itemsize <= 2 else floats[1]
