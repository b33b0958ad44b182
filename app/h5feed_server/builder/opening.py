"""Detects the type of a source and opens it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
from h5feed.errors import Unreadable

from .cifar import cifar, is_cifar
from .delimited import delimited
from .image_source import listed_images
from .image_spec import SUFFIXES
from .members import PACKED_TAR_SUFFIXES, TAR_SUFFIXES, open_members
from .numpy_files import IDX_NAME, idx_arrays, numpy_arrays
from .options import BuildOptions
from .parquet import PARQUET_SUFFIXES, parquet_rows
from .source import Source
from .table_file import TABLE_SUFFIXES
from .webdataset import is_webdataset, webdataset

if TYPE_CHECKING:
    from .store_files import StoreFiles

_KNOWN = (
    "use a folder, .zip, .tar or .tar.gz of images, or a .csv, .tsv, .npz, .npy, IDX (train-images-idx3-ubyte), "
    ".parquet, .arrow or HDF5 file"
)


def open_source(path: Path, options: BuildOptions, files: StoreFiles | None = None) -> Source:
    """The source at `path`.

    Parameters
    ----------
    files : StoreFiles, optional
        What the files there stand for, if they are those of an object store.

    Raises
    ------
    Unreadable, BadParameter
    """
    if not path.exists():
        raise Unreadable(f"{path} does not exist")
    name = path.name.lower()
    if name.endswith(TABLE_SUFFIXES):
        return delimited(path, options, files)
    if name.endswith((".npz", ".npy")):
        return numpy_arrays(path, options)
    if IDX_NAME.match(path.name):
        return idx_arrays(path, options)
    if path.is_dir():
        top = [item.name for item in path.iterdir()]
        if any(IDX_NAME.match(file) for file in top):
            return idx_arrays(path, options)
        if any(file.endswith(".npy") for file in top):
            return numpy_arrays(path, options)
        if any(name.endswith(PARQUET_SUFFIXES) for _, _, names in os.walk(path) for name in names):
            return parquet_rows(path, options)
        return _of_members(path, options, files)
    if name.endswith(PARQUET_SUFFIXES):
        return parquet_rows(path, options)
    if name.endswith((".zip", *TAR_SUFFIXES, *PACKED_TAR_SUFFIXES)):
        return _of_members(path, options, files)
    if h5py.is_hdf5(path):
        from .catalogued import catalogued

        return catalogued(path, options)
    if name.removesuffix(".gz").endswith((".pkl", ".pickle")):
        raise Unreadable(f"{path} is a pickle, which runs code when it is read: save its arrays with numpy.savez")
    if name.endswith(".mat"):
        raise Unreadable(f"{path} is in MATLAB's format before 7.3: save it with save(…, '-v7.3')")
    what = "is a single image: pass its folder" if name.endswith(SUFFIXES) else f"is not supported: {_KNOWN}"
    raise Unreadable(f"{path} {what}")


def _of_members(path: Path, options: BuildOptions, files: StoreFiles | None) -> Source:
    members = open_members(path, files)
    try:
        if is_cifar(members):
            return cifar(members, options)
        if path.is_dir() and not any(m.name.lower().endswith(SUFFIXES) for m in members.listing.members):
            # Half of what a build would load, for nothing if there are images.
            from .catalogued import catalogued, hdf5_files

            if hdf5_files(path):
                members.close()
                return catalogued(path, options)
        if not path.is_dir() and is_webdataset(members):
            return webdataset(members, options)
        return listed_images(members, options)
    except BaseException:
        members.close()
        raise
