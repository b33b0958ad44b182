"""Recognises other file formats by their first bytes, and tells the user how to convert them."""

from __future__ import annotations

import os

HDF5 = b"\x89HDF\r\n\x1a\n"
"""Signature of the superblock, at the start of a file or after a user block of 512 bytes times a power of two."""

NOT_HDF5 = "it is not an HDF5 file"
"""How every reason of `why_no_hdf5` begins."""

_OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        b"MATLAB 5.0 MAT-file",
        "MATLAB v5: save it again in MATLAB with -v7.3, or pack its arrays (scipy.io.loadmat) with "
        "numpy.savez and h5feed-server build",
    ),
    (b"CDF\x01", "netCDF-3: convert it with nccopy -k nc4 OLD.nc NEW.nc"),
    (b"CDF\x02", "netCDF-3: convert it with nccopy -k nc4 OLD.nc NEW.nc"),
    (b"CDF\x05", "netCDF-3: convert it with nccopy -k nc4 OLD.nc NEW.nc"),
    (b"\x0e\x03\x13\x01", "HDF4: convert it with h4toh5 OLD.hdf NEW.h5"),
    (b"PK\x03\x04", "a zip archive: unpack it, or pack its images or arrays with h5feed-server build"),
    (b"\x1f\x8b", "compressed with gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (b"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "compressed with xz: unpack it with unxz"),
    (b"\x93NUMPY", "a NumPy file: pack it with h5feed-server build"),
    (b"PAR1", "a Parquet file: pack it with h5feed-server build"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file with git lfs pull"),
    (b"<!doctype html", "a web page: the download did not return the file"),
    (b"<html", "a web page: the download did not return the file"),
)


def is_hdf5(fd: int) -> bool:
    """Whether an open file is HDF5."""
    return superblock(fd) is not None


def superblock(fd: int) -> int | None:
    """Position of the superblock of an open file; None if it is not HDF5."""
    size = os.fstat(fd).st_size
    offset = 0
    while offset + len(HDF5) <= size:
        if os.pread(fd, len(HDF5), offset) == HDF5:
            return offset
        offset = max(512, 2 * offset)
    return None


def why_no_hdf5(fd: int) -> str | None:
    """What the file is instead of HDF5; None if it is HDF5."""
    if is_hdf5(fd):
        return None
    head = os.pread(fd, 128, 0)
    if not head:
        return f"{NOT_HDF5}: it is empty"
    for begin, what in _OTHERS:
        if head[: len(begin)].lower() == begin.lower():
            return f"{NOT_HDF5}, but {what}"
    return f"{NOT_HDF5} (no HDF5 signature)"
