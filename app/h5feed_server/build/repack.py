"""Another HDF5 file as a source: the same fields with other chunks, filters, dtypes and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from ..split_record import read_record
from .array_source import ArraySource, Found, found
from .options import BuildOptions

_CLASS_LISTS = ("list_classes", "class_names", "classes", "label_names", "labels_names", "categories", "names")
"""Names of short lists of text beside the fields that name the classes."""

_TEXT_ROWS = 1024


class HDF5Array:
    """A dataset, or the texts of one as strings of a fixed length."""

    def __init__(self, dataset: h5py.Dataset, length: int | None) -> None:
        self._dataset, self._length = dataset, length
        self.shape = dataset.shape
        self.dtype = dataset.dtype if length is None else np.dtype(f"S{length}")
        self.attributes: Mapping[str, Any] = {}
        self.step = dataset.chunks[0] if dataset.chunks else 1

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            if self._length is not None:
                return np.array(self._dataset[start:stop], dtype=self.dtype)
            return np.asarray(self._dataset[start:stop])
        except OSError as error:
            raise Unreadable(f"{self._dataset.name}: rows {start} … {stop - 1} cannot be read: {error}") from None

    def close(self) -> None:
        """The file is closed as a whole."""


class HDF5Arrays:
    """Opens the datasets of a file."""

    def __init__(self, file: h5py.File, lengths: Mapping[str, int]) -> None:
        self._file, self._lengths = file, lengths

    def open(self, name: str) -> HDF5Array:
        return HDF5Array(self._file[name], self._lengths.get(name))

    def close(self) -> None:
        self._file.close()


def hdf5_arrays(path: Path, options: BuildOptions) -> ArraySource:
    """The datasets of an HDF5 file that share their rows; splits are its groups ``train``, ``test`` and so on.

    Raises
    ------
    Unreadable, BadParameter
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise Unreadable(f"{path} is no HDF5 file that can be read: {error}") from None
    try:
        arrays, lengths, classes = _walk(file)
        status = path.stat()
        source = ArraySource(arrays, HDF5Arrays(file, lengths), options, f"{status.st_size} {status.st_mtime_ns}")
    except BaseException:
        file.close()
        raise
    if source.splits is not None:
        source.split_record, problem = read_record([file.attrs], source.split_rows)
        source.notes += [problem] if problem else []
    if classes is not None and source.label is not None:
        label = source.columns[source.label]
        if "class_names" not in label.attributes:
            source.columns[source.label] = type(label)(label.values, {**label.attributes, "class_names": classes})
    return source


def _walk(file: h5py.File) -> tuple[list[Found], dict[str, int], list[str] | None]:
    arrays: list[Found] = []
    lengths: dict[str, int] = {}
    classes: list[str] | None = None

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        nonlocal classes
        if not isinstance(item, h5py.Dataset) or item.shape is None or not item.shape:
            return
        text = h5py.check_string_dtype(item.dtype)
        if text is not None and path.rpartition("/")[2].lower() in _CLASS_LISTS and _is_alone(item):
            classes = [value if isinstance(value, str) else value.decode() for value in item.asstr()[:].tolist()]
            return
        dtype = item.dtype
        if text is not None and text.length is None and len(item.shape) == 1:
            longest = 1
            for start in range(0, len(item), _TEXT_ROWS):
                longest = max(longest, *(len(value) for value in item[start : start + _TEXT_ROWS]), 1)
            lengths[path] = longest
            dtype = np.dtype(f"S{longest}")
        elif (values := h5py.check_enum_dtype(item.dtype)) is not None and item.dtype.kind != "b":
            dtype = np.dtype(item.dtype.str)
            names = sorted(values, key=lambda name: values[name])
            if sorted(values.values()) == list(range(len(values))):
                arrays.append(found(path, item.shape, dtype, {**_attributes(item), "class_names": names}))
                return
        arrays.append(found(path, item.shape, dtype, _attributes(item)))

    # Links, and what they lead to in other files, are not followed.
    file.visititems(visit)
    return arrays, lengths, classes


def _is_alone(dataset: h5py.Dataset) -> bool:
    """Whether no other dataset of its group has as many rows."""
    others = [item for item in dataset.parent.values() if isinstance(item, h5py.Dataset) and item != dataset]
    return all(item.shape[:1] != dataset.shape[:1] for item in others)


def _attributes(dataset: h5py.Dataset) -> dict[str, Any]:
    """Those that hold anywhere: no references, no dimension scales."""
    kept = {}
    for name in dataset.attrs:
        try:
            value = dataset.attrs[name]
        except (OSError, TypeError):
            continue
        dtype = getattr(value, "dtype", None)
        scale = name in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "mean", "std")
        if not scale and (dtype is None or h5py.check_ref_dtype(dtype) is None) and not isinstance(value, h5py.Empty):
            kept[name] = value.tolist() if dtype is not None and dtype.kind == "O" else value
    return kept
