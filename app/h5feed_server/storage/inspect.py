"""Walks HDF5 files with h5py and writes down their layouts. Runs as a child process only: a crafted file can crash,
hang or bloat libhdf5, and must take nothing else with it.

Protocol: each line on standard input is a path as JSON; each answer on standard output is a frame of an 8-byte
little-endian length, a kind byte (``L`` layout, ``E`` error text) and the content. `inspector` is the other end.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5s, h5t, h5z

from .layout import ArrayLayout, ChunkTable, FileLayout, Filter, dump_layout

MAX_ARRAYS = 10_000
MAX_OBJECTS = 200_000
MAX_DEPTH = 32
"""Bounds on the walk through one file; what lies beyond them is not listed, and the layout says so."""

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1 << 16
"""Bounds on what of an object's attributes goes into the catalogue."""

MAX_TEXT_BYTES = 1 << 12

MAX_INLINE_BYTES = 1 << 16
"""Compact arrays, and text that may be names of classes, are kept in the layout up to this size."""

_ATTRIBUTE_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM)
"""Attribute types that are read. Others are named only: libhdf5 crashes on some damaged ones."""

_NUMBER_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
"""Types whose fill value is asked for: libhdf5 crashes on damaged ones of other classes."""


def inspect_file(path: str) -> FileLayout:
    """The layout of the arrays in the file at `path`."""
    # No lock is taken: the file may lie on a read-only or network mount, and is only read.
    with h5py.File(path, "r", locking=False) as file:
        arrays, notes = _walk(file)
        return FileLayout(tuple(arrays), _attributes(file), tuple(notes))


def _walk(file: h5py.File) -> tuple[list[ArrayLayout], list[str]]:
    """All arrays, by path, level after level; each group once, whatever links lead to it."""
    arrays: list[ArrayLayout] = []
    notes: list[str] = []
    level: list[tuple[str, h5py.Group]] = [("", file)]
    seen = {_address(file)}
    objects = 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, h5py.Group]] = []
        for prefix, group in level:
            for name in group:
                objects += 1
                if objects > MAX_OBJECTS or len(arrays) >= MAX_ARRAYS:
                    return arrays, [*notes, f"only its first {len(arrays)} arrays are listed"]
                path = f"{prefix}/{name}" if prefix else name
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    arrays.append(ArrayLayout(path, (), "|u1", unreadable="it is a link into another file"))
                    continue
                try:
                    item = group[name]
                    if isinstance(item, h5py.Dataset):
                        arrays.extend(_arrays(path, item))
                    # Groups are reached by hard links: soft ones lead to what is listed elsewhere.
                    elif isinstance(item, h5py.Group) and isinstance(link, h5py.HardLink):
                        below.append((path, item))
                except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
                    reason = f"it cannot be opened: {error}"
                    if isinstance(link, h5py.SoftLink):
                        reason = "it is a link that leads nowhere"
                    arrays.append(ArrayLayout(path, (), "|u1", unreadable=reason))
        level = [(path, group) for path, group in below if _is_new(group, seen)]
        if not level:
            return arrays, notes
    return arrays, [*notes, f"groups more than {MAX_DEPTH} deep are not listed"]


def _is_new(group: h5py.Group, seen: set[tuple[int, int]]) -> bool:
    before = len(seen)
    seen.add(_address(group))
    return len(seen) > before


def _address(group: h5py.Group) -> tuple[int, int]:
    info = h5py.h5o.get_info(group.id)
    return info.fileno, info.addr


def _arrays(path: str, dataset: h5py.Dataset) -> list[ArrayLayout]:
    """The array at `path`; of a table of records, one for each member."""
    shape = tuple(dataset.shape or ())
    known: dict[str, Any] = {"path": path, "shape": shape, "dtype": "|u1", "attributes": _attributes(dataset)}
    if dataset.shape is None:
        return [ArrayLayout(**known, unreadable="it has no shape (a null dataspace)")]
    stored = dataset.id.get_type()
    if _is_table(stored):
        members, problem = _members(stored)
    else:
        dtype, enum_names, problem = _dtype(stored)
        members = [] if dtype is None else [Member("", dtype, (), 0, enum_names)]
    text = _text(dataset, stored)
    if problem is not None:
        return [ArrayLayout(**known, text=text, unreadable=problem)]
    known |= {"stored_bytes": dataset.id.get_storage_size(), "text": text}
    if not shape:
        return [ArrayLayout(**known, unreadable="it is a scalar: it has no rows")]
    properties = dataset.id.get_create_plist()
    kind = properties.get_layout()
    if properties.get_external_count():
        return [ArrayLayout(**known, unreadable="its data lies in an external file")]
    record = stored.get_size()
    fill = _fill(dataset, stored, record)
    if kind == h5d.CONTIGUOUS:
        # Without storage the offset means nothing: every element is the fill value.
        known["offset"] = dataset.id.get_offset() if known["stored_bytes"] else None
    elif kind == h5d.CHUNKED:
        known["chunk_shape"] = dataset.chunks
        known["filters"] = tuple(_filter(properties.get_filter(i)) for i in range(properties.get_nfilters()))
        known["chunks"] = _chunks(dataset)
    elif kind == h5d.COMPACT:
        known["inline"] = _raw(dataset, stored)
    else:
        what = "virtual: its data lies in other arrays" if kind == h5d.VIRTUAL else f"of layout class {kind}"
        return [ArrayLayout(**known, unreadable=f"it is {what}, which this version does not read")]
    found = []
    for member in members:
        inside = slice(member.offset, member.offset + member.dtype.itemsize * math.prod(member.shape))
        own: dict[str, Any] = {"dtype": member.dtype.str, "enum_names": member.enum_names, "fill": fill[inside]}
        if member.name:
            name = member.name.replace("/", ".")
            own |= {
                "path": f"{path}.{name}",
                "shape": (*shape, *member.shape),
                "record": (record, inside.start),
            }
        found.append(ArrayLayout(**known | own))
    return found


def _dtype(stored: h5t.TypeID) -> tuple[np.dtype[Any] | None, dict[str, int] | None, str | None]:
    """The stored dtype, an enum's names, and the reason where it is none that travels."""
    dtype = stored.dtype
    enum_names = None
    if h5py.check_string_dtype(dtype):
        if not stored.is_variable_str() and 0 < dtype.itemsize <= MAX_TEXT_BYTES:
            return np.dtype(f"S{dtype.itemsize}"), None, None
        return None, None, "its type string of variable length is not one that this version serves"
    if stored.get_class() == h5t.ENUM:
        stored = stored.get_super()
        if dtype.kind != "b":
            enum_names = {str(key): int(value) for key, value in (h5py.check_enum_dtype(dtype) or {}).items()}
            dtype = np.dtype(dtype.str)
        exact = stored.get_size() == dtype.itemsize
    else:
        # Odd precisions, offsets and byte orders are converted by HDF5, which is not there when rows are read.
        exact = dtype.kind in "iufc" and stored.equal(h5t.py_create(dtype))
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8) or not exact:
        return None, None, f"its type {_describe(dtype)} is not one that this version serves"
    return dtype, enum_names, None


def _is_table(stored: h5t.TypeID) -> bool:
    """Whether elements are records; complex numbers look like records of two to HDF5."""
    return bool(stored.get_class() == h5t.COMPOUND and stored.dtype.kind != "c")


class Member(NamedTuple):
    """One member of a record; an array of plain numbers has one without a name."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    enum_names: dict[str, int] | None


def _members(stored: h5t.TypeCompoundID) -> tuple[list[Member], str | None]:
    """The members that travel, and the reason where there is none."""
    found: list[Member] = []
    problem = "its records have no members"
    for number in range(min(stored.get_nmembers(), MAX_ARRAYS)):
        name = stored.get_member_name(number).decode("utf-8", "replace")
        kind, shape = stored.get_member_type(number), ()
        if kind.get_class() == h5t.ARRAY:
            shape, kind = kind.get_array_dims(), kind.get_super()
        if _is_table(kind):
            problem = f"its member {name!r} is a record itself"
            continue
        dtype, enum_names, reason = _dtype(kind)
        if dtype is None:
            problem = reason or problem
        else:
            found.append(Member(name, dtype, tuple(shape), stored.get_member_offset(number), enum_names))
    return found, None if found else problem


def _fill(dataset: h5py.Dataset, stored: h5t.TypeID, record: int) -> bytes:
    """One element as stored, for what was never written."""
    if stored.get_class() not in _NUMBER_CLASSES:
        return bytes(record)
    return np.asarray(dataset.fillvalue, dataset.dtype).tobytes()


def _raw(dataset: h5py.Dataset, stored: h5t.TypeID) -> bytes:
    """All elements as they are stored."""
    out = np.empty(math.prod(dataset.shape) * stored.get_size(), np.uint8)
    dataset.id.read(h5s.ALL, h5s.ALL, out, mtype=stored)
    return out.tobytes()


def _text(dataset: h5py.Dataset, stored: h5t.TypeID) -> tuple[str, ...] | None:
    """The values of a short list of strings, which may be names of classes or of groups."""
    if stored.get_class() != h5t.STRING or len(dataset.shape) != 1:
        return None
    if dataset.id.get_storage_size() > MAX_INLINE_BYTES or dataset.shape[0] > MAX_INLINE_BYTES // 16:
        return None
    return tuple(bytes(value).decode("utf-8", "replace") for value in dataset[()].tolist())


def _describe(dtype: np.dtype[Any]) -> str:
    if h5py.check_vlen_dtype(dtype):
        return "variable-length array"
    if h5py.check_ref_dtype(dtype):
        return "reference"
    return str(dtype)


def _filter(description: tuple[int, int, tuple[int, ...], bytes]) -> Filter:
    number, _, options, name = description
    names = {h5z.FILTER_DEFLATE: "gzip", h5z.FILTER_SHUFFLE: "shuffle"}
    return Filter(number, names.get(number) or name.decode("utf-8", "replace") or str(number), tuple(options))


def _chunks(dataset: h5py.Dataset) -> ChunkTable:
    found: list[tuple[tuple[int, ...], int, int, int]] = []
    # One pass over the index; asking for chunk i by number is quadratic.
    dataset.id.chunk_iter(lambda info: found.append((info.chunk_offset, info.byte_offset, info.size, info.filter_mask)))
    if not found:
        return ChunkTable(*(np.zeros(0, np.int64) for _ in range(4)))
    corners, offsets, sizes, masks = (np.array(column, np.int64) for column in zip(*found, strict=True))
    # corners: (chunks, ndim) → number of the chunk in C order over the grid
    grid = [-(-extent // chunk) for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
    strides = np.array([math.prod(grid[axis + 1 :]) for axis in range(len(grid))], np.int64)
    numbers = (corners // np.array(dataset.chunks, np.int64)) @ strides
    order = np.argsort(numbers, kind="stable")
    return ChunkTable(numbers[order], offsets[order], sizes[order], masks[order])


def _attributes(item: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name in list(item.attrs)[:MAX_ATTRIBUTES]:
        attribute = item.attrs.get_id(name)
        kind = attribute.get_type()
        if kind.get_class() not in _ATTRIBUTE_CLASSES or attribute.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            attributes[name] = f"({attribute.dtype}, shape {list(attribute.shape or ())}, not shown)"
            continue
        value = item.attrs[name]
        attributes[name] = _json_value(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
    return attributes


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def main(memory_bytes: int) -> None:
    """Answer paths until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answers: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever a library prints must not fall between the frames.
    os.dup2(2, 1)
    for line in sys.stdin:
        path = json.loads(line)
        try:
            kind, content = b"L", dump_layout(inspect_file(path))
        except MemoryError:
            kind, content = b"E", b"describing it takes more memory than inspection may use"
        except Exception as error:
            # The path is the server's own business.
            kind, content = b"E", str(error).replace(path, "the file").encode("utf-8", "replace")
        answers.write(struct.pack("<Q", 1 + len(content)) + kind)
        answers.write(content)


if __name__ == "__main__":
    main(int(sys.argv[1]))
