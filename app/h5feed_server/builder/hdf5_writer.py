"""The HDF5 files themselves: contiguous fields whose rows are written past HDF5, and compressed chunks.

HDF5 reserves the space of a contiguous field when the file is made and says where it lies; from then on rows are
written there by ``pwrite``, from all threads, in any order, and a process that is killed leaves a file whose structure
is whole. No times are recorded: the same rows give the same bytes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import numpy.typing as npt

from .options import Compression
from .source import Column, FieldSpec

_VERSION = h5py.h5f.LIBVER_V110
"""Of the file format: read by every HDF5 since 2016, and attributes may be as long as lists of many class names."""

_ALIGNED = 4096
"""Bytes: where fields of at least that many begin."""

_SMALL_CHUNK = 32 << 10
"""Bytes of a chunk of small rows: as few rows as keep the index of the chunks small."""

_GZIP, _SHUFFLE, _LZ4, _ZSTD = 1, 2, 32004, 32015
"""Numbers of filters in HDF5; see https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md"""

DEFAULT_LEVELS = {"zstd": 3, "gzip": 4, "lz4": 1, "none": 0}


@dataclass(frozen=True)
class Packing:
    """How the fields of a file are stored.

    Attributes
    ----------
    rows : int or None
        Of a chunk; None: one where a row is not small.
    """

    compression: Compression = "none"
    level: int | None = None
    rows: int | None = None

    def chunk_rows(self, spec: FieldSpec) -> int:
        return self.rows or max(1, _SMALL_CHUNK // max(1, spec.row_bytes))

    def encode(self, chunk: npt.NDArray[Any]) -> bytes:
        """The bytes of a chunk, through the filters."""
        data: Any = chunk
        if chunk.dtype.itemsize > 1:
            data = np.ascontiguousarray(chunk.reshape(-1).view(np.uint8).reshape(-1, chunk.dtype.itemsize).T)
        level = self.level or DEFAULT_LEVELS[self.compression]
        if self.compression == "gzip":
            return bytes(imagecodecs.zlib_encode(data, level))
        if self.compression == "zstd":
            return bytes(imagecodecs.zstd_encode(data, level))
        return bytes(imagecodecs.lz4h5_encode(data, level))


def create_file(
    path: Path, groups: Mapping[str, npt.NDArray[np.int64]], fields: Sequence[FieldSpec]
) -> dict[tuple[str, str], int]:
    """Make a file of contiguous fields that are not written yet.

    Parameters
    ----------
    groups : mapping of str to (n,) int64
        Name (empty for the root) to the rows of the source.

    Returns
    -------
    dict of (str, str) to int
        Group and field, to the offset of its first row in the file.
    """
    offsets = {}
    with _create_file(path) as file:
        for group, rows in groups.items():
            for spec in fields:
                offsets[group, spec.name] = _create_contiguous(file, group, spec, rows)
                _mark_sparse(file, group, spec, len(rows))
    return offsets


def _create_contiguous(file: h5py.File, group: str, spec: FieldSpec, rows: npt.NDArray[np.int64]) -> int:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    made.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return _create(file, group, spec, spec.stored_shape(rows), made).id.get_offset() or 0


def create_chunked(
    path: Path,
    groups: Mapping[str, npt.NDArray[np.int64]],
    fields: Sequence[FieldSpec],
    packing: Packing,
    read: Callable[[str, str, int, int], npt.NDArray[Any]],
    threads: ThreadPoolExecutor,
    window: int,
    on_rows: Callable[[int], None],
) -> dict[tuple[str, str], int]:
    """Make a file of compressed fields; lists lie one after the other as they are, and are not written yet.

    Parameters
    ----------
    groups : mapping of str to (n,) int64
        Name (empty for the root) to the rows of the source.
    read : callable
        Group, field, first row and the row after the last, to rows (n, *shape).
    threads, window : ThreadPoolExecutor, int
        Where chunks are compressed, and how many may wait to be written.
    on_rows : callable
        Told how many rows of the first field were written.

    Returns
    -------
    dict of (str, str) to int
        Group and field of lists, to the offset of its first item in the file.
    """
    offsets = {}
    with _create_file(path) as file:
        for group, chosen in groups.items():
            rows = len(chosen)
            for number, spec in enumerate(fields):
                if spec.lengths is not None:
                    offsets[group, spec.name] = _create_contiguous(file, group, spec, chosen)
                    _mark_sparse(file, group, spec, rows)
                    continue
                if not math.prod(spec.shape):
                    # Rows of no values: HDF5 has no chunks of that shape.
                    _create_contiguous(file, group, spec, chosen)
                    on_rows(rows if number == 0 else 0)
                    continue
                own = packing
                if spec.dtype.kind == "S" and packing.compression != "none":
                    # Texts are also read by libhdf5, which has few plug-ins wherever it is.
                    own = Packing("gzip", None, packing.rows)
                step = min(own.chunk_rows(spec), max(1, rows))
                made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                made.set_chunk((step, *spec.shape))
                made.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                _set_filters(made, own, spec.dtype.itemsize)
                dataset = _create(file, group, spec, (rows, *spec.shape), made)

                def encode(
                    start: int, where: tuple[str, FieldSpec, int, int, Packing] = (group, spec, rows, step, own)
                ) -> bytes:
                    group, spec, rows, step, own = where
                    values = read(group, spec.name, start, min(rows, start + step))
                    if len(values) < step:
                        values = np.concatenate([values, np.zeros((step - len(values), *spec.shape), spec.dtype)])
                    return own.encode(values)

                starts = range(0, rows, step)
                for start, data in zip(starts, in_order(threads, encode, starts, window), strict=True):
                    dataset.id.write_direct_chunk((start, *(0 for _ in spec.shape)), data)
                    if number == 0:
                        on_rows(min(step, rows - start))
    return offsets


def in_order(
    threads: ThreadPoolExecutor, work: Callable[[int], bytes], items: Sequence[int], window: int
) -> Iterator[bytes]:
    """Results of `work` in the order of the items, of which no more than `window` are under way or wait."""
    waiting: deque[Future[bytes]] = deque()
    try:
        for item in items:
            if len(waiting) >= window:
                yield waiting.popleft().result()
            waiting.append(threads.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def finish_file(
    path: Path, columns: Mapping[str, Mapping[str, Column]], attributes: Mapping[str, Any], marks: Mapping[str, Any]
) -> None:
    """Add the small fields and the attributes.

    Parameters
    ----------
    columns : mapping
        Group to the small fields of its rows.
    attributes : mapping
        Of the file.
    marks : mapping
        Of the first field of every group, such as its mean.
    """
    with _open_file(path) as file:
        for group, own in columns.items():
            for name, column in own.items():
                values = column.values
                if values.dtype.kind == "S":
                    values = values.astype(h5py.string_dtype("utf-8", values.dtype.itemsize))
                dataset = (file[group] if group else file).create_dataset(name, data=values, track_times=False)
                _set_attributes(dataset, column.attributes)
        for path_of, value in marks.items():
            where, _, name = path_of.rpartition("@")
            file[where].attrs[name] = value
        _set_attributes(file, attributes)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_file(path: Path) -> h5py.File:
    made = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    # h5py.File has no option for this: before HDF5 2.0, the root group tells when it was created.
    made.set_obj_track_times(False)
    return h5py.File(h5py.h5f.create(os.fsencode(path), fcpl=made, fapl=_access()))


def _open_file(path: Path) -> h5py.File:
    return h5py.File(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDWR, fapl=_access()))


def _access() -> Any:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(_VERSION, _VERSION)
    access.set_alignment(_ALIGNED, _ALIGNED)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    return access


def _group(parent: h5py.Group, path: str) -> h5py.Group:
    """The group at `path` below `parent`, created if it is missing."""
    made = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    made.set_obj_track_times(False)
    for name in filter(None, path.split("/")):
        if name not in parent:
            h5py.h5g.create(parent.id, name.encode(), gcpl=made)
        parent = parent[name]
    return parent


def _create(file: h5py.File, group: str, spec: FieldSpec, shape: tuple[int, ...], made: Any) -> h5py.Dataset:
    made.set_obj_track_times(False)
    folders, _, name = spec.name.rpartition("/")
    parent = _group(_group(file, group), folders)
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.Dataset(h5py.h5d.create(parent.id, name.encode(), _stored_type(spec), space, made))
    _set_attributes(dataset, spec.attributes)
    return dataset


def _mark_sparse(file: h5py.File, group: str, spec: FieldSpec, rows: int) -> None:
    """Write what AnnData says of a sparse matrix to the group of its parts, if `spec` is one of them."""
    if spec.columns is not None:
        about = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([rows, spec.columns])}
        _set_attributes(_group(_group(file, group), spec.name.rpartition("/")[0]), about)


def _stored_type(spec: FieldSpec) -> Any:
    if spec.is_bfloat16:
        made = h5py.h5t.IEEE_F16LE.copy()
        # A sign, 8 bits of exponent and 7 of mantissa.
        made.set_fields(15, 7, 8, 0, 7)
        made.set_ebias(127)
        return made
    stored: Any = spec.dtype
    if spec.dtype.kind == "S":
        stored = h5py.string_dtype("utf-8", spec.dtype.itemsize)
    elif spec.enum_names is not None:
        stored = h5py.enum_dtype(dict(spec.enum_names), spec.dtype)
    return h5py.h5t.py_create(stored, logical=True)


def _set_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        owner.attrs[name] = value


def _set_filters(made: Any, packing: Packing, itemsize: int) -> None:
    if packing.compression == "none":
        return
    if itemsize > 1:
        made.set_shuffle()
    level = packing.level or DEFAULT_LEVELS[packing.compression]
    number, values = {
        "gzip": (_GZIP, (level,)),
        "zstd": (_ZSTD, (level,)),
        "lz4": (_LZ4, ()),
    }[packing.compression]
    # Optional, as HDF5 refuses mandatory filters that it cannot run itself; the mask of each chunk says it was applied.
    made.set_filter(number, h5py.h5z.FLAG_OPTIONAL, values)
