"""Blosc2 frames as HDF5 chunks: of one chunk, whole or cut into n-dimensional blocks."""

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
"""Times the chunk that the padded blocks of an n-dimensional Blosc2 frame may take. Each axis is padded to less than
twice its length, in practice only a few of them."""


def blosc2(source: Source, out: Bytes, options: Options) -> int:
    """One contiguous Blosc2 frame of one chunk, of n-dimensional blocks where its header says so."""
    data: Any = memoryview(source)
    if data[2:10] != b"b2frame\0":
        raise ValueError("it is no frame")
    (header,) = struct.unpack_from(">i", data, 11)
    nbytes: int
    nbytes, stored = struct.unpack_from(">qxq", data, 30)
    (itemsize,) = struct.unpack_from(">i", data, 48)
    if header < 87 or stored < 0 or header + stored > len(data):
        raise ValueError(f"its frame claims {header} and {stored} bytes of {len(data)}")
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
    # Blocks that span the chunk but for the first axis lie as in the chunk.
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
    """Fill `out` as the index of a frame without chunks says: instead of an offset it has a code for a value."""
    (stored,) = struct.unpack_from("<12xi", index)
    index = index[: max(stored, 0)]
    code = bytearray(8)
    if _blosc2_chunk_bytes(index) != 8 or len(imagecodecs.blosc2_decode(index, numthreads=1, out=code)) != 8:
        raise ValueError("its index is not that of one chunk")
    if code[7] in (0x81, 0x84):
        # Zeros, and what was never written.
        out[...] = 0
    elif code[7] == 0x82 and itemsize in (4, 8) and len(out) % itemsize == 0:
        out.view(f"<f{itemsize}")[...] = np.nan
    else:
        raise ValueError(f"its frame has no chunk, but the code {code.hex()}")


def _blosc2_chunk_bytes(chunk: Source) -> int:
    """Bytes of a Blosc2 chunk, decoded.

    Raises
    ------
    ValueError
        The library must not see this chunk: wrong length, or code of plug-ins.
    """
    flags, nbytes, _, stored = struct.unpack_from("<2xBx3i", chunk)
    if stored != len(chunk):
        raise ValueError(f"its chunk claims {stored} bytes of {len(chunk)}")
    if flags >> 5 > 4:
        raise ValueError(f"its chunk needs the plugged-in codec {flags >> 5}")
    if flags & 5 == 5:
        extended = struct.unpack_from("<6B9xB", chunk, 16)
        *filters, kind = extended
        # Past the built-in filters come plug-ins. Of the kinds, "lazy" (8) means parts elsewhere, 128 an instrumented
        # chunk, and 4 in the bits between that the library shall leave the memory as it finds it.
        if max(filters) > 4 or kind & 0x88 or kind >> 4 & 7 == 4:
            raise ValueError(f"its chunk is of the kind {kind} and needs the filters {filters}")
    return int(nbytes)


def _blosc2_grid(header: Source) -> tuple[Options, Options] | None:
    """Shape and block shape that a frame's header gives to its chunk, from the metalayer "b2nd"; None without one."""
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
    # Grid of blocks first, then the axes within a block.
    cells = blocks.reshape(*(-(-n // b) for n, b in zip(shape, block, strict=True)), *block, itemsize)
    cells = cells.transpose(*(axis + inner for axis in range(axes) for inner in (0, axes)), 2 * axes)
    array = out.reshape(*shape, itemsize)
    # Along each axis: whole blocks, then what the last block holds of the array.
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
            # Splitting axes never copies: this writes to `out`.
            region.reshape(*split, itemsize)[...] = cells[tuple(taken)]
