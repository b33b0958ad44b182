"""What the values of a field are to people, and so how they are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from ...catalog.dataset import Dataset, Field
from ..images import is_image

Kind = Literal[
    "image", "mask", "frames", "volume", "map", "signal", "points", "text", "class", "number", "vector", "list", "none"
]

DRAWN: tuple[Kind, ...] = ("image", "mask", "frames", "volume", "map", "signal", "points")
"""Kinds that are shown as pictures."""

SINGLE: tuple[Kind, ...] = ("class", "number")
"""Kinds of one value a row."""

SHORT = 16
"""Numbers of a row up to which they are listed, and not drawn."""

_LONG = 8
"""How many times as long as wide a table of numbers is, for it to be a signal."""

_COLOURS = (1, 3, 4)
"""Sizes of an axis of channels."""

_POINTS = re.compile(
    r"point|landmark|key_?pts|pose|joint|cloud|xyz|coord|vert(ex|ices)|traj|corner|pos(ition)?s?$", re.I
)
_FRAMES = re.compile(r"frame|video|clip|movie|seq|rgb|obs|camera|agentview|cam$", re.I)
_MASKS = re.compile(r"mask|seg|annot|label|ground", re.I)
_MAPS = re.compile(r"spec|mel|stft|mfcc|depth|heat|attention|radar|velocity", re.I)


_ROLES = ("input", "label", "weight", "other")


def by_role(fields: Sequence[Field]) -> list[Field]:
    """Fields in the order in which people look at them: inputs, labels, the rest."""
    return sorted(fields, key=lambda field: _ROLES.index(field.role) if field.role in _ROLES else len(_ROLES))


def in_table(dataset: Dataset) -> list[Field]:
    """Fields as columns: labels right after the first image, before inputs that may be wide or many.

    Those that cannot be read are left out, unless there are no others.
    """
    fields = by_role([field for field in dataset.fields if not field.unreadable] or dataset.fields)
    images = [field for field in fields if field.role == "input" and kind_of(dataset, field) == "image"]
    return sorted(fields, key=lambda field: 0 if field in images[:1] else 1 if field.role == "label" else 2)


def kind_of(dataset: Dataset, field: Field) -> Kind:
    """How a field is shown."""
    if field.unreadable:
        return "none"
    if field.is_text:
        return "text"
    if field.is_ragged and not field.is_sparse:
        return "signal" if field.dtype.kind == "f" else "list"
    shape = field.sample_shape
    count = math.prod(shape)
    if count == 1:
        is_class = field.class_names is not None or field.dtype.kind == "b"
        return "class" if is_class or (field.role == "label" and field.dtype.kind in "iu") else "number"
    if count == 0 or field.dtype.kind not in "biuf":
        return "list"
    if len(shape) == 1:
        return "vector" if shape[0] <= SHORT or field.role == "label" else "signal"
    if len(shape) == 2:
        return _of_table(dataset, field, (shape[0], shape[1]))
    if is_image(field):
        return "image"
    if len(shape) == 3:
        if shape[2] == 1 and min(shape[:2]) >= 4:
            return "mask" if field.dtype.kind in "bi" else "map"
        if shape[0] in (3, 4) and min(shape[1:]) >= 8 and field.dtype.kind in "uf":
            return "image"
        return "frames" if _FRAMES.search(field.name) else "volume"
    if len(shape) == 4:
        is_sequence = shape[3] in _COLOURS or shape[1] in _COLOURS
        return "frames" if is_sequence and min(sorted(shape)[1:3]) >= 4 else "volume"
    return "list"


def _of_table(dataset: Dataset, field: Field, shape: tuple[int, int]) -> Kind:
    """A field of two axes."""
    short, long = sorted(shape)
    is_whole = field.dtype.kind in "biu"
    beside = {other.sample_shape[:2] for other in dataset.fields if other is not field and is_image(other)}
    if is_whole and field.dtype.kind != "u" and shape in beside:
        return "mask"
    if field.dtype.kind == "u" and shape in beside and (field.role == "label" or _MASKS.search(field.name)):
        return "mask"
    if shape[1] in (2, 3) and (_POINTS.search(field.name) or (shape[1] == 3 and shape[0] > SHORT and not is_whole)):
        return "points"
    if _MAPS.search(field.name) and short > 3:
        return "map"
    if field.dtype.kind == "b":
        return "map"
    if short <= 3 or (field.dtype != "u1" and short <= 2 * SHORT and long >= _LONG * short):
        return "signal"
    return "image" if is_image(field) and not (field.dtype.kind == "f" and field.role == "label") else "map"
