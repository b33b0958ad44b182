"""Decodes the Blosc2 filter of HDF5: a frame with one chunk, which may be divided into n-dimensional blocks."""

from __future__ import annotations

import math
import struct
from itertools import product
from typing import Any

import imagecodecs
import numpy as np

from .codec_interface import Options, Source, prefix, scratch
from .scratch import Bytes

_MAX_PADDING = 8
"""Maximum size of the padded blocks of an n-dimensional frame, in multiples of the chunk. Padding less than doubles an
axis, and in practice only a few axes are padded."""


def blosc2(source: Source, out: Bytes, options: Options) -> int:
    """Decode a contiguous Blosc2 frame of one chunk. If its header says so, the chunk has n-dimensional blocks."""
    data: Any = memoryview(source)
    if data[2:10] != b"b2frame\0":
        raise ValueError("it is not a Blosc2 frame")
    (header,) = struct.unpack_from(">i", data, 11)
    nbytes: int
    nbytes, stored = struct.unpack_from(">qxq", data, 30)
    (itemsize,) = struct.unpack_from(">i", data, 48)
    if header < 87 or stored < 0 or header + stored > len(data):
        raise ValueError(f"its frame claims {header} and {stored} bytes, but has {len(data)}")
    grid = _blosc2_grid(data[:header])
    if grid is not None:
        shape, block = grid
        padded_bytes = math.prod(-(-n // b) * b for n, b in zip(shape, block, strict=True)) * itemsize
        nbytes = math.prod(shape) * itemsize
    target = prefix(out, nbytes)
    if stored == 0:
        _blosc2_constant(data[header:], itemsize, target)
        return nbytes
    chunk = data[header : header + stored]
    # Blocks that span the chunk along all axes but the first are in the order of the chunk: no rearranging is needed.
    decoded = target
    if grid is not None and (padded_bytes != nbytes or block[1:] != shape[1:]):
        if padded_bytes > _MAX_PADDING * len(out):
            raise ValueError(f"its blocks of shape {block} are padded to {padded_bytes} bytes")
        decoded = scratch.take("blocks", padded_bytes)
    if _blosc2_chunk_bytes(chunk) != len(decoded):
        raise ValueError(f"its chunk does not have {len(decoded)} bytes")
    if len(imagecodecs.blosc2_decode(chunk, numthreads=1, out=memoryview(decoded))) != len(decoded):
        raise ValueError("it ends early")
    if decoded is not target:
        _unblock(decoded, target, shape, block, itemsize)
    return nbytes


def _blosc2_constant(index: Source, itemsize: int, out: Bytes) -> None:
    """Fill `out` with a constant. The index of a frame without chunks holds a code for the value, not an offset."""
    (stored,) = struct.unpack_from("<12xi", index)
    index = index[: max(stored, 0)]
    code = bytearray(8)
    if _blosc2_chunk_bytes(index) != 8 or len(imagecodecs.blosc2_decode(index, numthreads=1, out=code)) != 8:
        raise ValueError("its index is not that of one chunk")
    if code[7] in (0x81, 0x84):
        # Zeros, or never written.
        out[...] = 0
    elif code[7] == 0x82 and itemsize in (4, 8) and len(out) % itemsize == 0:
        out.view(f"<f{itemsize}")[...] = np.nan
    else:
        raise ValueError(f"its frame has no chunk, but the unknown code {code.hex()}")


def _blosc2_chunk_bytes(chunk: Source) -> int:
    """Return the decoded size of a Blosc2 chunk.

    Raises
    ------
    ValueError
        The chunk must not be passed to the library: it has a wrong length, or would run plug-ins.
    """
    flags, nbytes, _, stored = struct.unpack_from("<2xBx3i", chunk)
    if stored != len(chunk):
        raise ValueError(f"its chunk claims {stored} bytes, but has {len(chunk)}")
    if flags >> 5 > 4:
        raise ValueError(f"its chunk needs the codec plug-in {flags >> 5}")
    if flags & 5 == 5:
        extended = struct.unpack_from("<6B9xB", chunk, 16)
        *filters, kind = extended
        # Filters above 4 are plug-ins. Kinds: 8 is a lazy chunk with parts elsewhere, 128 an instrumented chunk, and 4
        # in the three bits between them tells the library to leave the memory uninitialised.
        if max(filters) > 4 or kind & 0x88 or kind >> 4 & 7 == 4:
            raise ValueError(f"its chunk is of the kind {kind} and needs the filters {filters}")
    return int(nbytes)


def _blosc2_grid(header: Source) -> tuple[Options, Options] | None:
    """Shape and block shape of the chunk, from the metalayer "b2nd" or "caterva" of the header; None without one."""
    (layers,) = struct.unpack_from(">H", header, 92)
    position = 94
    for _ in range(layers):
        name_bytes = header[position] & 0x1F
        name = header[position + 1 : position + 1 + name_bytes]
        (content,) = struct.unpack_from(">i", header, position + 2 + name_bytes)
        position += 6 + name_bytes
        if name in (b"b2nd", b"caterva"):
            # msgpack: bin32 (5 bytes), array, version, axes, then three arrays of int64, int32 and int32.
            axes = header[content + 7]
            begin = content + 8
            if not 1 <= axes <= 8:
                raise ValueError(f"its blocks have {axes} axes")
            shape = struct.unpack_from(">x" + "xq" * axes, header, begin)
            chunk_shape = struct.unpack_from(">x" + "xi" * axes, header, begin + 1 + 9 * axes)
            block = struct.unpack_from(">x" + "xi" * axes, header, begin + 2 + 14 * axes)
            if shape != chunk_shape or not all(0 < b <= n for n, b in zip(shape, block, strict=True)):
                raise ValueError(f"its blocks of shape {block} are in chunks of {chunk_shape} in {shape}")
            return shape, block
    return None


def _unblock(blocks: Bytes, out: Bytes, shape: Options, block: Options, itemsize: int) -> None:
    """Copy blocks, each padded to the block shape, to their places in an array of `shape`."""
    axes = len(shape)
    # The first axes are the grid of blocks, then come the axes within a block.
    cells = blocks.reshape(*(-(-n // b) for n, b in zip(shape, block, strict=True)), *block, itemsize)
    cells = cells.transpose(*(axis + inner for axis in range(axes) for inner in (0, axes)), 2 * axes)
    array = out.reshape(*shape, itemsize)
    # Along each axis: the whole blocks, then the part of the last block that is inside the array.
    parts = [((0, n // b, b), (n // b, n // b + 1, n % b)) for n, b in zip(shape, block, strict=True)]
    for corner in product(*parts):
        taken: Any = [cut for first, end, inner in corner for cut in (slice(first, end), slice(inner))]
        placed: Any = [
            slice(first * b, first * b + (end - first) * inner)
            for (first, end, inner), b in zip(corner, block, strict=True)
        ]
        region = array[tuple(placed)]
        if region.size:
            split = [count for first, end, inner in corner for count in (end - first, inner)]
            # Splitting axes does not copy, so this writes to `out`.
            region.reshape(*split, itemsize)[...] = cells[tuple(taken)]
