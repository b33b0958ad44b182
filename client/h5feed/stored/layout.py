"""Layouts: where the bytes of an HDF5 file's arrays are, so that they can be read without an HDF5 library.

`inspect` creates a layout in a child process. The cache folder stores it as a safetensors file: the description as JSON
in the metadata, the chunk tables as tensors. The child may have run libhdf5 on a crafted file, so a layout is checked
before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import wire
from .array_file import dump_arrays, load_arrays
from .packing import Packing

LAYOUT_VERSION = 16
"""Raised when layouts written by earlier versions must not be read any more. Part of the name of cached layouts."""

MAX_RECORD_BYTES = 16 << 20
"""Maximum bytes of a record: to read a row of one member, the whole record is read."""

MAX_CELLS = 1 << 16
"""Maximum number of chunks that a row may be divided into: each is looked up and placed separately."""

MAX_CHUNK_BYTES = 1 << 32
"""Decoded chunks must be smaller than this."""

_MAX_BYTES = 1 << 62
"""Positions and sizes must be smaller than this, so that the sum of two fits into an int64."""

Int64s = npt.NDArray[np.int64]
Padding = Literal["nullterm", "spacepad"]


@dataclass(frozen=True)
class Filter:
    """One step of a chunk's filter pipeline."""

    id: int
    name: str
    options: tuple[int, ...]


@dataclass(frozen=True)
class ChunkTable:
    """Positions of the chunks that were written; missing chunks hold the fill value.

    Attributes
    ----------
    numbers : (n,) int64
        Number of each chunk in C order over the grid of chunks, ascending.
    offsets, sizes : (n,) int64
        Position and size of its stored bytes in the file.
    masks : (n,) int64
        Bit i set: filter i of the pipeline was skipped for this chunk.
    """

    numbers: Int64s
    offsets: Int64s
    sizes: Int64s
    masks: Int64s

    def find(self, numbers: Int64s) -> Int64s:
        """Index of each chunk number in this table; -1 for chunks that were never written."""
        if len(self.numbers) == 0:
            return np.full(len(numbers), -1, np.int64)
        if self._is_complete:
            return np.where(numbers < len(self.numbers), numbers, -1)
        nearest = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[nearest] == numbers, nearest, -1)

    def first(self, count: int) -> ChunkTable:
        """The first `count` chunks of the table."""
        return ChunkTable(self.numbers[:count], self.offsets[:count], self.sizes[:count], self.masks[:count])

    @cached_property
    def _is_complete(self) -> bool:
        """Whether the chunks written are the first ones, without a gap: a chunk's number is its index here."""
        return bool(self.numbers[-1] == len(self.numbers) - 1)


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a file.

    Attributes
    ----------
    path : str
        Path in the file, without the leading slash.
    shape : tuple of int
        Whole shape; the first axis is the rows.
    dtype : str
        NumPy type string of the stored dtype, of either byte order.
    stored_bytes : int
        Bytes that the array takes in the file.
    offset : int or None
        Contiguous arrays: where the data begins; None if nothing was written.
    chunk_shape : tuple of int or None
        Chunked arrays: shape of a chunk.
    filters : tuple of Filter
        In the order in which they were applied when writing.
    fill : bytes
        Fill value: one element, or one record, as stored.
    unreadable : str or None
        Why this array cannot be served; None if it can.
    attributes : dict
        Attributes as JSON values.
    enum_names : dict of str to int, or None
        Names of an enum's integers.
    chunks : ChunkTable or None
        Chunked arrays: positions of the chunks.
    inline : bytes or None
        Compact arrays: all elements, as stored.
    record : (int, int) or None
        If the array is one member of a table of records: the bytes of a record, and the offset of the member in it.
        `chunks` and `offset` are those of the table.
    text : tuple of str or None
        The values of a short list of strings.
    external : str or None
        Name of another file in which the data begins at `offset`.
    by_h5py : bool
        The positions of the rows are not known: h5py reads them.
    ragged : bool
        Rows are variable-length lists, and `dtype` is that of the items. Only with `by_h5py`.
    others : tuple of str
        Names of the other files that h5py reads rows from. Only with `by_h5py`.
    is_bfloat16 : bool
        Numbers are bfloat16, which numpy does not have. `dtype` is a 2-byte integer.
    is_bitfield : bool
        Numbers are HDF5 bit fields. PyTables stores bools like this, one byte each.
    scalar : bytes or None
        The value of a scalar, as stored. As an array, a scalar is unreadable because it has no rows.
    padding : str or None
        Padding of fixed-length text. ``nullterm``: the first zero and everything after it; ``spacepad``: trailing
        blanks; None: trailing zeros, as in numpy.
    member : str or None
        The array is this member of a table of records that h5py reads. Only with `by_h5py`.
    packing : Packing or None
        How numbers are packed, according to netCDF's attributes.
    extends : bool
        Chunked arrays: more rows can be added.
    dimensions : tuple of str
        The path of the dimension scale of each axis, empty for axes without one. Empty if no axis has any.
    refers : tuple of str
        References, as MATLAB's cells have: the paths of what they lead to. As an array, references are unreadable.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int = 0
    offset: int | None = None
    chunk_shape: tuple[int, ...] | None = None
    filters: tuple[Filter, ...] = ()
    fill: bytes = b""
    unreadable: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    enum_names: dict[str, int] | None = None
    chunks: ChunkTable | None = None
    inline: bytes | None = None
    record: tuple[int, int] | None = None
    text: tuple[str, ...] | None = None
    external: str | None = None
    by_h5py: bool = False
    ragged: bool = False
    others: tuple[str, ...] = ()
    is_bfloat16: bool = False
    is_bitfield: bool = False
    scalar: bytes | None = None
    padding: Padding | None = None
    member: str | None = None
    packing: Packing | None = None
    extends: bool = False
    dimensions: tuple[str, ...] = ()
    refers: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @cached_property
    def row_bytes(self) -> int:
        """Decoded bytes of a row; of an item if rows are ragged."""
        return math.prod(self.sample_shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def stored_row_bytes(self) -> int:
        """Decoded bytes to read for one row; for a member, the whole record."""
        return self.record[0] if self.record else self.row_bytes

    @cached_property
    def cells(self) -> int:
        """Number of chunks that one row is divided into."""
        if self.chunk_shape is None:
            return 1
        return math.prod(
            -(-e // w) for e, w in zip(self.sample_shape, self.chunk_shape[1:], strict=self.record is None)
        )

    @cached_property
    def records(self) -> ArrayLayout:
        """The table that this array is a member of, as an array of opaque records."""
        assert self.record is not None
        nbytes = self.record[0]
        return replace(self, shape=self.shape[:1], dtype=f"|V{nbytes}", record=None)

    @property
    def table(self) -> str:
        """Path of the HDF5 dataset: the same as `path`, without `member` if there is one."""
        return self.path if self.member is None else self.path[: -len(self.member) - 1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, decoded."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class ExternalLink:
    """A link at `path` in this file to `target` in another file."""

    path: str
    file: str
    target: str


@dataclass(frozen=True)
class FileLayout:
    """The layouts of all arrays of a file.

    Attributes
    ----------
    arrays : tuple of ArrayLayout
    attributes : dict
        Attributes of the root group.
    notes : tuple of str
        What is not listed, and why.
    links : tuple of ExternalLink
    groups : dict of str to dict
        Attributes of groups that say how to interpret the arrays below them, by path.
    """

    arrays: tuple[ArrayLayout, ...]
    attributes: dict[str, Any]
    notes: tuple[str, ...] = ()
    links: tuple[ExternalLink, ...] = ()
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)


def check_array(array: ArrayLayout) -> None:
    """Reject layouts that are inconsistent or cannot be read.

    Raises
    ------
    ValueError
        The message can be used as `ArrayLayout.unreadable`.
    """
    dtype = np.dtype(array.dtype)
    # Where a message has to be formatted, do so only if it is needed: thousands of layouts may be checked.
    if not _travels(dtype):
        raise ValueError(f"its type {dtype} is not supported")
    _demand(_are_counts(array.shape) and len(array.shape) <= 48, "its shape is invalid")
    # Count an axis of length 0 as 1: it must not hide other axes whose product overflows.
    nbytes = math.prod(max(1, extent) for extent in array.shape) * dtype.itemsize
    if nbytes >= _MAX_BYTES:
        raise ValueError(f"its shape {list(array.shape)} is larger than an array can be")
    _demand(_is_count(array.stored_bytes), "its stored size is invalid")
    if array.scalar is not None:
        _demand(array.unreadable is not None and array.shape == (), "it is a scalar with rows")
        _demand(len(array.scalar) == dtype.itemsize, "its value does not have the size of its type")
    ways = (array.offset, array.chunks, array.inline)
    if array.unreadable is not None:
        _demand(
            array.unreadable != "" and ways == (None, None, None) and array.chunk_shape is None,
            "it is unreadable, but has data",
        )
        return
    if array.by_h5py:
        _demand(ways == (None, None, None) and array.chunk_shape is None, "its data is in two places")
        _demand(array.record is None and len(array.shape) > 0, "it has no rows")
        _demand(not array.ragged or len(array.shape) == 1, "it has lists along more than one axis")
        _demand(array.padding is None and not array.is_bfloat16, "h5py does not return such elements")
        return
    _demand(array.member is None, "it is a member for h5py, which does not read it")
    _demand(array.padding is None or dtype.kind == "S", "it is padded, but not text")
    _demand(not array.ragged and array.others == (), "it has lists or other files, but h5py does not read it")
    _demand(array.external is None or array.offset is not None, "its data is in another file at an unknown position")
    _demand(sum(way is not None for way in ways) <= 1, "its data is in two places")
    _demand(len(array.shape) > 0, "it is a scalar: it has no rows")
    element, rank = dtype.itemsize, len(array.shape)
    if array.record is not None:
        element, begin = array.record
        _demand(_are_counts(array.record) and element <= MAX_RECORD_BYTES, f"its records have {element} bytes")
        _demand(0 < array.row_bytes <= element - begin, "it reaches beyond the record that it is a member of")
        _demand(array.rows * element < _MAX_BYTES, f"its {array.rows} records are larger than an array can be")
        rank = 1
    if array.offset is None and array.inline is None:
        _demand(len(array.fill) == element, "its fill value does not have the size of its type")
    if array.offset is not None:
        _demand(_is_count(array.offset) and array.offset < _MAX_BYTES, "its data begins at an invalid position")
    if array.inline is not None:
        _demand(
            len(array.inline) == array.rows * (element if array.record else array.row_bytes), "its data is incomplete"
        )
    _demand((array.chunks is None) == (array.chunk_shape is None), "its chunks or chunk shape are missing")
    if array.chunks is not None and array.chunk_shape is not None:
        _check_chunks(array.chunks, array.chunk_shape, array.shape[:rank], element)
    for item in array.filters:
        _demand(_is_count(item.id) and _are_counts(item.options) and isinstance(item.name, str), "a filter is invalid")


def _check_chunks(chunks: ChunkTable, chunk_shape: tuple[int, ...], shape: tuple[int, ...], element: int) -> None:
    if not _are_counts(chunk_shape) or min(chunk_shape) <= 0:
        raise ValueError(f"its chunk shape {list(chunk_shape)} is invalid")
    if len(chunk_shape) != len(shape):
        raise ValueError(f"its chunks have {len(chunk_shape)} axes, but it has {len(shape)}")
    nbytes = math.prod(chunk_shape) * element
    if nbytes >= MAX_CHUNK_BYTES:
        raise ValueError(f"its chunks of {nbytes} bytes are larger than any that are decoded")
    grid = [-(-extent // width) for extent, width in zip(shape, chunk_shape, strict=True)]
    cells = math.prod(grid[1:])
    if cells > MAX_CELLS:
        raise ValueError(f"each row is cut into {cells} chunks, more than the {MAX_CELLS} that are read")
    columns = (chunks.numbers, chunks.offsets, chunks.sizes, chunks.masks)
    _demand(len({column.shape for column in columns}) == 1 and columns[0].ndim == 1, "its chunk index is incomplete")
    if not len(chunks.numbers):
        return
    _demand(min(int(column.min()) for column in columns) >= 0, "its chunk index has negative numbers")
    _demand(bool((np.diff(chunks.numbers) > 0).all()), "its chunk index names a chunk twice")
    _demand(int(chunks.numbers[-1]) < math.prod(grid), "its chunk index names chunks beyond its shape")
    _demand(max(int(chunks.offsets.max()), int(chunks.sizes.max())) < _MAX_BYTES, "its chunks are at invalid positions")


@lru_cache(maxsize=256)
def _travels(dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "S":
        return dtype.itemsize > 0
    part = np.dtype(f"<f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
    return part.newbyteorder("<").str in wire.DTYPE_NAMES


def _demand(fulfilled: bool, problem: str) -> None:
    if not fulfilled:
        raise ValueError(problem)


def _is_count(value: Any) -> bool:
    # Not isinstance: bool, JSON's true, is a subclass of int.
    return type(value) is int and value >= 0


def _are_counts(values: tuple[Any, ...]) -> bool:
    # Same as `_is_count` for each, which would be called too often.
    return all(type(value) is int and value >= 0 for value in values)


def dump_layout(layout: FileLayout) -> bytes:
    """Serialise a layout."""
    description: list[dict[str, Any]] = []
    # Members of a record, and several names of one array, share a chunk table.
    tables: dict[int, tuple[int, ChunkTable]] = {}
    for array in layout.arrays:
        entry = describe(array)
        if array.chunks is not None:
            entry["chunks"], _ = tables.setdefault(id(array.chunks), (len(tables), array.chunks))
        description.append(entry)
    links = [asdict(link) for link in layout.links]
    about = {"attributes": layout.attributes, "notes": layout.notes, "groups": layout.groups}
    tables_by_name = {f"{number}.{name}": getattr(table, name) for number, table in tables.values() for name in _TABLE}
    return dump_arrays({"arrays": description, "links": links, **about}, tables_by_name)


def describe(array: ArrayLayout) -> dict[str, Any]:
    """An array as JSON values, without its chunk table; `described` reads them."""
    entry = {name: getattr(array, name) for name in _PLAIN}
    entry["filters"] = [asdict(item) for item in array.filters]
    entry["fill"] = array.fill.hex()
    entry["packing"] = None if array.packing is None else asdict(array.packing)
    entry["inline"] = None if array.inline is None else array.inline.hex()
    entry["scalar"] = None if array.scalar is None else array.scalar.hex()
    entry["chunks"] = None
    return entry


def load_layout(data: bytes) -> FileLayout:
    """Deserialise a layout; chunk tables are views of `data`.

    Raises
    ------
    ValueError
        The bytes are not a layout, or the layout is inconsistent.
    """
    try:
        content, columns = load_arrays(data)
        _demand(all(column.dtype == np.int64 for column in columns.values()), "a chunk table is not int64")
        tables: dict[int, ChunkTable] = {}
        arrays = tuple(_array(entry, columns, tables) for entry in content["arrays"])
        notes = tuple(content["notes"])
        links = tuple(ExternalLink(**link) for link in content["links"])
        _demand(isinstance(content["attributes"], dict), "its attributes are invalid")
        groups = content["groups"]
        _demand(isinstance(groups, dict), "its groups are invalid")
        _demand(all(isinstance(about, dict) for about in groups.values()), "its groups are invalid")
        _demand(all(isinstance(note, str) for note in notes), "its notes are invalid")
        words = [word for link in links for word in (link.path, link.file, link.target)]
        _demand(all(isinstance(word, str) and word != "" for word in words), "its links are invalid")
        _demand(len({array.path for array in arrays}) == len(arrays), "a path occurs twice")
        for array in arrays:
            check_array(array)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"this is not a layout: {error}") from None
    return FileLayout(arrays, content["attributes"], notes, links, groups)


def _array(entry: dict[str, Any], columns: Mapping[str, Int64s], tables: dict[int, ChunkTable]) -> ArrayLayout:
    number = entry["chunks"]
    if number is not None and number not in tables:
        tables[number] = ChunkTable(*(columns[f"{number}.{name}"] for name in _TABLE))
    return described(entry, None if number is None else tables[number])


def described(entry: Mapping[str, Any], chunks: ChunkTable | None) -> ArrayLayout:
    """The array that was described by `describe`. Its consistency is not checked: see `check_array`.

    Raises
    ------
    ValueError, ArithmeticError, AttributeError, LookupError, TypeError
        These are not the values of an array.
    """
    array = ArrayLayout(
        **dict(entry)
        | {
            "shape": tuple(entry["shape"]),
            "chunk_shape": None if entry["chunk_shape"] is None else tuple(entry["chunk_shape"]),
            "filters": tuple(Filter(f["id"], f["name"], tuple(f["options"])) for f in entry["filters"]),
            "fill": bytes.fromhex(entry["fill"]),
            "inline": None if entry["inline"] is None else bytes.fromhex(entry["inline"]),
            "scalar": None if entry["scalar"] is None else bytes.fromhex(entry["scalar"]),
            "record": None if entry["record"] is None else (entry["record"][0], entry["record"][1]),
            "text": None if entry["text"] is None else tuple(entry["text"]),
            "others": tuple(entry["others"]),
            "dimensions": tuple(entry["dimensions"]),
            "refers": tuple(entry["refers"]),
            "packing": None if entry["packing"] is None else _packing(entry["packing"]),
            "chunks": chunks,
        }
    )
    names = array.enum_names or {}
    _demand(isinstance(array.path, str) and array.path != "", "an array has no path")
    _demand(array.unreadable is None or isinstance(array.unreadable, str), "a reason is invalid")
    _demand(isinstance(array.attributes, dict), "its attributes are invalid")
    _demand(all(isinstance(value, str) for value in array.text or ()), "its text is invalid")
    _demand(isinstance(array.external or "", str), "its file is invalid")
    _demand(all(isinstance(value, str) for value in array.others), "its files are invalid")
    _demand(all(isinstance(value, str) for value in array.dimensions), "its dimensions are invalid")
    _demand(all(isinstance(value, str) for value in array.refers), "its references are invalid")
    _demand(array.padding in (None, "nullterm", "spacepad"), "its padding is invalid")
    _demand(isinstance(array.member or "", str), "its member is invalid")
    _demand(all(type(value) is int for value in names.values()), "its names are invalid")
    return array


def _packing(entry: dict[str, Any]) -> Packing:
    packing = Packing(**entry | {"missing": tuple(entry["missing"])})
    numbers = (packing.scale or 0.0, packing.offset or 0.0, *packing.missing)
    _demand(all(type(number) in (int, float) for number in numbers), "its packing has values that are not numbers")
    kinds = ("<f2", "<f4", "<f8", "|u1", "<u2", "<u4", "<u8")
    _demand(packing.dtype in kinds and type(packing.unsigned) is bool, "its packing is invalid")
    _demand(isinstance(packing.problem or "", str), "its packing is invalid")
    return packing


_PLAIN = (
    "path",
    "shape",
    "dtype",
    "stored_bytes",
    "offset",
    "chunk_shape",
    "unreadable",
    "attributes",
    "enum_names",
    "record",
    "text",
    "external",
    "by_h5py",
    "ragged",
    "others",
    "is_bfloat16",
    "is_bitfield",
    "padding",
    "member",
    "extends",
    "dimensions",
    "refers",
)
_TABLE = ("numbers", "offsets", "sizes", "masks")
