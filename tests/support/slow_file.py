"""An HDF5 file whose inspection takes seconds."""

from __future__ import annotations

from pathlib import Path

import h5py


def write_slow(path: Path) -> None:
    """Millions of chunks without an index: listing them takes many times longer than inspection may."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((1,))
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w", libver="latest") as file:
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, h5py.h5s.create_simple((16_000_000,)), properties)
