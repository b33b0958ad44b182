"""Filters × layouts × dtypes in one file, and how every cell is held against h5py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5feed
import h5py
import hdf5plugin
import numpy as np

ROWS = 53
SAMPLE = (6, 5)

FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gzip": {"compression": "gzip"},
    "gzip_shuffle_fletcher32": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"compression": "lzf", "shuffle": True},
    "szip": {"compression": "szip"},
    "scaleoffset": {"scaleoffset": 0},
    "lz4": dict(hdf5plugin.LZ4()),
    "zstd": dict(hdf5plugin.Zstd()),
    "bzip2": dict(hdf5plugin.BZip2()),
    "blosc": dict(hdf5plugin.Blosc()),
    "blosc2": dict(hdf5plugin.Blosc2()),
    "bitshuffle": dict(hdf5plugin.Bitshuffle(cname="lz4")),
}

CHUNKS: dict[str, tuple[int, ...] | None] = {
    "contiguous": None,
    "row": (1, *SAMPLE),
    "rows": (7, *SAMPLE),
    "parts": (7, 4, 2),
    "part_of_a_row": (1, 3, 5),
    "as_large_as_rows": (7, 5, 6),
    "one": (ROWS, *SAMPLE),
}

DTYPES = ("|u1", "<i2", ">i4", "<i8", "<f2", "<f4", ">f8", "|b1", "<c8", "enum")

RANDOM = np.random.default_rng(11).permutation(ROWS)


def _data(dtype: str) -> np.ndarray:
    random = np.random.default_rng(5)
    if dtype == "|b1":
        return random.random((ROWS, *SAMPLE)) < 0.5
    if dtype == "enum":
        return random.integers(0, 3, (ROWS, *SAMPLE)).astype("i1")
    kind = np.dtype(dtype)
    if kind.kind in "fc":
        return random.standard_normal((ROWS, *SAMPLE)).astype(kind)
    return random.integers(0, 100, (ROWS, *SAMPLE)).astype(kind)


def is_legal(name: str, chunks: str, dtype: str) -> bool:
    if chunks == "contiguous":
        return name == "plain"
    if name == "szip":
        return dtype in ("|u1", "<i2", "<i8", "<f4")
    if name == "scaleoffset":
        return dtype in ("|u1", "<i2", ">i4", "<i8")
    return not (dtype == "<c8" and name not in ("plain", "gzip", "lzf", "gzip_shuffle_fletcher32"))


def write_matrix(path: Path) -> None:
    """All cells that this build of HDF5 can write, each a field ``FILTER-LAYOUT-DTYPE``."""
    with h5py.File(path, "w") as file:
        for name, options in FILTERS.items():
            for layout, chunks in CHUNKS.items():
                for dtype in DTYPES:
                    if not is_legal(name, layout, dtype):
                        continue
                    # An axis that is shorter than the chunks must be able to grow.
                    most = (
                        None
                        if chunks is None
                        else tuple(max(n, w) for n, w in zip((ROWS, *SAMPLE), chunks, strict=True))
                    )
                    kind: Any = h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i1") if dtype == "enum" else dtype
                    field = f"{name}-{layout}-{dtype.strip('<>|=')}"
                    try:
                        file.create_dataset(
                            field, data=_data(dtype), dtype=kind, chunks=chunks, maxshape=most, **options
                        )
                    except ValueError:
                        # This build of HDF5 cannot write the combination.
                        file.pop(field, None)


def check_cells(dataset: h5feed.Dataset, path: Path, name: str) -> None:
    """Cells of one filter in order, shuffled and with duplicates: bit by bit what h5py reads."""
    fields = [field for field in dataset.fields if field.startswith(f"{name}-")]
    assert len(fields) >= 12 or name == "szip"
    assert all(dataset.fields[field].readable for field in fields), dataset.fields
    orders = (np.arange(ROWS), RANDOM, np.repeat(RANDOM[:9], 3)[::-1], np.array([ROWS - 1]))
    with h5py.File(path) as file:
        stored = {field: file[field][()] for field in fields}
    for rows in orders:
        batch = dataset.take(rows, fields=fields)
        for field in fields:
            expected = stored[field][rows]
            if expected.dtype.kind == "c":
                expected = expected.view("<f4").reshape(len(rows), *SAMPLE, 2)
            assert batch[field].dtype == expected.dtype.newbyteorder("<"), field
            assert batch[field].tobytes() == expected.astype(expected.dtype.newbyteorder("<")).tobytes(), field
