"""A dataset: fields that share their first axis, and how to read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
from h5feed.errors import FieldNotFound, UnsupportedField

from ..storage.codecs import unsupported
from ..storage.layout import ArrayLayout, FileLayout
from ..storage.reader import wire_array
from ..storage.source import LocalFile
from .roles import class_names, guess_channels, guess_role


@dataclass(frozen=True)
class Field:
    """One array of a dataset."""

    name: str
    role: str
    role_reason: str
    channels: str | None
    array: ArrayLayout
    dtype: np.dtype[Any]
    """Dtype on the wire."""
    sample_shape: tuple[int, ...]
    """Shape of one sample on the wire."""
    unreadable: str | None
    """Why it is not served, where it is not."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.sample_shape) * self.dtype.itemsize

    @cached_property
    def read_amplification(self) -> float:
        """Bytes read and decoded per byte served, in a shuffled batch whose rows share no chunk."""
        array = self.array
        if array.chunk_shape is None or not self.row_bytes:
            return 1.0
        height, *widths = array.chunk_shape
        cells = math.prod(-(-e // w) for e, w in zip(array.sample_shape, widths, strict=True))
        samples = cells * math.prod(widths) / math.prod(array.sample_shape)
        return samples * (height if array.filters else 1)


@dataclass(frozen=True)
class Dataset:
    """A set of fields that share their rows, from one file."""

    name: str
    file: str
    """Relative to the data folder."""
    revision: str
    digest_in_full: bool
    rows: int
    fields: tuple[Field, ...]
    attributes: dict[str, Any]
    source: LocalFile

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
        """Fields by a comma-separated, percent-encoded list or by names; None: inputs and labels."""
        if names is None:
            readable = [field for field in self.fields if not field.unreadable]
            return tuple(f for f in readable if f.role in ("input", "label")) or tuple(readable)
        if isinstance(names, str):
            names = [unquote(name) for name in names.split(",") if name]
        return tuple({name: self.field(name) for name in names}.values())

    @cached_property
    def label(self) -> Field | None:
        """The first readable label field."""
        return next((field for field in self.fields if field.role == "label" and not field.unreadable), None)

    @cached_property
    def class_names(self) -> list[str] | None:
        return class_names(self.label.array) if self.label else None


def describe_fields(layout: FileLayout) -> tuple[int, tuple[Field, ...]]:
    """The rows and fields that a file's root-level arrays make.

    Arrays of another length than the rest are listed as unreadable: the dataset's rows are those of most bytes,
    counting only lengths that most arrays of the file share.
    """
    readable = [array for array in layout.arrays if not _problem(array)]
    weights: Counter[int] = Counter()
    for array in readable:
        weights[array.rows] += array.nbytes
    rows = max(weights, key=lambda n: (weights[n], n), default=0)
    fields = []
    for array in layout.arrays:
        problem = _problem(array)
        if problem is None and array.rows != rows:
            problem = f"it has {array.rows} rows, where the dataset has {rows}"
        role = guess_role(array)
        dtype, sample_shape = wire_array(array)
        fields.append(
            Field(
                # The path of a root-level array is its name; a dot stands for the slash of deeper ones.
                array.path.replace("/", "."),
                role.role,
                role.reason,
                guess_channels(array),
                array,
                dtype,
                sample_shape,
                problem,
            )
        )
    return rows, tuple(fields)


def _problem(array: ArrayLayout) -> str | None:
    return array.unreadable or unsupported(array.filters)
