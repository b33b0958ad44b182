"""Decodes HDF5's n-bit and scale-offset filters, which store numbers with fewer bits than they have in memory."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt

from .codec_interface import Options, Source, prefix
from .scratch import Bytes

_PIECE = 1 << 14
"""Elements unpacked at a time, so that temporaries stay in the processor's cache; a multiple of 8."""


def _unpack(packed: Source, bits: int, count: int) -> npt.NDArray[Any]:
    """Unpack integers that are packed with the most significant bit first.

    Parameters
    ----------
    packed : (n,) uint8
    bits : int
        Bits of each integer, up to 64.
    count : int

    Returns
    -------
    (count,) unsigned integers

    Raises
    ------
    ValueError
        `packed` holds fewer than `count` integers.
    """
    nbytes = -(-count * bits // 8)
    if len(packed) < nbytes:
        raise ValueError(f"it has {len(packed)} bytes instead of {nbytes}")
    packed = packed[:nbytes]
    if bits == 24:
        # imagecodecs decodes these wrongly in its older versions.
        words = np.zeros((count, 4), np.uint8)
        words[:, 1:] = packed.reshape(count, 3)
        return words.reshape(-1).view(">u4")
    if bits <= 32 or bits == 64:
        if bits in (3, 5, 6, 7):
            # imagecodecs reads a byte past the end of these.
            packed = np.append(packed, np.uint8(0))[:nbytes]
        # imagecodecs does not swap the bytes of whole machine words: they stay big-endian.
        dtype = {8: "u1", 16: ">u2", 32: ">u4", 64: ">u8"}.get(
            bits, "u1" if bits < 8 else "=u2" if bits < 16 else "=u4"
        )
        unpacked: npt.NDArray[Any] = imagecodecs.packints_decode(packed, np.dtype(dtype), bits, runlen=count)
        return unpacked
    # Groups of 8 integers take `bits` bytes each, and have the same bit positions in every group.
    groups = np.zeros((-(-count // 8), bits), np.uint8)
    groups.reshape(-1)[:nbytes] = packed
    wide = groups.T.astype(np.uint64)
    integers = np.zeros((len(groups), 8), np.uint64)
    for place in range(8):
        begin, end = place * bits, (place + 1) * bits
        for byte in range(begin // 8, -(-end // 8)):
            shift = end - 8 * (byte + 1)
            integers[:, place] |= wide[byte] << np.uint64(shift) if shift >= 0 else wide[byte] >> np.uint64(-shift)
    integers &= np.uint64((1 << bits) - 1)
    return integers.reshape(-1)[:count]


def _pieces(source: Source, bits: int, values: npt.NDArray[Any]) -> Any:
    """Yield pieces of `values` with the integers unpacked for them."""
    for begin in range(0, len(values), _PIECE):
        piece = values[begin : begin + _PIECE]
        yield piece, _unpack(source[begin // 8 * bits :], bits, len(piece))


class _Nbit(NamedTuple):
    elements: int
    dtype: str
    precision: int
    offset: int


def nbit_options(options: Options) -> _Nbit:
    # Number of options, "nothing to do" flag, number of elements, then the type. Type 2 (array): bytes, element type.
    # Type 1 (integer or float): bytes, byte order, number of significant bits, number of bits below them.
    count, kind, size = options[2:5]
    rest = options[5:]
    while kind == 2:
        count, (kind, size) = count * size, rest[:2]
        rest = rest[2:]
        count //= size
    if kind != 1:
        raise ValueError("it packs elements that are neither integers nor floats")
    order, precision, offset = rest[:3]
    if size not in (1, 2, 4, 8) or order > 1 or not 0 < precision <= 8 * size - offset:
        raise ValueError(f"its options are {options}")
    return _Nbit(count, f"{'<>'[order]}u{size}", precision, offset)


def nbit(source: Source, out: Bytes, options: Options) -> int:
    """Decode the n-bit filter. It stores only the significant bits: the others become 0, without sign extension."""
    count, dtype, precision, offset = nbit_options(options)
    values = prefix(out, count * np.dtype(dtype).itemsize).view(dtype)
    native = values.dtype.newbyteorder("=").type
    for piece, integers in _pieces(source, precision, values):
        piece[...] = integers.astype(native) << native(offset) if offset else integers
    return values.nbytes


class _Scaleoffset(NamedTuple):
    elements: int
    dtype: str
    decimals: int
    fill: bytes | None


def scaleoffset_options(options: Options) -> _Scaleoffset:
    # Scale type, scale factor, number of elements; class, bytes, sign and byte order of the type; whether a fill value
    # follows.
    scale, factor, count, kind, size, _, order, filled = options[:8]
    if (scale, kind) not in ((2, 0), (0, 1)) or size not in ((1, 2, 4, 8), (4, 8))[kind] or order > 1:
        raise ValueError(f"its options are {options}")
    fill = struct.pack("<2I", *(*options[8:10], 0)[:2])[:size] if filled else None
    return _Scaleoffset(count, f"{'<>'[order]}{'uf'[kind]}{size}", (factor + (1 << 31)) % (1 << 32) - (1 << 31), fill)


def scaleoffset(source: Source, out: Bytes, options: Options) -> int:
    """Decode the scale-offset filter.

    It stores differences from the chunk's minimum, in as few bits as they need; of floats, as multiples of a power of
    10. The chunk begins with the number of bits of a difference (4 bytes), the size of the minimum (1 byte) and the
    minimum (16 bytes), all little-endian. A difference with all bits set stands for the fill value.
    """
    count, dtype, decimals, fill = scaleoffset_options(options)
    values = prefix(out, count * np.dtype(dtype).itemsize).view(dtype)
    native = values.dtype.newbyteorder("=").type
    size = values.itemsize
    bits, minimum_bytes = struct.unpack_from("<IB", source)
    minimum = source[5 : 5 + min(minimum_bytes, 8)].tobytes().ljust(8, b"\0")
    differences = source[21:]
    if bits > 8 * size or len(source) < 21:
        raise ValueError(f"it claims {bits} bits for elements of {size} bytes")
    if bits == 8 * size:
        # Stored unpacked, in the byte order of the machine that wrote them. Assume little-endian, as nearly all are.
        values[...] = prefix(differences, values.nbytes).view(values.dtype.newbyteorder("<"))
        return values.nbytes
    ones = (1 << bits) - 1
    base = np.frombuffer(minimum[:size], values.dtype.newbyteorder("<"))[0]
    fill_value = None if fill is None else np.frombuffer(fill, values.dtype.newbyteorder("<"))[0]
    power = native(math.pow(10.0, decimals)) if values.dtype.kind == "f" else None
    with np.errstate(all="ignore"):
        for piece, integers in _pieces(differences, bits, values) if bits else ((values, np.zeros((), np.uint8)),):
            numbers = integers.astype(native)
            restored = (numbers if power is None else numbers / power) + base
            piece[...] = restored if fill_value is None else np.where(integers == ones, fill_value, restored)
    return values.nbytes
