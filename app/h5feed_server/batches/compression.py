"""Compresses rows of a field for slow links, as chunks that clients decode like those of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.stored.codecs import SHUFFLE
from h5feed.stored.column import Column
from h5feed.stored.layout import ArrayLayout, ChunkTable, Filter

from ..storage.reader import Reader

CHUNK_BYTES = 256 << 10
"""Maximum size of a chunk of several rows. Larger chunks compress hardly better, and fewer threads can work on them."""

WORK_BYTES = 4 << 20
"""Bytes of rows that are read and compressed at once. Larger rows are not compressed."""

MIN_BYTES = 16 << 10
"""Smaller fields are not compressed: their description takes more bytes than compression saves."""

_ZSTD, _LEVEL = 32015, 1
"""HDF5's number of the filter. Level 1, because others take several times as long for a few percent."""

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """Compressed rows.

    Attributes
    ----------
    array : ArrayLayout
        Of the rows, in the order in which they were given. Offsets are relative to where the first chunk is.
    nbytes : int
        Of all chunks, which follow each other.
    """

    array: ArrayLayout
    nbytes: int


def is_raw(column: Column) -> bool:
    """Whether rows are stored as numbers without compression, one by one."""
    if column.is_ragged or column.images is not None:
        return False
    return not any(one.array.by_h5py or one.array.filters or one.transposed for one in column.segments)


def refusal(column: Column, rows: int) -> str | None:
    """Why so many rows of a raw column are not compressed, whatever they contain; None if they may be."""
    if column.row_bytes > WORK_BYTES:
        return f"rows of {column.row_bytes:,} bytes are larger than the limit of {WORK_BYTES:,} bytes for compression"
    if rows * column.row_bytes < MIN_BYTES:
        return f"{rows * column.row_bytes:,} bytes are too few to compress"
    return None


def compress(
    reader: Reader, column: Column, name: str, rows: Int64s, out: Bytes, work: Bytes, gain: float
) -> Packed | None:
    """Read rows, and compress them into `out`.

    Parameters
    ----------
    reader : Reader
    column : Column
        Raw, and not refused.
    name : str
        Of the field.
    rows : (k,) int64
        Row ids, in any order.
    out : (n,) uint8
        As long as the rows are.
    work : (WORK_BYTES,) uint8
        For rows that are being compressed. Page-aligned.
    gain : float
        Minimum ratio of the bytes of the rows to all bytes that are sent for them.

    Returns
    -------
    Packed or None
        None if this ratio is not reached.
    """
    dtype, row_bytes = column.dtype, column.row_bytes
    height = min(len(rows), max(1, CHUNK_BYTES // row_bytes))
    chunk_bytes = height * row_bytes
    together = max(1, len(work) // chunk_bytes) * height
    chunks = -(-len(rows) // height)
    # Besides the data, four int64 are sent for each chunk, and one for each row.
    limit = int(len(rows) * row_bytes / gain) - 8 * (4 * chunks + len(rows))
    sizes: list[int] = []
    used = 0
    for first in range(0, len(rows), together):
        wanted = rows[first : first + together]
        count, nbytes = -(-len(wanted) // height), len(wanted) * row_bytes
        raw = work[: count * chunk_bytes]
        # The last chunk is padded to the size of the others.
        raw[nbytes:] = 0
        reader.read(column, wanted, raw[:nbytes].view(dtype).reshape(len(wanted), *column.sample_shape))
        for data in _encoded(reader, raw.reshape(count, chunk_bytes), dtype.itemsize):
            if used + len(data) > limit:
                return None
            out[used : used + len(data)] = np.frombuffer(data, np.uint8)
            used += len(data)
            sizes.append(len(data))
    table = np.array(sizes, np.int64)
    shuffle = [Filter(SHUFFLE, "shuffle", (dtype.itemsize,))] if dtype.itemsize > 1 else []
    array = ArrayLayout(
        name,
        (len(rows), *column.sample_shape),
        dtype.str,
        chunk_shape=(height, *column.sample_shape),
        filters=(*shuffle, Filter(_ZSTD, "zstd", (_LEVEL,))),
        fill=bytes(dtype.itemsize),
        chunks=ChunkTable(np.arange(chunks), np.cumsum(table) - table, table, np.zeros(chunks, np.int64)),
        is_bfloat16=column.is_bfloat16,
    )
    return Packed(array, used)


def _encoded(reader: Reader, raw: Bytes, itemsize: int) -> list[bytes]:
    """Each row of `raw`, shuffled and compressed."""
    found: list[bytes] = [b""] * len(raw)

    def work(remaining: Iterator[int]) -> None:
        for number in remaining:
            data = raw[number]
            if itemsize > 1:
                data = reader.scratch("to compress", len(data))
                # HDF5's byte shuffle: the first bytes of all elements, then the second ones …
                data.reshape(itemsize, -1)[...] = raw[number].reshape(-1, itemsize).T
            found[number] = bytes(imagecodecs.zstd_encode(data, _LEVEL))

    reader.share(range(len(raw)), work)
    return found
