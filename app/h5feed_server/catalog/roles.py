"""Guesses the role of each field from its name, shape and dtype, and gives the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from h5feed.stored.column import About
from h5feed.stored.layout import ArrayLayout

from .vocabulary import helpers_in, is_coordinate, is_running, says, target_of_pair

ROLES = ("input", "label", "weight", "other")
"""Roles of fields; also the valid values of the attribute ``role``."""


@dataclass(frozen=True)
class Role:
    """A role, which is one of `ROLES`, and the reason for it."""

    role: str
    reason: str


@dataclass(frozen=True)
class Traits:
    """The properties of a field that its role is guessed from.

    Attributes
    ----------
    name : str
    sample_shape : tuple of int
    dtype : np.dtype
    has_lists : bool
        Rows are variable-length lists of numbers.
    usable : bool
        The field can be served.
    about : About or None
        Metadata by a convention.
    """

    name: str
    sample_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    has_lists: bool = False
    usable: bool = True
    about: About | None = None

    @property
    def is_single(self) -> bool:
        """Whether a row is a single value."""
        return math.prod(self.sample_shape) == 1 and not self.has_lists

    @property
    def is_text(self) -> bool:
        return self.dtype.kind == "S"

    @property
    def is_column(self) -> bool:
        return self.about is not None and self.about.is_column

    @property
    def is_told(self) -> bool:
        """Whether the role is known and need not be guessed."""
        return self.about is not None and self.about.role is not None


_TARGET = "target"
"""A preliminary role: becomes ``label`` if no other field is a label, else ``other``."""


def guess_roles(fields: Sequence[Traits], holds_classes: Callable[[int], bool] = lambda number: True) -> list[Role]:
    """Guess the role of each field of a dataset. Names count more than shapes.

    Parameters
    ----------
    fields : sequence of Traits
    holds_classes : callable
        Takes the index of a field, and returns whether some of its values occur more than once.
    """
    names = [field.name for field in fields if field.usable]
    scalars = [field.name for field in fields if field.usable and field.is_single]
    roles = [_by_itself(field, names, scalars) for field in fields]
    _set_helpers_aside(fields, roles)
    labels = [i for i, role in enumerate(roles) if role.role == "label" and fields[i].usable]
    numbers = [i for i in labels if not fields[i].is_text]
    if numbers:
        for i in labels:
            if not fields[i].is_text or fields[i].is_told:
                continue
            reason = f"text, while the label {fields[numbers[0]].name!r} has numbers"
            roles[i] = Role("other", reason)
    inputs = any(role.role == "input" and field.usable for field, role in zip(fields, roles, strict=True))
    for i, role in enumerate(roles):
        if role.role == _TARGET and not inputs and not labels:
            roles[i] = Role("input", "there is no other field to learn from")
        elif role.role == _TARGET and labels:
            reason = f"{role.reason}, but {fields[labels[0]].name!r} is the label: select this one with y="
            roles[i] = Role("other", reason)
        elif role.role == _TARGET:
            roles[i] = Role("label", role.reason)
    usable = [role.role for field, role in zip(fields, roles, strict=True) if field.usable]
    if "input" in usable and "label" not in usable:
        only = _only_label(fields, roles, holds_classes)
        if only is not None:
            roles[only] = Role("label", "the only field of classes besides the inputs")
    return [
        Role("input", "a column of numbers") if _is_feature(field, role) else role
        for field, role in zip(fields, roles, strict=True)
    ]


def _set_helpers_aside(fields: Sequence[Traits], roles: list[Role]) -> None:
    """Change the role of fields that are about a label to ``other``: its confidence, its size, the number of labels."""
    labels = [i for i, role in enumerate(roles) if role.role == "label"]
    far = {i: (0, "") if fields[i].is_told else helpers_in(fields[i].name) for i in labels}
    if not far:
        return
    nearest = min(far, key=lambda i: far[i][0])
    for i, (distance, word) in far.items():
        if distance > far[nearest][0]:
            label = fields[nearest].name
            reason = (
                f"its name {fields[i].name!r} suggests {word!r}, and {label!r} is the label: select this one with y="
            )
            roles[i] = Role("other", reason)


def _by_itself(field: Traits, names: Sequence[str], scalars: Sequence[str]) -> Role:
    """The role of a field by its own traits and the names of the other fields."""
    if field.about is not None and field.about.role is not None:
        return Role(field.about.role, field.about.reason or "its file says so")
    name, shape = field.name, field.sample_shape
    word = says(name, single=field.is_single)
    if word in ("label", "input") and field.is_single and is_coordinate(name, scalars):
        word = "nothing"
    if field.has_lists:
        if word == "input":
            return Role("input", f"its name {name!r} suggests an input; each row is a variable-length list")
        return Role("other", "each row is a variable-length list")
    # In a data frame, weight may be a feature of persons or things.
    if word == "weight" and (not field.is_column or "sample" in name.lower()):
        return Role("weight", f"its name {name!r} suggests a weight, and it has one value per row")
    if word == "label":
        return Role("label", f"its name {name!r} suggests a label")
    if field.is_text:
        return Role("other", "text")
    if word == "target":
        return Role(_TARGET, f"its name {name!r} suggests a target")
    if not field.is_single and (source := target_of_pair(name, names)) is not None:
        return Role(_TARGET, f"its name {name!r} suggests a target, next to {source!r}")
    if word == "index":
        return Role("other", f"its name {name!r} suggests an index, a position, a time or a split")
    if word == "input":
        return Role("input", f"its name {name!r} suggests an input")
    if len(shape) >= 2:
        return Role("input", f"a sample of {len(shape)} axes is an image, a series or the like")
    if len(shape) == 1 and not field.is_single:
        return Role("input", "a sample is a vector")
    if field.dtype.kind in "biu":
        return Role("other", "one integer per row, but its name does not suggest a label")
    if field.is_column:
        return Role("input", "a column of numbers")
    return Role("other", "neither its name nor its shape suggests a role")


def _only_label(fields: Sequence[Traits], roles: Sequence[Role], holds_classes: Callable[[int], bool]) -> int | None:
    """Index of the label if no name shows it: the only field of single integers or texts besides inputs; or None."""
    candidates = [
        i
        for i, (field, role) in enumerate(zip(fields, roles, strict=True))
        if role.role == "other" and field.usable and field.is_single and field.dtype.kind in "biuS"
        if not field.is_told and not is_running(field.name)
    ]
    return candidates[0] if len(candidates) == 1 and holds_classes(candidates[0]) else None


def _is_feature(field: Traits, role: Role) -> bool:
    """Whether a field is a feature: a column of numbers without another role. Codes of categories are not features."""
    about = field.about
    if role.role != "other" or about is None or not (about.is_column and field.usable and field.is_single):
        return False
    return not (field.is_text or field.is_told or is_running(field.name)) and about.class_names is None


def is_dense(name: str, sample_shape: tuple[int, ...]) -> bool:
    """Whether rows are masks, boxes or maps: several numbers that are not classes, even if all are 0 or 1."""
    return math.prod(sample_shape) > 1 and says(name, single=False) == "target"


def guess_channels(array: ArrayLayout) -> str | None:
    """The channel order of an image field: ``grey``, ``rgb`` or ``bgr``; None if samples are not images."""
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


_NAMES = ("list_classes", "class_names", "label_names", "labels_names")
_MAYBE_NAMES = ("classes", "categories", "names")
"""Arrays with these names may also be fields with one text for each row."""


def names_classes(name: str) -> bool:
    """Whether this is a usual name for a list of class names."""
    return name.lower() in (*_NAMES, *_MAYBE_NAMES)


def own_class_names(array: ArrayLayout, keys: Sequence[str] = ("class_names",)) -> list[str] | None:
    """Return the class names that an array of integers tells itself, by value; None if it tells none.

    They come from an enum whose numbers are 0, 1, 2 …, or from an attribute with one of the names `keys`.
    """
    if array.enum_names:
        values = {value: name for name, value in array.enum_names.items()}
        if sorted(values) == list(range(len(values))):
            return [values[value] for value in range(len(values))]
    for key in keys:
        value: Any = array.attributes.get(key)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return list(value)
    return None


def class_names(label: ArrayLayout, text: Mapping[tuple[str, ...], Sequence[str]]) -> list[str] | None:
    """Return the class names of a label, where the index is the label value; None if there are none.

    They come from an enum, from an attribute of the field, or from a list of strings such as ``list_classes`` in the
    same group or one that contains it.

    Parameters
    ----------
    label : ArrayLayout
    text : mapping
        Short lists of strings, by the parts of their paths.
    """
    if (own := own_class_names(label, ("class_names", "classes", "label_names", "names"))) is not None:
        return own
    path = tuple(label.path.split("/"))
    for depth in range(len(path) - 1, -1, -1):
        beside = {where[-1].lower(): names for where, names in text.items() if where[:-1] == path[:depth]}
        for key in _NAMES:
            if beside.get(key):
                return list(beside[key])
        for key in _MAYBE_NAMES:
            if beside.get(key) and len(beside[key]) != label.rows:
                return list(beside[key])
    return None
