"""NumPy ``.npy`` and ``.npz`` files, and MNIST's IDX files, gzipped or not; read in place, in blocks."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from .array_source import Array, ArraySource, NamedArray, named_array
from .memory_arrays import MemoryArray
from .options import BuildOptions

IDX_NAME = re.compile(r"^(.*?)[-_.]?(images|labels)[-_.]idx\d[-_.]ubyte(\.gz)?$", re.I)
"""``train-images-idx3-ubyte.gz``, ``emnist-letters-test-labels-idx1-ubyte``."""

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_SKIP_BYTES = 1 << 20

CLASS_LISTS = ("list_classes", "class_names", "classes", "label_names", "labels_names", "categories", "names")
"""Names of short lists of text beside the fields that name the classes."""


class StreamArray:
    """An array read from a stream."""

    attributes: Mapping[str, Any] = {}
    step = 1

    def __init__(self, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
        self._stream, self._name = stream, name
        self.shape, self.dtype = shape, dtype
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._at = 0

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        self._skip((start - self._at) * self._row_bytes)
        wanted = (stop - start) * self._row_bytes
        data = self._read(wanted)
        if len(data) < wanted:
            raise Unreadable(f"{self._name} ends before row {stop}, but its header says {self.shape[0]} rows")
        self._at = stop
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def close(self) -> None:
        self._stream.close()

    def _skip(self, nbytes: int) -> None:
        if self._stream.seekable() and not isinstance(self._stream, zipfile.ZipExtFile | gzip.GzipFile):
            self._stream.seek(nbytes, 1)
            return
        while nbytes > 0 and (got := len(self._read(min(nbytes, _SKIP_BYTES)))):
            nbytes -= got

    def _read(self, nbytes: int) -> bytes:
        try:
            return self._stream.read(nbytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise Unreadable(f"{self._name} is damaged: {error}") from None


class Streams:
    """Opens arrays by a function for each."""

    def __init__(self, openers: Mapping[str, Callable[[], Array]], archive: zipfile.ZipFile | None = None) -> None:
        self._openers, self._archive = openers, archive

    def open(self, name: str) -> Array:
        return self._openers[name]()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()


def numpy_arrays(path: Path, options: BuildOptions) -> ArraySource:
    """Arrays of an ``.npz``, an ``.npy``, or a folder of ``.npy`` files.

    Raises
    ------
    Unreadable, BadParameter
    """
    openers: dict[str, Callable[[], Array]] = {}
    archive = None
    if path.suffix.lower() == ".npz":
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise Unreadable(f"{path} is not an npz file: {error}") from None
        if any(info.flag_bits & 1 for info in archive.infolist()):
            raise Unreadable(f"{path} is encrypted: unpack it first")
        for member in archive.namelist():
            openers[member.removesuffix(".npy")] = partial(_open_member, archive, member)
    else:
        files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        openers = {file.stem: partial(_open_file, file) for file in files}
    arrays: dict[str, NamedArray] = {}
    texts: dict[str, npt.NDArray[Any]] = {}
    for name, opener in openers.items():
        array = opener()
        if array.dtype.kind == "U" and array.shape:
            texts[name] = np.strings.encode(array.read(0, array.shape[0]), "utf-8")
        array.close()
        arrays[name] = named_array(name, array.shape, texts[name].dtype if name in texts else array.dtype)
    for name, values in texts.items():
        openers[name] = partial(MemoryArray, values)
    classes = _class_names(arrays, openers)
    return ArraySource(
        [*arrays.values()], Streams(openers, archive), options, _stamp(path), classes=classes, coded=True
    )


def _class_names(arrays: dict[str, NamedArray], openers: Mapping[str, Callable[[], Array]]) -> list[str] | None:
    """A short list of names beside the rows, which is removed from the arrays; None if there is none."""
    for name, one in arrays.items():
        others = [other.shape[:1] for key, other in arrays.items() if key != name]
        if name.lower() in CLASS_LISTS and one.dtype.kind == "S" and len(one.shape) == 1 and one.shape not in others:
            del arrays[name]
            return [value.decode("utf-8", "replace") for value in openers[name]().read(0, one.shape[0]).tolist()]
    return None


def idx_arrays(path: Path, options: BuildOptions) -> ArraySource:
    """Images and labels in one IDX file or a folder of them.

    Raises
    ------
    Unreadable, BadParameter
    """
    files = sorted(item for item in path.iterdir() if IDX_NAME.match(item.name)) if path.is_dir() else [path]
    openers: dict[str, Callable[[], Array]] = {}
    arrays = []
    for file in files:
        match = IDX_NAME.match(file.name)
        assert match is not None
        # MNIST's test images are the first 10,000 of another set.
        where = "test" if match[1].lower().startswith("t10k") else match[1]
        name = f"{where}/{match[2].lower()}"
        if name in openers:
            raise Unreadable(f"{file.name} and another file are both called {name}: remove one of them")
        openers[name] = partial(_open_idx, file)
        array = openers[name]()
        array.close()
        one = named_array(name, array.shape, array.dtype)
        arrays.append(NamedArray(match[2].lower(), one.shape, one.dtype, one.split, name))
    return ArraySource(arrays, Streams(openers), options, _stamp(path))


def _open_member(archive: zipfile.ZipFile, name: str) -> Array:
    opened = _open_npy(archive.open(name), name)
    if opened is not None:
        return opened
    # Its rows are scattered: it is turned round in memory.
    with archive.open(name) as stream:
        try:
            return MemoryArray(np.lib.format.read_array(stream, allow_pickle=False))
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Unreadable(f"{name} is damaged: {error}") from None


def _open_file(path: Path) -> Array:
    opened = _open_npy(path.open("rb"), path.name)
    return MemoryArray(np.load(path, mmap_mode="r", allow_pickle=False)) if opened is None else opened


def _open_npy(stream: IO[bytes], name: str) -> StreamArray | None:
    """None where it is in Fortran's order.

    See https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        stream.close()
        raise Unreadable(f"{name} is not a NumPy array: {error}") from None
    if dtype.hasobject:
        stream.close()
        raise Unreadable(f"{name} holds pickled Python objects, which are not read: save it as numbers or text")
    if fortran and len(shape) > 1:
        stream.close()
        return None
    return StreamArray(stream, shape, dtype, name)


def _open_idx(path: Path) -> StreamArray:
    """See http://yann.lecun.com/exdb/mnist: type, number of axes, their lengths, big-endian."""
    stream: Any = gzip.GzipFile(path) if path.suffix.lower() == ".gz" else path.open("rb")
    try:
        zero, kind, axes = struct.unpack(">HBB", stream.read(4))
        shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
        if zero or kind not in _IDX_TYPES or not axes:
            raise ValueError("it does not begin like one")
    except (struct.error, ValueError, OSError, EOFError, zlib.error) as error:
        stream.close()
        raise Unreadable(f"{path.name} is not an IDX file: {error}") from None
    return StreamArray(stream, shape, np.dtype(_IDX_TYPES[kind]), path.name)


def _stamp(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
