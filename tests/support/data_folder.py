"""The data folder that most tests share."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np

ROWS = 1000


def write_data_folder(path: Path) -> None:
    """`mixed` (every layout that is read), `sub.small`, `broken` (no HDF5), `odd` (nothing readable)."""
    random = np.random.default_rng(0)
    with h5py.File(path / "mixed.h5", "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
        labels = file.create_dataset("labels", data=random.choice(4, ROWS, p=[0.7, 0.2, 0.07, 0.03]))
        labels.attrs["class_names"] = ["cat", "dog", "bird", "fish"]
        # Rows above the size that is kept in memory, so that the way past the cache is taken too.
        big = random.integers(0, 256, (40, 300, 300), dtype=np.uint8)
        file["big_endian"] = random.integers(-1000, 1000, (ROWS, 3)).astype(">i4")
        file["flags"] = random.random(ROWS) < 0.5
        file["half"] = random.random((ROWS, 2)).astype("<f2")
        file["waves"] = (random.random((ROWS, 4)) + 1j * random.random((ROWS, 4))).astype("<c8")
        file.create_dataset("never_written", (ROWS, 2), "<f4", fillvalue=1.5)
        gzip = {"compression": "gzip", "compression_opts": 1}
        file.create_dataset("by_row", data=random.integers(0, 9, (ROWS, 20), dtype=np.int16), chunks=(1, 20), **gzip)
        values = random.random((ROWS, 7, 5)).astype("<f4")
        file.create_dataset("shuffled", data=values, chunks=(3, 4, 2), shuffle=True, **gzip)
        file.create_dataset("swapped", data=values.astype(">f8"), chunks=(16, 7, 5), shuffle=True, **gzip)
        file.create_dataset("plain_chunks", data=values, chunks=(10, 7, 5))
        file.create_dataset("plain_pieces", data=values, chunks=(10, 3, 5))
        sparse = file.create_dataset("sparse", (ROWS, 4), "<i4", chunks=(10, 4), fillvalue=-7, **gzip)
        sparse[100:130] = 5
        file.create_dataset("lzf", data=np.arange(ROWS), chunks=(10,), compression="lzf")
        file["text"] = np.array([b"one", b"two"] * (ROWS // 2))
        file["meta"] = np.arange(3)
        kind = h5py.enum_dtype({"RED": 0, "GREEN": 1}, basetype="i1")
        file.create_dataset("colour", data=np.arange(ROWS) % 2, dtype=kind)
    with h5py.File(path / "tall.h5", "w") as file:
        file["x"] = big
        file.create_dataset("z", data=big, chunks=(1, 300, 300), compression="gzip")
        file.create_dataset("w", data=big, chunks=(7, 128, 300), compression="gzip", shuffle=True)
        file["y"] = np.arange(40) % 2
    (path / "sub").mkdir()
    with h5py.File(path / "sub" / "small.hdf5", "w") as file:
        file["x"], file["y"] = np.zeros((5, 3)), np.arange(5)
    (path / "broken.h5").write_bytes(b"this is no HDF5 file")
    with h5py.File(path / "odd.h5", "w") as file:
        file["references"] = np.array([file.ref, file.ref], dtype=h5py.ref_dtype)
    os.mkfifo(path / "pipe.h5")
