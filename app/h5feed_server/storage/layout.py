"""Plain data that says where the bytes of an HDF5 file's arrays lie, so that no HDF5 library is needed to read them.

A layout is written by `inspect` in a child process and kept in the cache folder as one safetensors file: the
description as JSON in its metadata, the chunk tables as tensors.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed import wire

LAYOUT_VERSION = 2
"""Changes when a layout written before cannot be read any more; part of the name under which it is cached."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Filter:
    """One step of a chunk's filter pipeline, as HDF5 numbers and names it."""

    id: int
    name: str
    options: tuple[int, ...]


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks lie that have been written; those that are missing hold the fill value.

    Attributes
    ----------
    numbers : (n,) int64
        Number of each chunk in C order over the grid of chunks, ascending.
    offsets, sizes : (n,) int64
        Its stored bytes in the file.
    masks : (n,) int64
        Bit i set: filter i of the pipeline was skipped for this chunk.
    """

    numbers: Int64s
    offsets: Int64s
    sizes: Int64s
    masks: Int64s

    def find(self, numbers: Int64s) -> Int64s:
        """Index into this table of each chunk number; -1 where the chunk was never written."""
        if len(self.numbers) == 0:
            return np.full(len(numbers), -1, np.int64)
        if self._is_complete:
            return numbers
        found = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[found] == numbers, found, -1)

    @cached_property
    def _is_complete(self) -> bool:
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
        numpy's code of the stored dtype, either endianness.
    offset : int or None
        Contiguous arrays: where the data begins; None where nothing was ever written.
    chunk_shape : tuple of int or None
        Chunked arrays.
    filters : tuple of Filter
        In the order in which they were applied when writing.
    fill : bytes
        One element, as stored.
    unreadable : str or None
        Why this array cannot be served, where it cannot.
    attributes, enum_names : dict
        JSON values; names of an enum's integers.
    inline : bytes or None
        All elements, as stored, of a compact array.
    record : (int, int) or None
        The array is one member of a table of records: bytes of a record, and where the member begins in it. Chunks and
        offset are those of the table.
    text : tuple of str or None
        The values of a short list of strings.
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

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row, decoded."""
        return math.prod(self.sample_shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def records(self) -> ArrayLayout:
        """The table that this array is a member of, as an array of opaque records."""
        assert self.record is not None
        nbytes = self.record[0]
        return replace(self, shape=self.shape[:1], dtype=f"|V{nbytes}", fill=bytes(nbytes), record=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, decoded."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class FileLayout:
    """All arrays of a file, with the attributes of its root, and what of it is not listed."""

    arrays: tuple[ArrayLayout, ...]
    attributes: dict[str, Any]
    notes: tuple[str, ...] = ()


def dump_layout(layout: FileLayout) -> bytes:
    """The layout as one safetensors body."""
    description: list[dict[str, Any]] = []
    tensors: dict[str, Int64s] = {}
    for number, array in enumerate(layout.arrays):
        entry = {name: getattr(array, name) for name in _PLAIN}
        entry["filters"] = [asdict(item) for item in array.filters]
        entry["fill"] = array.fill.hex()
        entry["inline"] = None if array.inline is None else array.inline.hex()
        entry["chunked"] = array.chunks is not None
        description.append(entry)
        if array.chunks is not None:
            for name in _TABLE:
                tensors[f"{number}.{name}"] = getattr(array.chunks, name)
    text = json.dumps({"arrays": description, "attributes": layout.attributes, "notes": layout.notes})
    body = wire.Body(
        [wire.Tensor(name, np.dtype("<i8"), values.shape) for name, values in tensors.items()],
        {"layout": text, "batches": "1"},
    )
    buffer = np.empty(body.nbytes, np.uint8)
    for name, view in body.place(buffer, 0).items():
        view[...] = tensors[name]
    return buffer.tobytes()


def load_layout(data: bytes) -> FileLayout:
    """What `dump_layout` wrote; the chunk tables are views of `data`.

    Raises
    ------
    h5feed.errors.BadAnswer
        These bytes are no layout.
    """
    tensors, metadata, _ = wire.read_body(np.frombuffer(data, np.uint8))
    content = json.loads(metadata["layout"])
    arrays = []
    for number, entry in enumerate(content["arrays"]):
        chunks = None
        if entry.pop("chunked"):
            chunks = ChunkTable(*(tensors[f"{number}.{name}"] for name in _TABLE))
        arrays.append(
            ArrayLayout(
                **entry
                | {
                    "shape": tuple(entry["shape"]),
                    "chunk_shape": tuple(entry["chunk_shape"]) if entry["chunk_shape"] else None,
                    "filters": tuple(Filter(f["id"], f["name"], tuple(f["options"])) for f in entry["filters"]),
                    "fill": bytes.fromhex(entry["fill"]),
                    "inline": None if entry["inline"] is None else bytes.fromhex(entry["inline"]),
                    "record": tuple(entry["record"]) if entry["record"] else None,
                    "text": None if entry["text"] is None else tuple(entry["text"]),
                    "chunks": chunks,
                }
            )
        )
    return FileLayout(tuple(arrays), content["attributes"], tuple(content["notes"]))


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
)
_TABLE = ("numbers", "offsets", "sizes", "masks")
