"""The body of rows and batches: the safetensors layout, written and read without copying.

A body is an 8-byte little-endian length, a JSON header of that length padded with spaces so that the data begins
64-byte aligned, and the tensors back to back, little-endian, C order, by falling item size. The official
``safetensors`` package reads it (format: https://github.com/huggingface/safetensors#format). Several batches are such
bodies back to back.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import IO, Any, TypedDict

import numpy as np
import numpy.typing as npt

from .errors import BadAnswer
from .schema import Count, checked, read_json

MEDIA_TYPE = "application/x-safetensors"

ROWS = "__rows__"
"""Tensor of the int64 row ids, in every body."""

WEIGHT = "__weight__"
"""Tensor of float32 weights, in every body of a padded order: 1 for a row, 0 for a repeated one."""

OFFSETS = ".offsets"
"""Ending of the tensor (int64, rows + 1) that says where each row begins in a flat tensor of the name before it."""

ALIGNMENT = 64
"""Bytes: a cache line, and what JAX needs to take an array over without a copy."""

MAX_HEADER_BYTES = 16 << 20
"""Bytes: a hundred thousand tensors. The format allows more, which nobody needs and which takes much memory to read."""

_KEPT_HEADER_BYTES = 1 << 20
"""Headers up to this size are kept as they were read, for bodies that differ in their data only."""

DTYPE_NAMES: Mapping[str, str] = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<u2": "U16",
    "<i2": "I16",
    "<u4": "U32",
    "<i4": "I32",
    "<u8": "U64",
    "<i8": "I64",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
}
"""numpy's name of each little-endian dtype that travels, and the name in the header."""

_OPENING = b'{"__metadata__":{"index":"'
"""How every header begins; the digits of the index follow."""

_MOST_DIGITS = 18
"""Of an index that an int64 holds."""

_DTYPES = {name: np.dtype(code) for code, name in DTYPE_NAMES.items()}

Bytes = npt.NDArray[np.uint8]


def dtype_named(name: str) -> np.dtype[Any]:
    """numpy's dtype of a name in a header; without ``ml_dtypes``, bfloat16 is uint16."""
    if name != "BF16":
        return _DTYPES[name]
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype("<u2")
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@dataclass(frozen=True)
class Tensor:
    """One tensor of a body: its name, little-endian numpy dtype and whole shape.

    `is_bfloat16`: the dtype is that of two bytes, because numpy has no bfloat16 of its own.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_bfloat16: bool = False

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.is_bfloat16 else self.dtype.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Body:
    """Where everything lies in a body, known before a byte is read.

    All batches of one order whose tensors have equal shapes share one `Body`: only the digits of ``index`` differ, and
    the header is padded for the longest of them, so every such body has the same length.

    Parameters
    ----------
    tensors : sequence of Tensor
        In any order.
    metadata : mapping of str to str
        ``dataset``, ``revision``, ``epoch`` and ``batches``; ``index`` is added by `header`.
    """

    tensors: Sequence[Tensor]
    metadata: Mapping[str, str]

    @cached_property
    def _template(self) -> tuple[bytes, bytes, int]:
        """Header before and after the digits of the index, and the header's padded length."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        for tensor, (start, stop) in self._extents.items():
            entries[tensor.name] = {
                "dtype": "BF16" if tensor.is_bfloat16 else DTYPE_NAMES[tensor.dtype.str],
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
        after = b'",' + json.dumps(entries, separators=(",", ":")).encode().removeprefix(b'{"__metadata__":{')
        before = _OPENING
        longest = 8 + len(before) + len(self.metadata["batches"]) + len(after)
        return before, after, -(-longest // ALIGNMENT) * ALIGNMENT - 8

    @cached_property
    def _extents(self) -> dict[Tensor, tuple[int, int]]:
        extents = {}
        start = 0
        for tensor in sorted(self.tensors, key=lambda t: -t.dtype.itemsize):
            extents[tensor] = (start, start + tensor.nbytes)
            start += tensor.nbytes
        return extents

    @cached_property
    def data_start(self) -> int:
        """Bytes before the first tensor."""
        return 8 + self._template[2]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole body."""
        return self.data_start + sum(tensor.nbytes for tensor in self.tensors)

    def header(self, index: int) -> bytes:
        """Everything before the first tensor, for batch `index`."""
        before, after, length = self._template
        return struct.pack("<Q", length) + (b"%b%d%b" % (before, index, after)).ljust(length)

    def place(self, buffer: Bytes, index: int) -> dict[str, npt.NDArray[Any]]:
        """Write the header into `buffer` and return the tensors in it, to be filled.

        Parameters
        ----------
        buffer : (nbytes,) uint8
        index : int
            Number of the batch.
        """
        return {name: tensors[0] for name, tensors in self.place_many(buffer, index, 1).items()}

    def place_many(self, buffer: Bytes, index: int, count: int) -> dict[str, npt.NDArray[Any]]:
        """Same as `place`, for `count` bodies back to back: each tensor has one more axis in front, of that length.

        Parameters
        ----------
        buffer : (count * nbytes,) uint8
        index : int
            Number of the first batch.
        """
        start = self.data_start
        bodies = buffer.reshape(count, self.nbytes)
        done = 0
        while done < count:
            # Headers whose indices have as many digits differ in these digits only.
            first = index + done
            digits = len(str(first))
            alike = min(count - done, 10**digits - first)
            headers = bodies[done : done + alike, :start]
            headers[...] = np.frombuffer(self.header(first), np.uint8)
            if alike > 1:
                place = 8 + len(_OPENING)
                powers = 10 ** np.arange(digits - 1, -1, -1)
                headers[:, place : place + digits] = np.arange(first, first + alike)[:, None] // powers % 10 + ord("0")
            done += alike
        return {
            tensor.name: bodies[:, start + first : start + stop].view(tensor.dtype).reshape(count, *tensor.shape)
            for tensor, (first, stop) in self._extents.items()
        }


@dataclass(frozen=True)
class _Header:
    """What a header says: of each tensor the name, dtype, shape and extent in the data; the metadata; and the bytes
    of all tensors together."""

    tensors: list[tuple[str, np.dtype[Any], tuple[int, ...], int, int]]
    metadata: dict[str, str]
    nbytes: int


class _Entry(TypedDict):
    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


def _read_header(text: bytes) -> _Header:
    """What a header says, if its tensors lie back to back: none over another, and nothing between them.

    Raises
    ------
    ValueError, BadAnswer
    """
    entries = read_json(text)
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    metadata = checked(entries.pop("__metadata__", {}), dict[str, str], "metadata")
    tensors = []
    for name, entry in checked(entries, dict[str, _Entry], "header").items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] != "BF16" and entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} is of the unknown dtype {entry['dtype']!r}")
        dtype, shape = dtype_named(entry["dtype"]), tuple(entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} is of shape {list(shape)} and {dtype.name}, but has {stop - start} bytes")
        tensors.append((name, dtype, shape, start, stop))
    end = 0
    for name, _, _, start, stop in sorted(tensors, key=lambda tensor: tensor[3:]):
        if start != end:
            raise ValueError(f"{name!r} begins at {start}, but what lies before it ends at {end}")
        end = stop
    return _Header(tensors, metadata, end)


_kept_header = lru_cache(maxsize=16)(_read_header)


def read_body(buffer: Bytes) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str], int]:
    """Views of the first body in `buffer`; nothing is copied.

    Returns
    -------
    tensors : dict of str to ndarray
    metadata : dict of str to str
    nbytes : int
        Length of the body: the next one, if any, begins there.

    Raises
    ------
    BadAnswer
        The buffer does not hold a whole, well-formed body.
    """
    try:
        (length,) = struct.unpack_from("<Q", buffer)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes")
        text = buffer[8 : 8 + length].tobytes()
        index = None
        if text.startswith(_OPENING):
            # Batches of an epoch differ in the index only: without it, their headers are parsed once.
            index, quote, rest = text[len(_OPENING) :].partition(b'"')
            text = _OPENING + quote + rest
        header = (_kept_header if length <= _KEPT_HEADER_BYTES else _read_header)(text)
        metadata = dict(header.metadata)
        if index is not None:
            metadata["index"] = index.decode("ascii")
        data_start, end = 8 + length, 8 + length + header.nbytes
        if end > len(buffer):
            raise ValueError(f"its header tells of {end} bytes, but it has {len(buffer)}")
        tensors = {
            name: buffer[data_start + start : data_start + stop].view(dtype).reshape(shape)
            for name, dtype, shape, start, stop in header.tensors
        }
    except (ValueError, struct.error) as error:
        raise BadAnswer(f"the answer is not a whole safetensors body: {error}") from None
    return tensors, metadata, end


def write_npz(stream: IO[bytes], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Same as `numpy.savez`, for any names, and with the same bytes each time; bfloat16 as uint16."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                known = array if array.dtype.kind in "biufc" else array.view("<u2")
                np.lib.format.write_array(member, known, allow_pickle=False)


@dataclass(frozen=True)
class Run:
    """Bodies back to back that differ in their index and in their data only.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Of all bodies together: one more axis in front, of length ``len(indices)``.
    metadata : dict of str to str
        Of the first.
    indices : list of int
    """

    tensors: dict[str, npt.NDArray[Any]]
    metadata: dict[str, str]
    indices: list[int]


def read_runs(buffer: Bytes) -> Iterator[Run]:
    """The bodies that lie back to back in `buffer`; nothing is copied.

    Raises
    ------
    BadAnswer
        What comes next is no whole body.
    """
    while len(buffer):
        tensors, metadata, nbytes = read_body(buffer)
        if buffer[8 : 8 + len(_OPENING)].tobytes() != _OPENING:
            raise BadAnswer("the answer is no batch: its header does not begin with the index")
        if not 0 < len(metadata["index"]) <= _MOST_DIGITS:
            raise BadAnswer("the answer is no batch: its index is no number that there can be")
        # headers: (bodies that there is room for, bytes of a header)
        bodies = buffer[: len(buffer) // nbytes * nbytes].reshape(-1, nbytes)
        headers = bodies[:, : 8 + int(struct.unpack_from("<Q", buffer)[0])]
        digits = slice(8 + len(_OPENING), 8 + len(_OPENING) + len(metadata["index"]))
        alike = headers == headers[0]
        alike[:, digits] = (headers[:, digits] >= ord("0")) & (headers[:, digits] <= ord("9"))
        differing = np.flatnonzero(~alike.all(axis=1))
        count = int(differing[0]) if len(differing) else len(bodies)
        if not count:
            raise BadAnswer(f"the answer is no batch: its index is {metadata['index']!r}")
        powers = 10 ** np.arange(digits.stop - digits.start - 1, -1, -1)
        indices = ((headers[:count, digits] - ord("0")) @ powers).tolist()
        origin = buffer.ctypes.data
        stacked = {}
        for name, tensor in tensors.items():
            first = tensor.ctypes.data - origin if tensor.size else 0
            raw = bodies[:count, first : first + tensor.nbytes]
            stacked[name] = raw.view(tensor.dtype).reshape(count, *tensor.shape)
        yield Run(stacked, metadata, indices)
        buffer = buffer[count * nbytes :]
