"""The wire format of rows and batches: safetensors, read and written without copying.

A body consists of an 8-byte little-endian length, a JSON header of that length, padded with spaces so that the data is
64-byte aligned, and the tensors one after another: little-endian, C order, by descending item size. The official
``safetensors`` package can read it (format: https://github.com/huggingface/safetensors#format). Several batches are
several concatenated bodies.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import IO, Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from .errors import BadAnswer
from .schema import Count, checked, read_json

MEDIA_TYPE = "application/x-safetensors"

WAIT_HEADER = "h5feed-wait"
"""Request header: ``waited=0.812, of=2.104`` are the seconds that a loop waited for batches, and the seconds since its
last report; a dictionary of RFC 9651. ``read=1048576`` are the bytes of rows that this client read from files since its
last report. The server's page and metrics show them."""

ROWS = "__rows__"
"""Tensor of the int64 row ids, in every body."""

WORTHWHILE = 1.2
"""Rows are sent in another form, such as chunks or image files, if they have at least this many times as many bytes."""

WEIGHT = "__weight__"
"""Tensor of float32 weights, in every body of a padded order: 1 for a row, 0 for a padding row."""

CROP = "__crop__"
"""Name of the tensor with the starts of crops, see `h5feed.crops`."""

EPISODE = "__episode__"
"""Tensor of the episode of each sample, in bodies of row ids: its first row, and the row after its last one."""

ITEMS = "__items__"
"""Tensor of the items of each packed row's rows, in bodies of row ids: the first, and how many."""

OFFSETS = ".offsets"
"""Suffix of the tensor (int64, rows + 1) with the start of each row in the flat tensor of the same name."""

DATA, INDICES, INDPTR = ".data", ".indices", ".indptr"
"""Suffixes of the tensors of sparse rows, as in scipy's ``csr_matrix``: the stored values, their column indices, and
the start of each row in both (int64, rows + 1)."""

ALIGNMENT = 64
"""Bytes: a cache line, and the alignment that JAX needs to use an array without a copy."""

MAX_HEADER_BYTES = 16 << 20
"""Bytes: enough for a hundred thousand tensors. The format allows more, which would take much memory to parse."""

_KEPT_HEADER_BYTES = 1 << 20
"""Parsed headers up to this size are cached, for bodies that differ only in their data."""

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
"""The dtypes that can be sent: numpy's name, little-endian, and the name in the header."""

_OPENING = b'{"__metadata__":{"index":"'
"""The start of every header; the digits of the index follow."""

_MOST_DIGITS = 18
"""Maximum number of digits of an index: fits into an int64."""

_DTYPES = {name: np.dtype(code) for code, name in DTYPE_NAMES.items()}

Bytes = npt.NDArray[np.uint8]


def dtype_named(name: str) -> np.dtype[Any]:
    """The numpy dtype for a name in a header. Without ``ml_dtypes``, bfloat16 becomes uint16."""
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
    """One tensor of a body: its name, little-endian numpy dtype and full shape.

    `is_bfloat16`: the dtype is a two-byte stand-in, because numpy has no bfloat16.
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


def rows_of_other(dataset: str) -> str:
    """Tensor of the rows that a dataset joined by key has in samples, in bodies of row ids."""
    return f"{dataset}/{ROWS}"


@dataclass(frozen=True)
class Body:
    """The layout of a body, known before any data is read.

    All batches of an order with the same tensor shapes share one `Body`. Their headers differ only in the digits of
    ``index`` and are padded for the longest one, so that all bodies have the same length.

    Parameters
    ----------
    tensors : sequence of Tensor
        In any order.
    metadata : mapping of str to str
        ``dataset``, ``revision``, ``epoch`` and ``batches``; `header` adds ``index``.
    """

    tensors: Sequence[Tensor]
    metadata: Mapping[str, str]

    @cached_property
    def _template(self) -> tuple[bytes, bytes, int]:
        """The header before and after the digits of the index, and its padded length."""
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
        """Size of the whole body in bytes."""
        return self.data_start + sum(tensor.nbytes for tensor in self.tensors)

    def begin(self, name: str) -> int:
        """Where a tensor begins, in bytes from the beginning of the body."""
        return self.data_start + next(first for tensor, (first, _) in self._extents.items() if tensor.name == name)

    def header(self, index: int) -> bytes:
        """Everything before the first tensor, for batch `index`."""
        before, after, length = self._template
        return struct.pack("<Q", length) + (b"%b%d%b" % (before, index, after)).ljust(length)

    def place(self, buffer: Bytes, index: int) -> dict[str, npt.NDArray[Any]]:
        """Write the header into `buffer` and return its tensors, to be filled by the caller.

        Parameters
        ----------
        buffer : (nbytes,) uint8
        index : int
            Index of the batch.
        """
        return {name: tensors[0] for name, tensors in self.place_many(buffer, index, 1).items()}

    def place_many(self, buffer: Bytes, index: int, count: int) -> dict[str, npt.NDArray[Any]]:
        """Same as `place`, for `count` concatenated bodies. Each tensor has an additional first axis of that length.

        Parameters
        ----------
        buffer : (count * nbytes,) uint8
        index : int
            Index of the first batch.
        """
        start = self.data_start
        bodies = buffer.reshape(count, self.nbytes)
        done = 0
        while done < count:
            # Headers whose indices have the same number of digits differ only in these digits.
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


class TensorPlace(NamedTuple):
    """A tensor in a body, and its bytes `start` … `stop`-1 behind the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Header:
    """A parsed header: the tensors, the metadata, and the bytes of all tensors."""

    tensors: list[TensorPlace]
    metadata: dict[str, str]
    nbytes: int


class _Entry(TypedDict):
    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


def _read_header(text: bytes) -> _Header:
    """Parse a header. The tensors must be contiguous, without overlaps or gaps.

    Raises
    ------
    ValueError, BadAnswer
    """
    entries = read_json(text)
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    metadata = checked(entries.pop("__metadata__", {}), dict[str, str], "metadata")
    tensors = []
    for name, entry in checked(entries, dict[str, _Entry], "header").items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] != "BF16" and entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
        dtype, shape = dtype_named(entry["dtype"]), tuple(entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} has shape {list(shape)} and dtype {dtype.name}, but {stop - start} bytes")
        tensors.append(TensorPlace(name, dtype, shape, start, stop))
    end = 0
    for name, _, _, start, stop in sorted(tensors, key=lambda tensor: tensor[3:]):
        if start != end:
            raise ValueError(f"{name!r} starts at byte {start}, but the previous tensor ends at {end}")
        end = stop
    return _Header(tensors, metadata, end)


_kept_header = lru_cache(maxsize=16)(_read_header)


def read_header(text: bytes) -> tuple[list[TensorPlace], dict[str, str], int]:
    """The tensors of a body, its metadata, and the bytes behind its header, from the header without its length.

    Raises
    ------
    BadAnswer
    """
    try:
        header = _read_header(text)
    except ValueError as error:
        raise BadAnswer(f"the response is not a complete safetensors body: {error}") from None
    return header.tensors, header.metadata, header.nbytes


def read_body(buffer: Bytes) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str], int]:
    """Views of the first body in `buffer`, without copying.

    Returns
    -------
    tensors : dict of str to ndarray
    metadata : dict of str to str
    nbytes : int
        Length of the body, where the next one starts.

    Raises
    ------
    BadAnswer
        The buffer does not contain a complete, well-formed body.
    """
    try:
        (length,) = struct.unpack_from("<Q", buffer)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
        text = buffer[8 : 8 + length].tobytes()
        index = None
        if text.startswith(_OPENING):
            # Headers of an epoch differ only in the index: without it, they are parsed once.
            index, quote, rest = text[len(_OPENING) :].partition(b'"')
            text = _OPENING + quote + rest
        header = (_kept_header if length <= _KEPT_HEADER_BYTES else _read_header)(text)
        metadata = dict(header.metadata)
        if index is not None:
            metadata["index"] = index.decode("ascii")
        data_start, end = 8 + length, 8 + length + header.nbytes
        if end > len(buffer):
            raise ValueError(f"its header announces {end} bytes, but it has {len(buffer)}")
        tensors = {
            name: buffer[data_start + start : data_start + stop].view(dtype).reshape(shape)
            for name, dtype, shape, start, stop in header.tensors
        }
    except (ValueError, struct.error) as error:
        raise BadAnswer(f"the response is not a complete safetensors body: {error}") from None
    return tensors, metadata, end


def write_npz(stream: IO[bytes], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Same as `numpy.savez`, but with arbitrary names and reproducible output; bfloat16 is saved as uint16."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                known = array if array.dtype.kind in "biufc" else array.view("<u2")
                np.lib.format.write_array(member, known, allow_pickle=False)


@dataclass(frozen=True)
class Run:
    """Concatenated bodies that differ only in their index and data.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Tensors of all bodies, with an additional first axis of length ``len(indices)``.
    metadata : dict of str to str
        Metadata of the first body.
    indices : list of int
    """

    tensors: dict[str, npt.NDArray[Any]]
    metadata: dict[str, str]
    indices: list[int]


def read_runs(buffer: Bytes) -> Iterator[Run]:
    """The concatenated bodies in `buffer`, without copying.

    Raises
    ------
    BadAnswer
        The next body is incomplete or malformed.
    """
    while len(buffer):
        tensors, metadata, nbytes = read_body(buffer)
        if buffer[8 : 8 + len(_OPENING)].tobytes() != _OPENING:
            raise BadAnswer("the response is not a batch: its header does not start with the index")
        if not 0 < len(metadata["index"]) <= _MOST_DIGITS:
            raise BadAnswer("the response is not a batch: its index is not a valid number")
        # headers: (number of bodies that fit, bytes of a header)
        bodies = buffer[: len(buffer) // nbytes * nbytes].reshape(-1, nbytes)
        headers = bodies[:, : 8 + int(struct.unpack_from("<Q", buffer)[0])]
        digits = slice(8 + len(_OPENING), 8 + len(_OPENING) + len(metadata["index"]))
        alike = headers == headers[0]
        alike[:, digits] = (headers[:, digits] >= ord("0")) & (headers[:, digits] <= ord("9"))
        differing = np.flatnonzero(~alike.all(axis=1))
        count = int(differing[0]) if len(differing) else len(bodies)
        if not count:
            raise BadAnswer(f"the response is not a batch: its index is {metadata['index']!r}")
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
