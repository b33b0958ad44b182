"""Response bodies that describe where the rows of a field are stored, instead of containing the rows.

A piece is a range of stored bytes: rows of a contiguous array, or a chunk as it is compressed. A field is described by
its layout, reduced to the pieces that hold the requested rows. The stored bytes follow in the same body, or are read
from the file by a client that holds a descriptor of it. Both sides decode with `array_reader`.

Tensors of such a body, in addition to those of an ordinary one:

``__pieces__/K``
    (4, n) int64: number, offset, stored size and filter mask of each chunk, ascending by number, of segment K.
``__pieces__/K/rows``
    (rows,) int64: rows of field K among the segments described, if it has several. Otherwise these are the row ids.
``__pieces__/bytes``
    (n,) uint8: stored bytes. Offsets refer to them, unless the segment names a file.

The metadata ``pieces`` is JSON, see `dump_pieces`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .column import Column, Segment
from .layout import ArrayLayout, ChunkTable, check_array, describe, described
from .local_file import Identity
from .source import Source

PREFIX = "__pieces__"
"""Reserved prefix of tensor names: a field of such a body may not have a name that begins with it."""

BYTES = f"{PREFIX}/bytes"

MAX_CHUNK_BYTES = 256 << 20
"""Larger chunks are not sent as pieces, because the client needs memory to decode one, and often several at once."""

CHUNK_CACHE_BYTES = 64 << 20
"""Size of the cache of decoded chunks in a client process, in bytes."""

Int64s = npt.NDArray[np.int64]


class NamedFile(NamedTuple):
    """A file that pieces are in.

    Attributes
    ----------
    name : str
        The server's name for it, relative to its data folder.
    identity : Identity
        Its state when it was inspected.
    """

    name: str
    identity: Identity


@dataclass(frozen=True)
class FieldPieces:
    """Where the rows of one field are stored.

    Attributes
    ----------
    segments : sequence of (Segment, int or None)
        Those that hold any of the rows, and the number of their file; None: the bytes are in the body. The chunk tables
        of their arrays contain only the chunks to be read.
    rows : (n,) int64 or None
        The rows, counted over these segments; None: there is one segment, and they are the row ids. If samples have
        several rows, those of a sample follow each other.
    """

    segments: Sequence[tuple[Segment, int | None]]
    rows: Int64s | None


@dataclass(frozen=True)
class Pieces:
    """The pieces of a body.

    Attributes
    ----------
    fields : mapping of str to FieldPieces
        Fields that come as pieces. All others are tensors of the body.
    files : sequence of NamedFile
    reasons : mapping of str to str
        Why the other fields do not come as pieces.
    """

    fields: Mapping[str, FieldPieces]
    files: Sequence[NamedFile]
    reasons: Mapping[str, str]


def dump_pieces(pieces: Pieces) -> tuple[str, dict[str, Int64s]]:
    """The metadata ``pieces`` as JSON, and the tensors that it refers to."""
    tensors: dict[str, Int64s] = {}
    fields: dict[str, Any] = {}
    number = 0
    for place, (name, field) in enumerate(pieces.fields.items()):
        entries = []
        for segment, file in field.segments:
            array = segment.array
            entry: dict[str, Any] = {"array": _without_defaults(array)}
            if file is not None:
                entry["file"] = file
            if segment.served_as is not None:
                entry["served_as"] = segment.served_as
            if array.chunks is not None:
                entry["chunks"] = number
                chunks = array.chunks
                tensors[f"{PREFIX}/{number}"] = np.stack([chunks.numbers, chunks.offsets, chunks.sizes, chunks.masks])
                number += 1
            entries.append(entry)
        fields[name] = {"segments": entries}
        if field.rows is not None:
            fields[name]["rows"] = place
            tensors[f"{PREFIX}/{place}/rows"] = field.rows
    files = [[file.name, *file.identity] for file in pieces.files]
    return json.dumps({"fields": fields, "files": files, "reasons": dict(pieces.reasons)}), tensors


def load_pieces(
    content: Any, tensors: Mapping[str, npt.NDArray[Any]], source_of: Callable[[NamedFile | None], Source]
) -> tuple[dict[str, tuple[Column, Int64s | None]], dict[str, str]]:
    """The columns to read the fields from, and the reasons why others are not among them.

    Parameters
    ----------
    content : JSON value
        The metadata ``pieces``.
    tensors : mapping of str to array
        Of the body.
    source_of : callable
        Returns what to read the pieces of a file from; for None, the bytes of the body.

    Returns
    -------
    columns : dict of str to (Column, (n,) int64 or None)
        The column of each field, and its rows; None: the row ids.
    reasons : dict of str to str

    Raises
    ------
    ValueError
        The description is inconsistent, or would need too much memory.
    """
    try:
        files = [NamedFile(name, Identity(*map(int, identity))) for name, *identity in content["files"]]
        reasons = {str(name): str(reason) for name, reason in content["reasons"].items()}
        columns = {}
        for name, field in content["fields"].items():
            segments = tuple(_segment(entry, tensors, files, source_of) for entry in field["segments"])
            rows = tensors[f"{PREFIX}/{int(field['rows'])}/rows"] if "rows" in field else None
            if not segments or (rows is None and len(segments) > 1):
                raise ValueError(f"{name!r} does not say where its rows are")
            if rows is not None and (rows.dtype != np.int64 or rows.ndim != 1):
                raise ValueError(f"the rows of {name!r} are not a list of numbers")
            columns[str(name)] = Column(segments), rows
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"the description is incomplete: {error!r}") from None
    return columns, reasons


def chunk_bytes(array: ArrayLayout) -> int:
    """Decoded bytes of a chunk; 0 if the array has none."""
    if array.chunk_shape is None:
        return 0
    itemsize = array.record[0] if array.record else np.dtype(array.dtype).itemsize
    return math.prod(array.chunk_shape) * itemsize


def _segment(
    entry: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    files: Sequence[NamedFile],
    source_of: Callable[[NamedFile | None], Source],
) -> Segment:
    chunks = None
    if "chunks" in entry:
        table = tensors[f"{PREFIX}/{int(entry['chunks'])}"]
        if table.dtype != np.int64 or table.ndim != 2 or len(table) != 4:
            raise ValueError("a chunk table does not have the columns of one")
        chunks = ChunkTable(*table)
    array = described({**_DEFAULTS, **entry["array"]}, chunks)
    check_array(array)
    if array.unreadable is not None or array.by_h5py or array.inline is not None or array.ragged:
        raise ValueError(f"{array.path!r} is not stored in pieces")
    if chunk_bytes(array) > MAX_CHUNK_BYTES:
        raise ValueError(f"the chunks of {array.path!r} have {chunk_bytes(array)} bytes, more than {MAX_CHUNK_BYTES}")
    file = entry.get("file")
    if file is not None and not 0 <= int(file) < len(files):
        raise ValueError("a piece is in a file that is not named")
    served_as = entry.get("served_as")
    if served_as is not None:
        np.dtype(served_as)
    return Segment(source_of(None if file is None else files[int(file)]), array, served_as=served_as)


_DEFAULTS = describe(ArrayLayout("x", (), ""))


def _without_defaults(array: ArrayLayout) -> dict[str, Any]:
    entry = {name: value for name, value in describe(array).items() if value != _DEFAULTS[name]}
    return {"path": array.path, **entry}
