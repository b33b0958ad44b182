"""A dataset: fields that share their first axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from h5feed.crops import RowShape, spatial_axes
from h5feed.errors import BadParameter, RowOutOfRange, UnsupportedField
from h5feed.images import ImageSpec
from h5feed.stored.codecs import unsupported
from h5feed.stored.column import About, Column, Segment
from h5feed.stored.layout import ArrayLayout
from h5feed.suggestions import no_field
from h5feed.wire import DATA, INDICES, INDPTR, OFFSETS, ROWS, WEIGHT

from ..storage.transposed.copy_file import TransposedFile
from .encoded import spec_of
from .grouping.pieces import Table, TableField
from .names import Names
from .roles import ROLES, Traits, class_names, guess_channels, guess_roles, own_class_names
from .split_record import SplitRecord

if TYPE_CHECKING:
    from .growing import Growth


@dataclass(frozen=True)
class Field:
    """One field of a dataset."""

    name: str
    role: str
    role_reason: str
    channels: str | None
    column: Column
    """Where its rows are stored."""
    unreadable: str | None
    """Why it cannot be served; None if it can."""
    note: str | None = None
    class_names: tuple[str, ...] | None = None
    """Names of the classes that its numbers stand for."""
    offsets: str | None = None
    """Name of the tensor of its offsets, if that is not its own name and `OFFSETS`."""

    @property
    def array(self) -> ArrayLayout:
        """The first array of the field."""
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
    def row_shape(self) -> RowShape:
        """Shape of a row, and how many of its axes can be cropped."""
        if self.is_ragged:
            return RowShape((), 0)
        is_complex = self.images is None and np.dtype(self.array.dtype).kind == "c"
        axes = spatial_axes(self.sample_shape, has_channels=self.channels is not None, is_complex=is_complex)
        return RowShape(self.sample_shape, axes)

    @property
    def is_text(self) -> bool:
        """Whether its items are bytes of text."""
        return self.dtype.kind == "S"

    @property
    def is_ragged(self) -> bool:
        """Whether it is sent as flat items with offsets."""
        return self.column.is_ragged

    @property
    def is_sparse(self) -> bool:
        """Whether its rows are sparse. They are sent as two ragged fields, see `parts`."""
        return self.column.indices is not None

    @property
    def offsets_name(self) -> str:
        """Name of the tensor with its offsets, if it is ragged."""
        return self.offsets or self.name + OFFSETS

    @property
    def whole_name(self) -> str:
        """Name of the field that it is a part of, or its own: see `parts`."""
        return self.name if self.offsets is None else self.offsets.removesuffix(INDPTR)

    @cached_property
    def parts(self) -> tuple[Field, ...]:
        """The fields that are sent for it: itself, or values and column indices with the same offsets."""
        indices = self.column.indices
        if indices is None:
            return (self,)
        offsets = self.name + INDPTR
        return (
            replace(self, name=self.name + DATA, column=self.column.stored_values, offsets=offsets),
            replace(self, name=self.name + INDICES, column=indices, offsets=offsets),
        )

    @property
    def type_name(self) -> str:
        """Name of the item type: NumPy's name, ``string`` or ``bfloat16``."""
        return "string" if self.is_text else "bfloat16" if self.column.is_bfloat16 else self.dtype.name

    @property
    def images(self) -> ImageSpec | None:
        """How its rows are decoded, if they are image files."""
        return self.column.images

    @cached_property
    def encoded(self) -> Field:
        """The same field with images left undecoded."""
        return replace(self, column=self.column.encoded)

    @property
    def block_rows(self) -> int:
        """Number of rows that are decoded together; about that of sparse rows."""
        array = self.array
        if self.is_sparse:
            values = sum(segment.array.rows for segment in self.column.segments)
            in_chunk = array.chunk_shape[0] if array.chunk_shape and array.filters else 0
            return max(1, in_chunk * self.column.rows // max(1, values))
        # A chunk of a list field holds items, not a fixed number of rows.
        segment = self.column.segments[0]
        in_chunks = array.chunk_shape and array.filters and segment.offsets is None
        return array.chunk_shape[segment.axis] if in_chunks and array.chunk_shape else 1

    @cached_property
    def read_amplification(self) -> float:
        """Bytes read and decoded for each byte served, in a shuffled batch where no two rows share a chunk."""
        array = self.array.records if self.array.record else self.array
        if array.chunk_shape is None or not array.row_bytes:
            return 1.0
        if self.column.segments[0].offsets is not None:
            # Of unfiltered chunks, only the items are read.
            chunk_bytes = array.chunk_shape[0] * array.row_bytes if array.filters else 0
            return max(1.0, chunk_bytes * self.column.rows / max(1, self.column.stored_nbytes))
        axis = self.column.segments[0].axis
        if axis:
            # As a single row, of which each row is a part of length 1 along the axis.
            shape = self.column.segments[0].row_lengths
            cells = math.prod(-(-extent // width) for extent, width in zip(shape, array.chunk_shape, strict=True))
            return cells * math.prod(array.chunk_shape) / math.prod(shape)
        height, *widths = array.chunk_shape
        samples = array.cells * math.prod(widths) / math.prod(array.sample_shape)
        return samples * (height if array.filters else 1) * array.row_bytes / self.array.row_bytes


@dataclass(frozen=True)
class Dataset:
    """Fields with the same number of rows."""

    name: str
    files: tuple[str, ...]
    """Relative to the data folder."""
    revision: str
    """What it is called here: one of `names`, or a provisional name that it had before."""
    names: Names
    digest_in_full: bool
    rows: int
    fields: tuple[Field, ...]
    attributes: dict[str, Any]
    native: Mapping[str, Sequence[tuple[int, int]]]
    """Ranges of rows of each stored split: first row, and the row after the last."""
    class_names: list[str] | None
    identity: Hashable
    """Identifies the state of the files."""
    notes: tuple[str, ...] = ()
    split_record: SplitRecord | None = None
    """How the stored splits were drawn, if the files have a record of it."""
    card: Mapping[str, str] = dataclass_field(default_factory=dict)
    """Title, description, licence and source, as far as they are known."""
    has_named_pieces: bool = False
    """Whether its rows are in groups with the same members, one after the other."""
    growth: Growth | None = dataclass_field(default=None, compare=False, repr=False)
    """Its other revisions, if it is the current state of a growing dataset."""
    variants: dict[str, Dataset] = dataclass_field(default_factory=dict, compare=False, repr=False)
    """The same dataset under other names, which share this dictionary."""

    def called(self, revision: str) -> Dataset:
        """The same dataset under another name."""
        if revision == self.revision:
            return self
        # There are only as many as the dataset has names.
        found = self.variants.get(revision)
        return self.variants.setdefault(revision, replace(self, revision=revision)) if found is None else found

    @property
    def now(self) -> Dataset:
        """The same dataset under its name by content, if that is known."""
        return self if self.revision == self.names.content else self.called(self.names.current)

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """First row of each piece that the dataset is made of, and the number of rows, (pieces + 1,) int64.

        Pieces that are one row each, such as files of one image, count as one piece.
        """
        whole = np.array([0, self.rows], np.int64)
        readable = [field.column for field in self.fields if not field.unreadable]
        if not readable:
            return whole
        # Single values and names are stored as one segment for all pieces.
        bounds = max((column.bounds for column in readable), key=len)
        return whole if len(bounds) == self.rows + 1 else bounds

    @property
    def has_episodes(self) -> bool:
        """Whether its pieces are episodes: groups with the same members, such as the demonstrations of a robot."""
        return self.has_named_pieces and len(self.bounds) > 2

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of the arrays of all readable fields in their files, as they are stored there."""
        arrays = {}
        for field in self.fields:
            parts = () if field.unreadable else field.parts
            for segment in (segment for part in parts for segment in part.column.segments):
                array, path = segment.array, segment.array.path
                # The members of records are in one array, and have its size each.
                is_member = array.record is not None or array.member is not None
                arrays[segment.file.path, path.rpartition(".")[0] if is_member else path] = array.stored_bytes
        return sum(arrays.values())

    @cached_property
    def copies(self) -> tuple[str, ...]:
        """Names of the copies by rows that its fields are read from. They may change when files that had just been
        written are inspected again, although these are the same."""
        sources = (
            segment.source
            for field in self.fields
            if field.column.indices is not None
            for segment in field.column.segments
        )
        return tuple(source.name for source in sources if isinstance(source, TransposedFile))

    def check_rows(self, rows: Sequence[int]) -> None:
        """Raise an error for rows that do not exist.

        Raises
        ------
        RowOutOfRange
        """
        for row in rows:
            if not 0 <= row < self.rows:
                raise RowOutOfRange(f"row {row} is out of range for {self.rows} rows (valid: 0 to {self.rows - 1})")

    def field(self, name: str) -> Field:
        """A readable field by name.

        Raises
        ------
        FieldNotFound, UnsupportedField
        """
        field = self._by_name.get(name)
        if field is None:
            valid = [field.name for field in self.fields if not field.unreadable]
            raise no_field(name, valid, f"dataset {self.name!r} has no field")
        if field.unreadable:
            raise UnsupportedField(f"field {name!r} of {self.name!r} cannot be served: {field.unreadable}")
        return field

    @cached_property
    def _by_name(self) -> Mapping[str, Field]:
        return {field.name: field for field in reversed(self.fields)}

    def chosen(
        self, names: str | Sequence[str] | None, encoded: str | Sequence[str] | None = None
    ) -> tuple[Field, ...]:
        """Fields from comma-separated, percent-encoded lists, or by name.

        Parameters
        ----------
        names : str or sequence of str, optional
            Default: inputs and labels that are numbers.
        encoded : str or sequence of str, optional
            Those to leave undecoded: their rows are the bytes of image files.

        Raises
        ------
        FieldNotFound, UnsupportedField
        BadParameter
            A field of `encoded` does not hold image files, or is not among the chosen fields.
        """
        if names is None:
            readable = [f for f in self.fields if not f.unreadable and (f.is_sparse or not f.is_ragged)]
            fields = tuple(f for f in readable if f.role in ("input", "label")) or tuple(readable)
        else:
            fields = tuple({name: self.field(name) for name in names_in(names)}.values())
        stored, names_of_all = names_in(encoded or ()), {field.name for field in fields}
        for name in stored:
            if self.field(name).images is None:
                raise BadParameter(f"encoded={name}: rows of {name!r} are not stored as the bytes of image files")
            if name not in names_of_all:
                raise BadParameter(f"encoded={name}: this field is not among the requested ones")
        as_stored = set(stored)
        return tuple(field.encoded if field.name in as_stored else field for field in fields)

    @cached_property
    def block_rows(self) -> int:
        """`Field.block_rows` of the largest field. A window keeps so many rows together, for any choice of fields."""
        readable = [field for field in self.fields if not field.unreadable]
        return max(readable, key=lambda field: field.column.nbytes).block_rows if readable else 1

    @cached_property
    def label(self) -> Field | None:
        """The first readable label field."""
        return next((field for field in self.fields if field.role == "label" and not field.unreadable), None)


def state_of(dataset: Dataset) -> dict[str, Any]:
    """What a job stores to find a dataset again in the same state."""
    return {"dataset": dataset.name, "revision": dataset.names.current}


def names_in(names: str | Sequence[str]) -> Sequence[str]:
    """Field names, from a comma-separated, percent-encoded list, or as they are."""
    return [unquote(name) for name in names.split(",") if name] if isinstance(names, str) else names


def _names_of(segment: Segment) -> Hashable:
    """Class names that are stored with one segment of a column."""
    if segment.about is not None and segment.about.class_names is not None:
        return segment.about.class_names
    return tuple(sorted((segment.array.enum_names or {}).items()))


def _agree_in_names(field: TableField, table: Table) -> bool:
    """Whether all segments of a label have the same class names. Text labels need no names."""
    if field.column.dtype.kind == "S":
        return True
    segments = field.column.segments
    if table.names_differ:
        return False
    if len(segments) * len(table.text) > _MOST_LOOKUPS:
        return len(set(table.text.values())) == 1
    return len({tuple(class_names(segment.array, table.text) or ()) for segment in segments}) == 1


_MOST_LOOKUPS = 2_000_000
"""Maximum of segments × lists of text for which the names of each segment are looked up."""

_COLOURS = {"rgb": "rgb", "rgba": "rgb", "bgr": "bgr", "grey": "grey"}


def describe_fields(
    table: Table,
    roles: Mapping[str, str] | None = None,
    decode: Mapping[str, ImageSpec] | None = None,
    holds_classes: Callable[[Column], bool] = lambda column: True,
) -> tuple[Field, ...]:
    """Return the fields of a table, with guessed roles.

    Parameters
    ----------
    table : Table
    roles : mapping of str to str, optional
        Declared roles, by field.
    decode : mapping of str to ImageSpec, optional
        Declared decoding, by field.
    holds_classes : callable, optional
        Returns whether the values of a column may be classes. Called if nothing else identifies the label.
    """
    declared = roles or {}
    fields = [_decoded(field, (decode or {}).get(field.name)) for field in table.fields]
    lists = {field.name for field in fields if not field.unreadable and field.column.encoded.is_ragged}
    sparse = {field.name for field in fields if not field.unreadable and field.column.indices is not None}
    problems = [_problem(field) or _unaskable(field.name, lists, sparse) for field in fields]
    guessed = guess_roles(
        [_traits(field, problem, declared.get(field.name)) for field, problem in zip(fields, problems, strict=True)],
        lambda number: holds_classes(fields[number].column),
    )
    described = []
    for item, problem, role in zip(fields, problems, guessed, strict=True):
        about = item.column.segments[0].about
        names: Sequence[str] | None = about.class_names if about else None
        note = "; ".join(filter(None, (_noted(item.column), item.note))) or None
        if names is None and role.role == "label":
            names = class_names(item.array, table.text)
            if problem is None and not _agree_in_names(item, table):
                problem = "the same number stands for different classes in some of its pieces"
            if names is None and item.array.enum_names:
                note = "its enum skips numbers, so it does not give class names"
        elif names is None and _may_be_class(item.column):
            told = {tuple(own_class_names(segment.array) or ()) for segment in item.column.segments}
            if len(told) > 1:
                differ = "its class names are not used: they differ between some of its pieces"
                note = f"{note}; {differ}" if note else differ
            else:
                names = told.pop()
        described.append(
            Field(
                item.name,
                role.role,
                role.reason,
                _COLOURS[item.column.images.colour] if item.column.images else _channels(item.column.segments[0]),
                item.column,
                problem,
                note,
                tuple(names) if names else None,
            )
        )
    return tuple(described)


def _may_be_class(column: Column) -> bool:
    """Whether it has one integer per row."""
    return column.dtype.kind in "iu" and not column.has_lists and math.prod(column.sample_shape) == 1


def _noted(column: Column) -> str | None:
    """The note that comes with a column, from the program that wrote it."""
    notes = [segment.about.note if segment.about else None for segment in column.segments]
    if notes[0] is None or len(set(notes)) == 1:
        return notes[0]
    return f"in its first piece, {notes[0]}"


def _traits(field: TableField, problem: str | None, declared: str | None) -> Traits:
    column = field.column
    has_lists = column.has_lists and column.dtype.kind != "S" and column.indices is None
    about = column.segments[0].about or About()
    said = {_said_role(segment.array) for segment in column.segments}
    if declared is not None:
        about = replace(about, role=declared, reason="declared in h5feed.toml")
    elif field.role is not None:
        about = replace(about, role=field.role.role, reason=field.role.reason)
    elif len(said) == 1 and (role := said.pop()) in ROLES:
        about = replace(about, role=role, reason="its attribute 'role' says so")
    return Traits(field.name, column.sample_shape, column.dtype, has_lists, problem is None, about)


def _said_role(array: ArrayLayout) -> str:
    """The value of the attribute ``role``, which may be an array of one element."""
    said = array.attributes.get("role")
    return str(said[0] if isinstance(said, list) and len(said) == 1 else said)


def _channels(segment: Segment) -> str | None:
    """`guess_channels` of an array whose rows may be along any axis."""
    array = segment.array
    if segment.transposed:
        array = replace(array, shape=(segment.rows, *segment.wire[1]))
    return guess_channels(array)


def _problem(field: TableField) -> str | None:
    """Why a field cannot be served; None if it can."""
    problem = field.unreadable or (None if field.array.by_h5py else unsupported(field.array.filters))
    named = {_names_of(segment) for segment in field.column.segments}
    if problem is None and len(named) > 1:
        problem = "the same number stands for different classes in some of its pieces"
    if problem is None and len({*map(_channels, field.column.segments)}) > 1:
        problem = "the channels of its pieces are in different orders"
    if problem is None and field.column.dtype.kind == "S" and field.column.sample_shape:
        problem = "it has more than one string per row"
    return problem


def _unaskable(name: str, lists: Collection[str], sparse: Collection[str]) -> str | None:
    """Why a field of this name cannot be in a batch, whose own arrays have reserved names; None if it can."""
    for suffix in (DATA, INDICES, INDPTR):
        if name.endswith(suffix) and name.removesuffix(suffix) in sparse:
            matrix = name.removesuffix(suffix)
            return f"batches use this name for a part of {matrix!r}: give it another one with 'fields' in h5feed.toml"
    flat = name.removesuffix(OFFSETS)
    if name not in (ROWS, WEIGHT) and not (flat != name and flat in lists):
        return None
    meant = f"the offsets of {flat!r}" if flat != name else "row numbers" if name == ROWS else "weights"
    return f"batches use this name for {meant}: give it another one with 'fields' in h5feed.toml"


def _decoded(field: TableField, declared: ImageSpec | None) -> TableField:
    """The field, decoded to images if it holds image files and their shape is known."""
    if field.unreadable:
        return field
    column = field.column
    holds_bytes = column.has_lists and column.dtype == np.uint8
    if declared is not None and not holds_bytes:
        return replace(field, unreadable="h5feed.toml declares that it is decoded, but its rows are not lists of bytes")
    if not holds_bytes:
        return field
    try:
        specs = {declared or spec_of(segment.array.attributes) for segment in column.segments}
    except BadParameter as error:
        return replace(field, unreadable=error.detail)
    if len(specs) > 1:
        return replace(field, unreadable="its pieces have different attributes for decoding images")
    return replace(field, column=replace(column, images=specs.pop()))
