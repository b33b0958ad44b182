"""Finds out what a source is, and opens it as what it is."""

from __future__ import annotations

from pathlib import Path

import h5py
from h5feed.errors import Unreadable

from .delimited import TABLE_SUFFIXES, delimited
from .image_source import listed_images
from .images import SUFFIXES
from .members import PACKED_TAR_SUFFIXES, TAR_SUFFIXES, open_members
from .numpy_files import IDX_NAME, idx_arrays, numpy_arrays
from .options import BuildOptions
from .parquet import PARQUET_SUFFIXES, parquet_rows
from .repack import hdf5_arrays
from .source import Source
from .webdataset import is_webdataset, webdataset

_KNOWN = (
    "a folder or a .zip, .tar or .tar.gz of images, .csv, .tsv, .npz, .npy, IDX files (train-images-idx3-ubyte), "
    ".parquet, .arrow and HDF5 files are understood"
)


def open_source(path: Path, options: BuildOptions) -> Source:
    """Rows of whatever `path` is.

    Raises
    ------
    Unreadable, BadParameter
    """
    if not path.exists():
        raise Unreadable(f"{path} does not exist")
    name = path.name.lower()
    if name.endswith(TABLE_SUFFIXES):
        return delimited(path, options)
    if name.endswith((".npz", ".npy")):
        return numpy_arrays(path, options)
    if IDX_NAME.match(path.name):
        return idx_arrays(path, options)
    if path.is_dir():
        files = [item.name for item in path.iterdir()]
        if any(IDX_NAME.match(file) for file in files):
            return idx_arrays(path, options)
        if any(file.endswith(".npy") for file in files):
            return numpy_arrays(path, options)
        if any(item.suffix in PARQUET_SUFFIXES for item in path.rglob("*")):
            return parquet_rows(path, options)
        return listed_images(open_members(path), options)
    if name.endswith(PARQUET_SUFFIXES):
        return parquet_rows(path, options)
    if name.endswith((".zip", *TAR_SUFFIXES, *PACKED_TAR_SUFFIXES)):
        members = open_members(path)
        return webdataset(members, options) if is_webdataset(members) else listed_images(members, options)
    if h5py.is_hdf5(path):
        return hdf5_arrays(path, options)
    what = "is one image: give the folder that it lies in" if name.endswith(SUFFIXES) else f"is none of these: {_KNOWN}"
    raise Unreadable(f"{path} {what}")
