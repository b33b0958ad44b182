"""Selects, converts and encodes values of arrays in the same way as h5grove (https://silx-kit.github.io/h5grove/).

Runs only in child processes. The size of a selection is checked before anything is read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
import orjson
from h5feed.errors import BadParameter, TooLarge, UnsupportedField

from .text import decoded

DataFormat = Literal["json", "bin", "csv", "npy", "tiff"]

_INSTEAD = "request a part with selection=, or use another format="

Selection = tuple[slice | int, ...]

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,19}\s*")

_JSON_BYTES, _CSV_BYTES = 2, 25
"""Minimum size of a number in these formats."""


def data(
    dataset: h5py.Dataset, selection: str | None, flatten: bool, dtype: str, form: DataFormat, max_bytes: int
) -> bytes:
    """Read and encode values of an array.

    Parameters
    ----------
    dataset : h5py.Dataset
    selection : str, optional
        Indices and slices in numpy's syntax, such as ``0,10:20,::2``. Default: everything.
    flatten : bool
        Return one axis.
    dtype : str
        ``origin``: as stored. ``safe``: converted to a type that JavaScript has typed arrays for.
    form : str
        The format.
    max_bytes : int
        Maximum size of the values, and of the response.

    Raises
    ------
    BadParameter, TooLarge, UnsupportedField
    """
    values = selected(dataset, selection, max_bytes // {"json": _JSON_BYTES, "csv": _CSV_BYTES}.get(form, 1), max_bytes)
    if dtype == "safe":
        if not _is_numeric(values):
            raise UnsupportedField(f"dtype=safe needs numbers, but {dataset.name} holds {_kind(values)}")
        values = values.astype(_javascript_type(values.dtype), order="C", copy=False)
    if flatten and isinstance(values, np.ndarray):
        values = np.ravel(values)
    if form == "json":
        return json_bytes(values, max_bytes, _INSTEAD)
    return _bounded(_encoded(np.asarray(values), form), max_bytes, _INSTEAD)


def stats(dataset: h5py.Dataset, selection: str | None, max_bytes: int) -> dict[str, float | int | None]:
    """Compute the range, mean and standard deviation of the finite values of an array.

    Raises
    ------
    BadParameter, TooLarge, UnsupportedField
    """
    values = np.asarray(selected(dataset, selection, max_bytes, max_bytes))
    if values.dtype.kind not in "biuf":
        raise UnsupportedField(f"statistics need real numbers, but {dataset.name} holds {_kind(values)}")
    number: Callable[[Any], float | int] = int
    if values.dtype.kind == "f":
        number, finite = float, np.isfinite(values)
        values = values if finite.all() else values[finite]

    def least(of: npt.NDArray[Any]) -> float | int | None:
        return number(np.min(of)) if of.size else None

    return {
        "strict_positive_min": least(values[values > 0]),
        "positive_min": least(values[values >= 0]),
        "min": least(values),
        "max": number(np.max(values)) if values.size else None,
        "mean": number(np.mean(values)) if values.size else None,
        "std": number(np.std(values)) if values.size else None,
    }


def selected(dataset: h5py.Dataset, selection: str | None, max_values: int, max_bytes: int) -> Any:
    """Read the selected values with h5py.

    Raises
    ------
    BadParameter, TooLarge
    """
    shape = dataset.shape
    if shape is None:
        if selection is not None:
            raise BadParameter(f"selection={selection}: {dataset.name} is empty")
        return dataset[()]
    chosen = parse(selection, shape) if selection is not None else ()
    left = [*map(len, map(range, shape))]
    for axis, one in enumerate(chosen):
        left[axis] = 1 if isinstance(one, int) else len(range(*one.indices(shape[axis])))
    count = math.prod(left)
    nbytes = count * dataset.dtype.itemsize
    if nbytes > max_bytes or count > max_values:
        raise TooLarge(
            f"this selection of {dataset.name} has {count} values ({nbytes} bytes), too many for one response (limit: "
            f"{max_bytes} bytes, H5FEED_MAX_BODY_BYTES): request a part with selection="
        )
    return dataset[chosen] if chosen else dataset[()]


def parse(selection: str, shape: tuple[int, ...]) -> Selection:
    """Parse a selection of an array of this shape.

    Raises
    ------
    BadParameter
    """
    parts = selection.split(",")
    if len(parts) > len(shape):
        raise BadParameter(f"selection={selection}: it has {len(parts)} parts, but the array has {len(shape)} axes")
    return tuple(_part(part, extent, selection) for part, extent in zip(parts, shape, strict=False))


def _part(part: str, extent: int, selection: str) -> slice | int:
    texts = part.split(":")
    if not all(_WHOLE.fullmatch(text) or (text == "" and len(texts) > 1) for text in texts) or len(texts) > 3:
        raise BadParameter(f"selection={selection}: {part!r} is not an index or a slice: use 5, 2:8, 2:8:2 or :")
    numbers = [int(text) if text else None for text in texts]
    if len(numbers) == 1:
        index = numbers[0]
        assert index is not None
        if not -extent <= index < extent:
            raise BadParameter(f"selection={selection}: index {index} is out of range for an axis of {extent}")
        return index
    if len(numbers) == 3 and numbers[2] is not None and numbers[2] < 1:
        raise BadParameter(f"selection={selection}: the step {numbers[2]} is not positive")
    return slice(*numbers)


def json_bytes(value: Any, max_bytes: int, instead: str) -> bytes:
    """Encode values as JSON. NaN and infinities become null.

    Parameters
    ----------
    max_bytes : int
        Maximum size of the result.
    instead : str
        Says in the error message what to request if the result is too large.

    Raises
    ------
    TooLarge
    """
    try:
        content = orjson.dumps(value, default=_json_value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        # Some text is not UTF-8, or some numbers are big-endian.
        content = orjson.dumps(_clean(value), default=_json_value, option=orjson.OPT_SERIALIZE_NUMPY)
    return _bounded(content, max_bytes, instead)


def _json_value(value: Any) -> Any:
    """Convert values of types that orjson does not support."""
    if isinstance(value, np.floating) and value.dtype.itemsize > 8:
        return float(value)
    if isinstance(value, (complex, np.complexfloating)):
        return [value.real, value.imag]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, (h5py.Reference, h5py.RegionReference)):
        return str(value)
    raise TypeError(f"JSON does not support {type(value).__name__}")


def _clean(value: Any) -> Any:
    """Convert what orjson refuses: bytes that are not UTF-8, and numbers that are not in native byte order."""
    if isinstance(value, (str, bytes)):
        return decoded(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _clean(value.tolist()) if value.dtype.kind in "OSUV" else value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, (list, tuple)):
        return [_clean(one) for one in value]
    return value


def _encoded(values: npt.NDArray[Any], form: DataFormat) -> bytes:
    if values.dtype.hasobject:
        # The bytes of objects are addresses in this process.
        raise UnsupportedField(f"format={form} needs values of one size, but these are {_kind(values)}: use json")
    if form == "bin":
        return values.tobytes()
    if not _is_numeric(values):
        raise UnsupportedField(f"format={form} needs numbers, but these are {_kind(values)}: use json or bin")
    stream = io.BytesIO()
    if form == "npy":
        np.save(stream, values, allow_pickle=False)
        return stream.getvalue()
    if values.ndim == 0:
        raise UnsupportedField(f"format={form} needs an array, but this is one value: use json, bin or npy")
    if form == "csv":
        if values.ndim > 2:
            raise UnsupportedField(f"format=csv needs one or two axes, but there are {values.ndim}: use selection=")
        np.savetxt(stream, values, delimiter=",")
        return stream.getvalue()
    # Imported late because it is large and rarely needed.
    import tifffile

    try:
        tifffile.imwrite(stream, values, photometric="minisblack")
    except ValueError as error:
        raise UnsupportedField(f"format=tiff: {error}") from None
    return stream.getvalue()


def _bounded(content: bytes, max_bytes: int, instead: str) -> bytes:
    if len(content) > max_bytes:
        raise TooLarge(
            f"the response has {len(content)} bytes, which is too many (limit: {max_bytes} bytes, "
            f"H5FEED_MAX_BODY_BYTES): {instead}"
        )
    return content


def _is_numeric(values: Any) -> bool:
    return isinstance(values, (np.ndarray, np.generic)) and values.dtype.kind in "biufc"


def _javascript_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the nearest little-endian type that JavaScript has a typed array for."""
    if dtype.kind == "f" and dtype.itemsize != 8:
        return np.dtype("<f4" if dtype.itemsize <= 4 else "<f8")
    return dtype.newbyteorder("<")


def _kind(values: Any) -> str:
    dtype = getattr(values, "dtype", None)
    if dtype is None or dtype.hasobject or dtype.kind in "SU":
        return "text, lists or references"
    return "records or opaque bytes" if dtype.kind == "V" else f"{dtype} numbers"
