"""Decodes the byte shuffle and bit shuffle filters of HDF5 chunks."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import imagecodecs

from .codec_interface import Options, Source, prefix, scratch
from .scratch import Bytes

_BLOSC_HEADER = struct.Struct("<4B5i")
"""Version, codec version, flags, itemsize; decoded bytes, block bytes, stored bytes; offset of the only block, and the
bytes of its only stream."""

_BLOSC_BYTES = _BLOSC_HEADER.size


def unshuffle(source: Source, out: Bytes, options: Options) -> int:
    """Undo the byte shuffle. HDF5 leaves the bytes of a last, partial element where they are."""
    (itemsize,) = options[:1]
    nbytes = len(source)
    target = prefix(out, nbytes)
    framed: Any = scratch.with_headroom(source, _BLOSC_BYTES) if itemsize < 256 and nbytes < 1 << 29 else None
    if framed is not None:
        # With a header in front that declares one uncompressed, shuffled block, this is a Blosc chunk. Blosc's
        # unshuffle is vectorised and several times as fast as copying with numpy.
        _BLOSC_HEADER.pack_into(
            framed.data, 0, 2, 1, 0x11, itemsize, nbytes, nbytes, _BLOSC_BYTES + nbytes, _BLOSC_BYTES - 4, nbytes
        )
        return len(imagecodecs.blosc_decode(framed, numthreads=1, out=memoryview(target)))
    elements = nbytes // itemsize
    whole = elements * itemsize
    planes = source[:whole].reshape(itemsize, elements)
    items = target[:whole].reshape(elements, itemsize)
    if itemsize <= 16:
        for place, plane in enumerate(planes):
            items[:, place] = plane
    else:
        items[...] = planes.T
    target[whole:] = source[whole:]
    return nbytes


class _Bitshuffle(NamedTuple):
    itemsize: int
    block: int
    codec: int


def bitshuffle_options(options: Options) -> _Bitshuffle:
    # Older files have three options, and lack the elements of a block (0: the default) and the codec.
    result = _Bitshuffle(options[2], *(*options[3:5], 0, 0)[:2])
    if not 0 < result.itemsize < 1 << 16 or result.block % 8 or result.codec not in (0, 2, 3):
        raise ValueError(f"its options are {options}")
    return result


def bitshuffle(source: Source, out: Bytes, options: Options) -> int:
    """Decode the bit shuffle and its codec: none (0), LZ4 (2) or Zstandard (3)."""
    itemsize, block, codec = bitshuffle_options(options)
    if codec:
        source, block = _bitshuffle_blocks(source, len(out), itemsize, codec)
    # A block size larger than the chunk is the same as a single block.
    block = min(block, -(-len(source) // itemsize) + 7 & ~7)
    target = memoryview(prefix(out, len(source)))
    # A memoryview, because the codec would use the item size of an array.
    data: Any = memoryview(source)
    return len(imagecodecs.bitshuffle_decode(data, itemsize=itemsize, blocksize=block, out=target))


def _bitshuffle_blocks(source: Source, limit: int, itemsize: int, codec: int) -> tuple[Bytes, int]:
    """Decode the blocks of a bit-shuffled chunk.

    The chunk begins with the decoded bytes (8 bytes) and the block bytes (4 bytes). Then each block follows its length
    (4 bytes). All numbers are big-endian. The last block may be shorter, but holds whole groups of 8 elements. The
    remaining elements follow uncompressed.

    Returns
    -------
    shuffled : (decoded bytes,) uint8
        Scratch memory.
    block : int
        Elements of a block.
    """
    nbytes, block_bytes = struct.unpack_from(">QI", source)
    if not 0 < nbytes <= limit or nbytes % itemsize or not block_bytes or block_bytes % (8 * itemsize):
        raise ValueError(f"it claims {nbytes} decoded bytes in blocks of {block_bytes}")
    shuffled = scratch.take("shuffled", nbytes)
    loose = nbytes % (8 * itemsize)
    packed = nbytes - loose
    spans = []
    position = 12
    for _ in range(-(-packed // block_bytes)):
        begin = position + 4
        position = begin + _BLOCK_LENGTH.unpack_from(source, position)[0]
        spans.append((begin, position))
    if position + loose != len(source):
        raise ValueError("the lengths of its blocks do not add up")
    if spans:
        decode = _zstd_blocks if codec == 3 else _lz4_blocks
        done = decode(source, spans, shuffled, packed, block_bytes)
        if done != packed:
            raise ValueError(f"its blocks have {done} bytes instead of {packed}")
    shuffled[packed:] = source[position:]
    return shuffled, block_bytes // itemsize


_BLOCK_LENGTH = struct.Struct(">I")


def _zstd_blocks(source: Source, spans: list[tuple[int, int]], out: Bytes, packed: int, block_bytes: int) -> int:
    """Decode Zstandard frames into the first `packed` bytes of `out`. Concatenated frames are a valid stream."""
    view: Any = memoryview(source)
    frames = [view[begin:end] for begin, end in spans]
    data = frames[0] if len(frames) == 1 else b"".join(frames)
    return len(imagecodecs.zstd_decode(data, out=memoryview(out[:packed])))


def _lz4_blocks(source: Source, spans: list[tuple[int, int]], out: Bytes, packed: int, block_bytes: int) -> int:
    """Decode LZ4 blocks into the first `packed` bytes of `out`.

    The LZ4 filter has the same framing, so its codec can decode all blocks in one call. But it takes a block for
    uncompressed if it is as long as its room in `out`: chunks with such a block are decoded one block at a time.
    """
    room = [block_bytes] * (len(spans) - 1)
    room.append(min(block_bytes, len(out) - len(room) * block_bytes))
    if all(end - begin != length for (begin, end), length in zip(spans, room, strict=True)):
        return len(imagecodecs.lz4h5_decode(source[: spans[-1][1]], out=memoryview(out)))
    done = 0
    for begin, end in spans:
        block = memoryview(out[done : min(done + block_bytes, packed)])
        done += len(imagecodecs.lz4_decode(source[begin:end], out=block))
    return done
