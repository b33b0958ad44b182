"""The last look at layouts: a wrong one is noticed, whatever is wrong with it; a broken chunk is no wrong layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import DatasetCorrupt
from h5feed.stored.layout import ArrayLayout, Filter
from h5feed.stored.local_file import Identity
from h5feed_server.storage.hdf5.arrays import Arrays
from h5feed_server.storage.hdf5.guard import Guard, held
from h5feed_server.storage.hdf5.libhdf5 import Plugins, unknown_properties

from tests.support.server_process import ServerProcess

ROWS = 50


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5py.File]:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("guard") / "a.h5"
    with h5py.File(path, "w") as file:
        file["plain"] = random.integers(0, 99, (ROWS, 4))
        file.create_dataset("gzip", data=random.random((ROWS, 6)), chunks=(8, 4), compression="gzip", shuffle=True)
        # Rows of more bytes than are compared, in two chunks that were written.
        long = file.create_dataset("long", (2, 40 << 20), "u1", chunks=(1, 1 << 20), compression="lzf")
        long[0, :100], long[1, -100:] = np.arange(100), np.arange(100, 200)
        # None that were written.
        file.create_dataset("nothing", (2, 40 << 20), "u1", chunks=(1, 1 << 20), compression="lzf")
        records = np.zeros(ROWS, [("a", "<i4"), ("b", "<f8")])
        records["a"], records["b"] = np.arange(ROWS), random.random(ROWS)
        file["table"] = records
        file["text"] = np.array([b"ab", b"c"] * (ROWS // 2), "S4")
    with h5py.File(path) as file:
        yield file


def _guard(file: h5py.File) -> Guard:
    return Guard(held(file, Identity(0, 0, 0, 0, 0)), 600.0)


def _layouts(file: h5py.File, name: str) -> list[ArrayLayout]:
    return Arrays(file, 1 << 40, (), Plugins(), _guard(file)).describe(file[name])


def _moved(layout: ArrayLayout) -> ArrayLayout:
    assert layout.chunks is not None
    offsets = layout.chunks.offsets.copy()
    offsets[[0, -1]] = offsets[[-1, 0]]
    sizes = layout.chunks.sizes.copy()
    sizes[[0, -1]] = sizes[[-1, 0]]
    return replace(layout, chunks=replace(layout.chunks, offsets=offsets, sizes=sizes))


WRONG: list[tuple[str, int, Callable[[ArrayLayout], ArrayLayout]]] = [
    ("plain", 0, lambda one: replace(one, offset=(one.offset or 0) + 8)),
    ("plain", 0, lambda one: replace(one, dtype=">i8")),
    ("gzip", 0, _moved),
    ("gzip", 0, lambda one: replace(one, filters=one.filters[1:])),
    ("gzip", 0, lambda one: replace(one, filters=(Filter(2, "shuffle", (4,)), *one.filters[1:]))),
    ("long", 0, _moved),
    ("table", 1, lambda one: replace(one, record=(12, 0))),
    ("table", 1, lambda one: replace(one, record=(8, 0))),
    ("text", 0, lambda one: replace(one, padding="nullterm", offset=(one.offset or 0) + 1)),
]


def test_long_rows_without_chunks_agree(file: h5py.File) -> None:
    layout = _layouts(file, "nothing")[0]
    assert layout.unreadable is None and not layout.by_h5py
    assert _guard(file).agrees(file["nothing"], [("", layout)])


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_layout_is_noticed(file: h5py.File, number: int) -> None:
    """Whatever is wrong with where or how bytes lie, rows that are read both ways differ."""
    name, member, spoil = WRONG[number]
    layouts = _layouts(file, name)
    assert all(not one.by_h5py and one.unreadable is None for one in layouts)
    names = file[name].dtype.names or ("",)
    assert _guard(file).agrees(file[name], list(zip(names, layouts, strict=True)))
    layouts[member] = spoil(layouts[member])
    assert not _guard(file).agrees(file[name], list(zip(names, layouts, strict=True)))


def test_a_broken_chunk_is_no_wrong_layout(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Where neither can read a row, the others are served: the row says that it is damaged."""
    values = np.arange(ROWS * 4).reshape(ROWS, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, chunks=(1, 4), compression="gzip", fletcher32=True)
        place = dataset.id.get_chunk_info_by_coord((ROWS - 1, 0)).byte_offset
    with open(tmp_path / "a.h5", "r+b") as raw:
        raw.seek(place + 3)
        raw.write(b"\xff\xff")
    with h5feed.connect(serve(tmp_path, H5FEED_CACHE_BYTES="0").url, deadline=60) as feed:
        np.testing.assert_array_equal(feed["a"].take(range(ROWS - 1))["x"], values[:-1])
        with pytest.raises(DatasetCorrupt):
            feed["a"].take([ROWS - 1])


def test_properties_that_nobody_knows() -> None:
    """A creation property that is not among those that are asked for is found by its value."""
    library: Any = ctypes.CDLL(h5py.h5.__file__)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((3,))
    properties.set_deflate(1)
    assert unknown_properties(properties) == []
    value = ctypes.c_int(5)
    nothing = [ctypes.c_void_p(None)] * 6
    library.H5Pinsert2(
        ctypes.c_int64(properties.id), b"rows_backwards", ctypes.c_size_t(4), ctypes.byref(value), *nothing
    )
    assert unknown_properties(properties) == ["rows_backwards"]
