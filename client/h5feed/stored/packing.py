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
        NumPy type string of the unpacked numbers: a float.
    scale, offset : float or None
        Unpacked numbers are ``stored * scale + offset``.
    missing : tuple of int or float
        Stored numbers that stand for missing values: they become NaN.
    unsigned : bool
        The stored integers are signed, but to be interpreted as unsigned.
    """

    dtype: str
    scale: float | None = None
    offset: float | None = None
    missing: tuple[int | float, ...] = ()
    unsigned: bool = False

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
        parts = [] if self.scale is None else [f"times {self.scale:g}"]
        parts += [] if self.offset is None else [f"plus {self.offset:g}"]
        parts += [f"{number:g} means missing" for number in self.missing[:2]]
        return ", ".join(parts)


def packing_of(attributes: Mapping[str, npt.NDArray[Any]], dtype: np.dtype[Any]) -> Packing | None:
    """The packing described by attributes; None if there is none.

    Parameters
    ----------
    attributes : mapping of str to ndarray
        Those of `PACKING` that the array has.
    dtype : np.dtype
        Stored dtype of the array.
    """
    if dtype.kind not in "iuf":
        return None
    scale, offset = _number(attributes, "scale_factor"), _number(attributes, "add_offset")
    said = np.asarray(attributes.get("_Unsigned", "")).reshape(-1).astype(str)
    unsigned = dtype.kind == "i" and said.tolist() in (["true"], ["True"])
    missing: dict[int | float, None] = {}
    for name in ("_FillValue", "missing_value"):
        values = np.asarray(attributes.get(name, ())).reshape(-1)[:_MOST_MISSING]
        if values.dtype.kind in "iuf":
            meant = values.astype(dtype)
            meant = meant.view(dtype.str.replace("i", "u")) if unsigned else meant
            missing |= {number: None for number in meant.tolist() if number == number}
    if scale is None and offset is None and not missing and not unsigned:
        return None
    return Packing(
        _unpacked(dtype, scale, offset).newbyteorder("<").str,
        None if scale is None else float(scale),
        None if offset is None else float(offset),
        tuple(missing),
        unsigned,
    )


def _number(attributes: Mapping[str, npt.NDArray[Any]], name: str) -> Any:
    """The attribute if it is a single finite number; else None."""
    values = np.asarray(attributes.get(name, ())).reshape(-1)
    return values[0] if len(values) == 1 and values.dtype.kind in "iuf" and np.isfinite(values[0]) else None


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
