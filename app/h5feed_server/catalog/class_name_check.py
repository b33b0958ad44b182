"""Checks that class names fit a label: each number that occurs must have its own name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.stored.column import Column

from .dataset import Field

_MOST_AXES = 1
"""Maximum number of axes of labels that are checked. Segmentation masks are not checked: they have special codes."""

_MAX_BYTES = 16 << 20
"""Labels up to this decoded size are checked completely, larger ones at `_PLACES` places of up to `_ROWS` rows."""

_PLACES, _ROWS = 64, 256

Read = Callable[[Column, int, int], npt.NDArray[Any] | None]


def with_fitting_names(fields: Sequence[Field], read: Read) -> tuple[Field, ...]:
    """Remove class names that do not fit from fields, with a note that says why.

    Names that are stored together with the numbers, such as the categories of pandas and AnnData, fit if none of them
    occurs twice, which pandas itself refuses.

    Parameters
    ----------
    fields : sequence of Field
    read : callable
        ``read(column, start, stop)`` returns rows start … stop-1 of a column, or None if they cannot be read.
    """
    return tuple(_with_fitting_names(field, read) for field in fields)


def _with_fitting_names(field: Field, read: Read) -> Field:
    about = field.column.segments[0].about
    if not field.class_names or field.unreadable:
        return field
    stored_with_them = about is not None and about.class_names == field.class_names
    if stored_with_them and len(set(field.class_names)) == len(field.class_names):
        return field
    if field.is_text:
        # The values of text labels are the names.
        return replace(field, class_names=None)
    problem, note = _judged(field, field.class_names, read)
    if problem is not None:
        named = ", ".join(map(repr, field.class_names[:3])) + (" …" if len(field.class_names) > 3 else "")
        note = f"{named} are not used as class names: {problem}"
    notes = "; ".join(filter(None, (field.note, note)))
    return replace(field, class_names=None if problem is not None else field.class_names, note=notes or None)


def _judged(field: Field, names: Sequence[str], read: Read) -> tuple[str | None, str | None]:
    """Why the names do not fit, or None; and other remarks on them, or None."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        return f"{twice!r} occurs twice", None
    shape, count = field.sample_shape, len(names)
    if field.is_ragged or len(shape) > _MOST_AXES or field.dtype.kind not in "biuf":
        return None, None
    if math.prod(shape) == count > 1:
        # One-hot or multi-label: one number for each class.
        return None, None
    occurring, whole = _occurring(field.column, read)
    values = occurring[occurring >= 0]
    if (values != np.floor(values)).any() or not np.isfinite(values).all():
        return "its values are not integers", None
    what, way = "values", ""
    if field.role == "label":
        what, way = "labels", ": declare class_names in h5feed.toml with a name for each number from 0"
    if len(values) and values[-1] >= count:
        here = f"it has {what} up to {int(values[-1])}"
        if int(values[0]) > 0 and int(values[-1]) == count:
            here = f"its {what} are {int(values[0])} … {count}"
        return f"{here}, but the {count} names are for 0 … {count - 1}{way}", None
    said = []
    if len(values) < len(occurring):
        said.append(f"{what} that are NaN or below 0 have no name")
    if not whole:
        said.append(f"only some rows were checked for {what} without a name")
    return None, "; ".join(said) or None


def _occurring(column: Column, read: Read) -> tuple[npt.NDArray[Any], bool]:
    """The distinct values of the checked rows, (n,) ascending, and whether all rows were checked."""
    step = column.rows
    if column.stored_nbytes > _MAX_BYTES:
        step = min(_ROWS, max(1, _MAX_BYTES // _PLACES * column.rows // column.stored_nbytes))
    places = np.unique(np.linspace(0, column.rows - step, _PLACES if step < column.rows else 1).astype(np.int64))
    parts = [read(column, begin, begin + step) for begin in places.tolist()]
    blocks = [part.reshape(-1) for part in parts if part is not None]
    values = np.unique(np.concatenate(blocks)) if blocks else np.zeros(0, np.uint8)
    return values.astype(np.uint8) if values.dtype.kind == "b" else values, step == column.rows and len(blocks) > 0
