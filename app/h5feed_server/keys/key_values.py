"""The values of a field that rows are found by: integers or text, their hashes, and keys from requests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge, UnsupportedField

from ..catalog.dataset import Dataset, Field
from ..storage.reader import Reader

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

HASH_VERSION = 1
"""Part of the names of indexes; changes whenever a hash changes."""

_BLOCK = 1 << 18
"""Rows read at a time, fewer where they are long."""

_BLOCK_BYTES = 16 << 20

_HASHED_BYTES = 256
"""Of longer texts, only the first and the last half of so many bytes are hashed: keys are compared in full anyway."""

_LANE = 8
"""Bytes hashed at a time."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,30}", re.ASCII)


def key_field(dataset: Dataset, name: str) -> Field:
    """The field that rows are found by.

    Raises
    ------
    FieldNotFound
    UnsupportedField
        It does not have one integer or text per row.
    """
    field = dataset.field(name)
    is_one = field.is_text or (not field.is_ragged and math.prod(field.sample_shape) == 1)
    if not is_one or field.images is not None or (not field.is_text and field.dtype.kind not in "iu"):
        raise UnsupportedField(
            f"key={name}: rows are found by a field with one integer or text per row, but a row of {name!r} is "
            f"{'a list' if field.is_ragged else list(field.sample_shape)} of {field.type_name}"
        )
    return field


def keys_of(field: Field, keys: Sequence[str | int]) -> list[bytes] | list[int]:
    """Keys from a request as values of the field: UTF-8 of text, or integers.

    Raises
    ------
    BadParameter
        A key is no integer, but the field has integers.
    """
    if field.is_text:
        return [str(key).encode("utf-8", "surrogatepass") for key in keys]
    found = []
    for key in keys:
        if isinstance(key, str) and not _WHOLE.fullmatch(key):
            raise BadParameter(f"{field.name!r} has integers, so {key[:100]!r} cannot be one of its values")
        found.append(int(key))
    return found


def hashes_of_keys(keys: list[bytes] | list[int]) -> UInt64s:
    """Hashes of keys from `keys_of`, (k,); integers that do not fit into 64 bits have any hash."""
    if keys and isinstance(keys[0], bytes):
        texts: list[Any] = keys
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        return hash_texts(np.frombuffer(b"".join(texts), np.uint8), offsets)
    return hash_integers(np.array([int(key) & 0xFFFF_FFFF_FFFF_FFFF for key in keys], np.uint64))


def values_of(reader: Reader, field: Field, rows: Int64s) -> list[bytes] | list[int]:
    """The values of rows, as `keys_of` gives them."""
    column = field.column
    if not field.is_text:
        out = np.empty((len(rows), *column.sample_shape), column.dtype)
        reader.read(column, rows, out)
        numbers: list[int] = out.reshape(-1).tolist()
        return numbers
    found: list[bytes] = []
    step = _block_rows(reader, field)
    for first in range(0, len(rows), step):
        items, offsets = reader.read_ragged(column, rows[first : first + step])
        data, ends = items.tobytes(), offsets.tolist()
        found += [data[begin:end] for begin, end in pairwise(ends)]
    return found


def hashes_of_rows(reader: Reader, field: Field) -> Iterator[UInt64s]:
    """The hashes of all rows in order, in blocks."""
    column = field.column
    start, step = 0, _block_rows(reader, field)
    while start < column.rows:
        stop = min(start + step, column.rows)
        if field.is_text:
            try:
                yield hash_texts(*reader.read_ragged(column, np.arange(start, stop, dtype=np.int64)))
            except TooLarge:
                # Texts are much longer here than elsewhere in the field: read fewer at once.
                if step == 1:
                    raise
                step = max(1, step // 8)
                continue
        else:
            block = reader.read_block(column, start, stop).reshape(-1)
            yield hash_integers(block.astype(np.int64 if block.dtype.kind == "i" else np.uint64).view(np.uint64))
        start = stop


def hash_integers(values: UInt64s) -> UInt64s:
    """A bijection of 64 bits; negative integers are given modulo 2⁶⁴."""
    return _mix(values + np.uint64(0x9E37_79B9_7F4A_7C15))


def hash_texts(items: npt.NDArray[np.uint8], offsets: Int64s) -> UInt64s:
    """Hashes of texts, (k,).

    Parameters
    ----------
    items : (n,) uint8
    offsets : (k + 1,) int64
        Where each text begins.
    """
    lengths = np.diff(offsets)
    hashes = _mix(lengths.astype(np.uint64))
    half = _HASHED_BYTES // 2
    is_long = lengths > _HASHED_BYTES
    parts = [(offsets[:-1], np.where(is_long, half, lengths))]
    if is_long.any():
        parts.append((offsets[1:] - half, np.where(is_long, half, 0)))
    for begins, sizes in parts:
        active = np.arange(len(sizes))
        for first in range(0, _HASHED_BYTES, _LANE):
            active = active[sizes[active] > first]
            if not len(active):
                break
            # lanes: (active, 8), the next bytes of each text that has some; 0 behind its end
            within = first + np.arange(_LANE)
            places = begins[active, None] + within
            lanes = items[np.minimum(places, len(items) - 1)]
            lanes[within >= sizes[active, None]] = 0
            hashes[active] = _mix(hashes[active] ^ lanes.view("<u8").reshape(-1))
    return hashes


def _mix(values: UInt64s) -> UInt64s:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31)) ^ np.uint64(0x2545_F491_4F6C_DD1D)


def _block_rows(reader: Reader, field: Field) -> int:
    column = field.column
    row_bytes = max(16, column.row_bytes, reader.typical_items(column) if field.is_text else 0)
    step = max(1, min(_BLOCK, _BLOCK_BYTES // row_bytes))
    return max(1, step // field.block_rows) * field.block_rows if step > field.block_rows else step
