"""What h5py has no words for when it writes arrays, and every field of a served file held against h5py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

_lib = ctypes.CDLL(h5py.h5.__file__)
_id = ctypes.c_int64
DONT_FILTER_PARTIAL_CHUNKS = 2
EARLY = h5d.ALLOC_TIME_EARLY


def set_chunk_options(properties: h5p.PropDCID, options: int) -> None:
    assert _lib.H5Pset_chunk_opts(_id(properties.id), ctypes.c_uint(options)) >= 0


def index_of(dataset: h5py.Dataset) -> int:
    """HDF5's number of the kind of a chunk index: 2 implicit, 3 fixed array, 4 extensible array, 5 B-tree."""
    kind = ctypes.c_int(-1)
    _lib.H5Dget_chunk_index_type(_id(dataset.id.id), ctypes.byref(kind))
    return kind.value


def set_bits(kind: h5t.TypeID, precision: int, offset: int = 0) -> h5t.TypeID:
    """A copy of a type that uses some of its bits only."""
    kind = kind.copy()
    assert _lib.H5Tset_precision(_id(kind.id), ctypes.c_size_t(precision)) >= 0
    assert _lib.H5Tset_offset(_id(kind.id), ctypes.c_size_t(offset)) >= 0
    return kind


def text_type(length: int, padding: int) -> h5t.TypeID:
    kind = h5t.C_S1.copy()
    kind.set_size(length)
    kind.set_strpad(padding)
    return kind


def create(
    file: h5py.File,
    name: str,
    kind: h5t.TypeID,
    shape: Sequence[int],
    properties: h5p.PropDCID | None = None,
    maxshape: Sequence[int | None] | None = None,
    raw: np.ndarray | None = None,
) -> h5py.Dataset:
    """An array of any type of HDF5, with the bytes that it has on disk where it has them in memory, too."""
    most = None if maxshape is None else tuple(h5s.UNLIMITED if extent is None else extent for extent in maxshape)
    space = h5s.create_simple(tuple(shape), most)
    links = h5p.create(h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    made = h5d.create(file.id, name.encode(), kind, space, properties, links)
    if raw is not None:
        made.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(raw), mtype=kind)
    return h5py.Dataset(made)


def same(batch: h5feed.Batch, name: str, expected: Any) -> bool:
    """Whether a field has, bit by bit, what h5py gives for the same rows."""
    if isinstance(expected, np.ndarray) and expected.dtype.kind == "S":
        return [text.encode("utf-8", "surrogateescape") for text in batch.text(name)] == [
            bytes(text).decode("utf-8", "replace").encode() for text in expected.tolist()
        ]
    if expected.dtype.kind == "O":
        values = expected.tolist()
        if all(isinstance(value, (bytes, str)) for value in values):
            return batch.text(name) == [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        lists = batch.lists(name)
        return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(lists, values, strict=True))
    found = np.asarray(batch[name])
    wanted = expected.astype(expected.dtype.newbyteorder("<"))
    if wanted.dtype.kind == "c":
        wanted = np.stack([wanted.real, wanted.imag], -1)
    if found.dtype != wanted.dtype and "bfloat16" in str(found.dtype):
        found = found.astype("f4")
    return bool(found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes())


def by_h5py(path: Path, field: str) -> Any:
    """All rows of an array, or of a member of its records, by the name that its field has."""
    with h5py.File(path) as file:
        parts, item = field.split("."), file
        while parts and not isinstance(item, h5py.Dataset):
            count = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in item)
            item, parts = item[".".join(parts[:count])], parts[count:]
        return item.fields(".".join(parts))[()] if parts else item[()]
