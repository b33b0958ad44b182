"""A dataset: fields that share their first axis, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
from h5feed.errors import FieldNotFound, UnsupportedField

from ..storage.codecs import unsupported
from ..storage.column import Column
from ..storage.layout import ArrayLayout
from .roles import Role, guess_channels, guess_list_role, guess_role, only_label
from .tables import Table


@dataclass(frozen=True)
class Field:
    """One array of a dataset."""

    name: str
    role: str
    role_reason: str
    channels: str | None
    column: Column
    """Where its rows lie."""
    unreadable: str | None
    """Why it is not served, where it is not."""
    note: str | None = None

    @property
    def array(self) -> ArrayLayout:
        """The first of the arrays that it is made of."""
        return self.column.segments[0].array

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype on the wire."""
        return self.column.dtype

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample on the wire."""
        return self.column.sample_shape

    @property
    def row_bytes(self) -> int:
        return self.column.row_bytes

    @property
    def is_text(self) -> bool:
        """Whether its items are the bytes of text."""
        return self.dtype.kind == "S"

    @property
    def is_ragged(self) -> bool:
        """Whether it travels as flat items with offsets."""
        return self.column.is_ragged

    @property
    def type_name(self) -> str:
        """What its items are, in words that numpy's users know."""
        return "string" if self.is_text else "bfloat16" if self.column.is_bfloat16 else self.dtype.name

    @property
    def block_rows(self) -> int:
        """Rows that are decoded together."""
        array = self.array
        return array.chunk_shape[0] if array.chunk_shape and array.filters else 1

    @cached_property
    def read_amplification(self) -> float:
        """Bytes read and decoded per byte served, in a shuffled batch whose rows share no chunk."""
        array = self.array.records if self.array.record else self.array
        if array.chunk_shape is None or not array.row_bytes:
            return 1.0
        height, *widths = array.chunk_shape
        samples = array.cells * math.prod(widths) / math.prod(array.sample_shape)
        return samples * (height if array.filters else 1) * array.row_bytes / self.array.row_bytes


@dataclass(frozen=True)
class Dataset:
    """A set of fields that share their rows."""

    name: str
    files: tuple[str, ...]
    """Relative to the data folder."""
    revision: str
    digest_in_full: bool
    rows: int
    fields: tuple[Field, ...]
    attributes: dict[str, Any]
    native: Mapping[str, Sequence[tuple[int, int]]]
    """Runs of rows of each split that is stored."""
    class_names: list[str] | None
    identity: Hashable
    """Of the files; changes with them."""
    notes: tuple[str, ...] = ()

    def field(self, name: str) -> Field:
        """A readable field by name.

        Raises
        ------
        FieldNotFound, UnsupportedField
        """
        for field in self.fields:
            if field.name == name:
                if field.unreadable:
                    raise UnsupportedField(f"field {name!r} of {self.name!r} cannot be served: {field.unreadable}")
                return field
        valid = ", ".join(field.name for field in self.fields if not field.unreadable)
        raise FieldNotFound(f"dataset {self.name!r} has no field {name!r}: valid are {valid}")

    def chosen(self, names: str | Sequence[str] | None) -> tuple[Field, ...]:
        """Fields by a comma-separated, percent-encoded list or by names; None: inputs and labels that are numbers."""
        if names is None:
            readable = [field for field in self.fields if not field.unreadable and not field.is_ragged]
            return tuple(f for f in readable if f.role in ("input", "label")) or tuple(readable)
        if isinstance(names, str):
            names = [unquote(name) for name in names.split(",") if name]
        return tuple({name: self.field(name) for name in names}.values())

    @cached_property
    def block_rows(self) -> int:
        """Rows of the largest field that are decoded together: what a window keeps together, whatever is asked for."""
        readable = [field for field in self.fields if not field.unreadable]
        return max(readable, key=lambda field: field.column.nbytes).block_rows if readable else 1

    @cached_property
    def label(self) -> Field | None:
        """The first readable label field."""
        return next((field for field in self.fields if field.role == "label" and not field.unreadable), None)


def describe_fields(table: Table, roles: Mapping[str, str] | None = None) -> tuple[Field, ...]:
    """The fields of a table, with their roles guessed; `roles` are those that are declared."""
    names = [field.name for field in table.fields]
    dtypes = [field.column.dtype for field in table.fields]
    lists = [field.array.ragged and field.column.dtype.kind != "S" for field in table.fields]
    guessed = [
        guess_list_role(f.name) if is_list else guess_role(f.name, f.column.sample_shape, f.column.dtype)
        for f, is_list in zip(table.fields, lists, strict=True)
    ]
    usable = [
        Role("", "") if field.unreadable or is_list else role
        for field, role, is_list in zip(table.fields, guessed, lists, strict=True)
    ]
    label = only_label(names, usable, dtypes)
    if label is not None:
        guessed[label] = Role("label", "the only field of classes beside the inputs")
    found = []
    for item, role in zip(table.fields, guessed, strict=True):
        if roles and item.name in roles:
            role = Role(roles[item.name], "declared in h5feed.toml")
        problem = item.unreadable or unsupported(item.array.filters)
        if problem is None and item.column.dtype.kind == "S" and item.column.sample_shape:
            problem = "it is text of more than one string a row"
        found.append(
            Field(
                item.name,
                role.role,
                role.reason,
                guess_channels(item.array),
                item.column,
                problem,
                item.note,
            )
        )
    return tuple(found)
