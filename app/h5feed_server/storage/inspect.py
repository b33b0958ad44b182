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
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5t, h5z

from .layout import ArrayLayout, ChunkTable, FileLayout, Filter, dump_layout

MAX_ARRAYS = 1000
"""Root-level arrays looked at in one file."""

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1 << 16
"""Bounds on what of an object's attributes goes into the catalogue."""

_ATTRIBUTE_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM)
"""Attribute types that are read. Others are named only: libhdf5 crashes on some damaged ones."""


def inspect_file(path: str) -> FileLayout:
    """The layout of the arrays in the root group of the file at `path`."""
    # No lock is taken: the file may lie on a read-only or network mount, and is only read.
    with h5py.File(path, "r", locking=False) as file:
        arrays = []
        for number, name in enumerate(file):
            if number >= MAX_ARRAYS:
                break
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                arrays.append(ArrayLayout(name, (), "|u1", unreadable="it is a soft or external link"))
                continue
            item = file[name]
            if isinstance(item, h5py.Dataset):
                arrays.append(_array(name, item))
        return FileLayout(tuple(arrays), _attributes(file))


def _array(name: str, dataset: h5py.Dataset) -> ArrayLayout:
    shape = tuple(dataset.shape or ())
    known: dict[str, Any] = {"path": name, "shape": shape, "dtype": "|u1", "attributes": _attributes(dataset)}
    if dataset.shape is None:
        return ArrayLayout(**known, unreadable="it has no shape (a null dataspace)")
    dtype, enum_names, problem = _dtype(dataset)
    if dtype is None:
        return ArrayLayout(**known, unreadable=problem)
    known |= {"dtype": dtype.str, "enum_names": enum_names, "stored_bytes": dataset.id.get_storage_size()}
    if not shape:
        return ArrayLayout(**known, unreadable="it is a scalar: it has no rows")
    properties = dataset.id.get_create_plist()
    kind = properties.get_layout()
    if properties.get_external_count():
        return ArrayLayout(**known, unreadable="its data lies in an external file")
    if kind not in (h5d.CONTIGUOUS, h5d.CHUNKED):
        what = {h5d.COMPACT: "compact", h5d.VIRTUAL: "virtual"}.get(kind, f"of layout class {kind}")
        return ArrayLayout(**known, unreadable=f"it is {what}, which this version does not read")
    known["fill"] = np.asarray(dataset.fillvalue, dtype).tobytes()
    if kind == h5d.CONTIGUOUS:
        # Without storage the offset means nothing: every element is the fill value.
        offset = dataset.id.get_offset() if known["stored_bytes"] else None
        return ArrayLayout(**known, offset=offset)
    filters = tuple(_filter(properties.get_filter(i)) for i in range(properties.get_nfilters()))
    return ArrayLayout(**known, chunk_shape=dataset.chunks, filters=filters, chunks=_chunks(dataset))


def _dtype(dataset: h5py.Dataset) -> tuple[np.dtype[Any] | None, dict[str, int] | None, str | None]:
    """The stored dtype, an enum's names, and the reason where it is none that travels."""
    stored = dataset.id.get_type()
    dtype = dataset.dtype
    enum_names = None
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
        return None, None, f"its type {_describe(dataset)} is not one that this version serves"
    return dtype, enum_names, None


def _describe(dataset: h5py.Dataset) -> str:
    if h5py.check_string_dtype(dataset.dtype):
        return "string"
    if h5py.check_vlen_dtype(dataset.dtype):
        return "variable-length array"
    return "compound" if dataset.dtype.names else str(dataset.dtype)


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
