"""Attributes of HDF5 objects as JSON values for the catalogue, bounded in size."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.stored.packing import PACKING
from h5py import h5a, h5r, h5t

from .pickled_lists import plain_list
from .stored_types import describe
from .text import decoded, json_bytes, reason_of

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1 << 16
"""Bounds on the attributes of one object that go into the catalogue."""

MAX_NAME_BYTES = 1 << 10
"""Maximum length of the name of a group, an array or an attribute."""

_SHORT = 64
"""Maximum size in bytes of an element of a packing attribute."""

_DIMENSIONS = "DIMENSION_LIST"

_FUEL = ("split", "source", "start", "stop", "indices", "available")

_ATTRIBUTE_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM)
"""Attribute types that are read. Of others only the name is listed: libhdf5 crashes on some damaged ones."""


def attributes_of(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """Attributes of an object as JSON values. Those that are too large or cannot be read become a short description."""
    try:
        # Most arrays have none, and listing their names takes as long as opening the array.
        if not h5a.get_num_attrs(item.id):
            return {}
        names = list(item.attrs)
    except Exception as error:
        return {"": f"(its attributes cannot be listed: {reason_of(error, item.file.filename)})"}
    attributes: dict[str, Any] = {}
    for name in names[:MAX_ATTRIBUTES]:
        try:
            _, value = attribute_value(item, name)
        except Exception:
            value = "(it cannot be read)"
        attributes[decoded(name)[:MAX_NAME_BYTES]] = value
    if len(names) > MAX_ATTRIBUTES:
        attributes[""] = f"({len(names) - MAX_ATTRIBUTES} more are not shown)"
    return attributes


def packing_attributes(item: h5py.Dataset) -> dict[str, npt.NDArray[Any] | None]:
    """Attributes that say how numbers are packed, with their dtypes; None for those that cannot be read."""
    values: dict[str, npt.NDArray[Any] | None] = {}
    for name in PACKING:
        with contextlib.suppress(Exception):
            if name in item.attrs:
                values[name] = None
                attribute = item.attrs.get_id(name)
                if attribute.get_type().get_class() in _ATTRIBUTE_CLASSES and attribute.dtype.itemsize <= _SHORT:
                    value = item.attrs[name]
                    values[name] = np.zeros(0) if isinstance(value, h5py.Empty) else np.asarray(value)
    return values


def dimensions_of(item: h5py.Dataset) -> tuple[str, ...]:
    """The path of the dimension scale of each axis, empty for axes without one. Empty if no axis has any."""
    try:
        if _DIMENSIONS not in item.attrs:
            return ()
        kind = item.attrs.get_id(_DIMENSIONS).get_type()
        if kind.get_class() != h5t.VLEN or kind.get_super().get_class() != h5t.REFERENCE:
            return ()
        # Of several scales of an axis, the first one is netCDF's.
        names = [h5r.get_name(scales[0], item.id) if len(scales) else b"" for scales in item.attrs[_DIMENSIONS]]
    except Exception:
        # Then it has no dimensions: its rows are along the first axis.
        return ()
    paths = tuple(decoded(name or b"").strip("/") for name in names)
    return paths if len(paths) == len(item.shape) and any(paths) else ()


def fuel_splits(file: h5py.File) -> list[dict[str, Any]] | None:
    """The root attribute ``split`` as Fuel writes it: the range of rows of each split and field; None without it."""
    try:
        if "split" not in file.attrs:
            return None
        attribute = file.attrs.get_id("split")
        if not set(_FUEL) <= set(attribute.dtype.names or ()) or math.prod(attribute.shape) > MAX_ATTRIBUTES:
            return None
        return [
            {
                "split": decoded(row["split"]),
                "source": decoded(row["source"]),
                "start": int(row["start"]),
                "stop": int(row["stop"]),
                "indices": bool(row["indices"]),
                "available": bool(row["available"]),
            }
            for row in file.attrs["split"].reshape(-1)
        ]
    except Exception:
        # It is then listed like any other attribute.
        return None


def attribute_value(item: h5py.Group | h5py.Dataset | h5py.Datatype, name: str | bytes) -> tuple[bool, Any]:
    """Return whether the value of an attribute can be shown, and the value as JSON or a description of it."""
    attribute = item.attrs.get_id(name)
    kind = attribute.get_type()
    shape = attribute.shape or ()
    readable = kind.get_class() in _ATTRIBUTE_CLASSES and math.prod(shape) * kind.get_size() <= MAX_ATTRIBUTE_BYTES
    # Skip empty arrays: an axis of length 0 makes the product 0, however long the other axes are.
    if readable and attribute.shape is not None and 0 not in shape:
        value = item.attrs[name]
        shown = _json_value(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
        if json_bytes(shown) <= 4 * MAX_ATTRIBUTE_BYTES:
            return True, shown
    return False, f"({describe(attribute.dtype)}, shape {list(shape)}, not shown)"


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes) and (names := plain_list(value)) is not None:
        return _json_value(names)
    if isinstance(value, (bytes, str)):
        return decoded(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
