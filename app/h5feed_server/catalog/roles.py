"""Guesses what each array of a file is for, from its name, shape and dtype, and says why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..storage.layout import ArrayLayout

_LABEL = re.compile(r"(^|[_.\-])(y|labels?|targets?|class(es)?|class_ids?|category|categories)($|[_.\-])", re.I)
_WEIGHT = re.compile(r"(^|_)(sample_)?weights?($|_)", re.I)
_INDEX = re.compile(r"(^|[_.\-])(id|ids|index|idx|row|file(name)?s?|path|name|time|date)s?($|[_.\-])", re.I)
_INPUT = re.compile(r"(^|[_.\-])(x|images?|imgs?|data|inputs?|features?|pixels)($|[_.\-])", re.I)


@dataclass(frozen=True)
class Role:
    """``input``, ``label``, ``weight`` or ``other``, and what told so."""

    role: str
    reason: str


def guess_role(name: str, sample_shape: tuple[int, ...], dtype: np.dtype[Any]) -> Role:
    """The role of one field of a dataset."""
    ndim = 1 + len(sample_shape)
    single = math.prod(sample_shape) == 1
    if _WEIGHT.search(name) and single:
        return Role("weight", f"its name {name!r} says weight, with one value a row")
    if _LABEL.search(name) and (ndim <= 2 or single):
        return Role("label", f"its name {name!r} says label")
    if dtype.kind == "S":
        return Role("other", "text")
    if _INPUT.search(name):
        return Role("input", f"its name {name!r} says input")
    if ndim >= 3:
        return Role("input", f"a sample of {ndim - 1} axes is an image, a series or the like")
    if ndim == 2 and not single:
        return Role("input", "a sample is a vector")
    if dtype.kind in "biu" and single:
        return Role("other", "one integer a row, but its name does not say label")
    return Role("other", "nothing tells what it is for")


def guess_list_role(name: str) -> Role:
    """The role of a field whose rows are lists of their own lengths."""
    if _INPUT.search(name):
        return Role("input", f"its name {name!r} says input; each row is a list of its own length")
    return Role("other", "each row is a list of its own length")


def only_label(names: Sequence[str], roles: Sequence[Role], dtypes: Sequence[np.dtype[Any]]) -> int | None:
    """Which field must be the label where no name says so: the only one of integers or text beside inputs."""
    if not any(role.role == "input" for role in roles) or any(role.role == "label" for role in roles):
        return None
    found = [i for i, role in enumerate(roles) if role.role == "other" and dtypes[i].kind in "biuS"]
    found = [i for i in found if not _INDEX.search(names[i])]
    return found[0] if len(found) == 1 else None


def guess_channels(array: ArrayLayout) -> str | None:
    """``grey``, ``rgb`` or ``bgr`` of an image field; None where a sample is no image."""
    declared = array.attributes.get("channels")
    if isinstance(declared, str) and declared.lower() in ("rgb", "bgr", "grey"):
        return declared.lower()
    shape = array.sample_shape
    if np.dtype(array.dtype).kind not in "uf" or min(shape, default=0) < 1:
        return None
    if len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) >= 4:
        return "rgb"
    is_grey = (len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)) and min(shape[:2]) >= 4
    return "grey" if is_grey else None


def class_names(label: ArrayLayout, text: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Names of the classes; the index is the label.

    From an enum, an attribute of the label field, or a list of strings beside the fields, such as ``list_classes``.
    """
    if label.enum_names:
        values = {value: name for name, value in label.enum_names.items()}
        if sorted(values) == list(range(len(values))):
            return [values[value] for value in range(len(values))]
    for key in ("class_names", "classes", "label_names", "names"):
        value: Any = label.attributes.get(key)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return list(value)
    for key in ("list_classes", "class_names", "classes", "label_names", "labels_names", "categories", "names"):
        if text.get(key):
            return list(text[key])
    return None
