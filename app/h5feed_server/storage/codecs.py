"""Filters of HDF5 chunks, undone outside libhdf5 by codec libraries that release the GIL.

Stored bytes are hostile: every size that they claim is checked against the memory at hand before a codec sees it, and
no codec allocates for them more than a small multiple of the chunk.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt

from .layout import Filter
from .scratch import Bytes, Scratch

Source = Any
"""(n,) uint8; imagecodecs reads arrays, but its annotations know only bytes."""
Options = tuple[int, ...]
Decode = Callable[[Source, Bytes, Options], int]
"""``decode(source, out, options)`` writes to the beginning of `out` and returns how many bytes it decoded."""

SHUFFLE, FLETCHER32, NBIT, SCALEOFFSET = 2, 3, 5, 6

_PIECE = 1 << 14
"""Elements unpacked at a time, so that temporaries stay in the processor's cache; a multiple of 8."""

_MAX_PADDING = 8
"""Times the chunk that the padded blocks of an n-dimensional Blosc2 frame may take. Each axis is padded to less than
twice its length, in practice only a few of them."""

_FAILURES = (ArithmeticError, LookupError, RuntimeError, ValueError, struct.error)
"""What codecs and the checks here raise; imagecodecs' own errors are RuntimeErrors."""


# Scratch memory ------------------------------------------------------------------------------------------------------

_BLOSC_HEADER = struct.Struct("<4B5i")
"""Version, version of the codec's format, flags, itemsize; bytes decoded, of a block, and stored; offset of the only
block, bytes of its only stream."""

_BLOSC_BYTES = _BLOSC_HEADER.size

_scratch = Scratch()


def _prefix(out: Bytes, nbytes: int) -> Bytes:
    """The first `nbytes` of `out`; ValueError where a stored header claims more than there is room for."""
    if not 0 < nbytes <= len(out):
        raise ValueError(f"it claims {nbytes} decoded bytes")
    return out[:nbytes]


# Codecs of one call --------------------------------------------------------------------------------------------------


def _gzip(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.deflate_decode(source, out=memoryview(out)))


def _lzf(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.lzf_decode(source, out=memoryview(out)))


def _bzip2(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.bz2_decode(source, out=memoryview(out)))


def _zstd(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.zstd_decode(source, out=memoryview(out)))


def _lz4(source: Source, out: Bytes, options: Options) -> int:
    """Decoded bytes and block bytes, then blocks: all lengths big-endian."""
    (nbytes,) = struct.unpack_from(">Q", source)
    # A block counts as stored raw where its length is what is left of `out`, which must hence not be longer.
    return len(imagecodecs.lz4h5_decode(source, out=memoryview(_prefix(out, nbytes))))


class _Szip(NamedTuple):
    options_mask: int
    pixels_per_block: int
    bits_per_pixel: int
    pixels_per_scanline: int


def _szip_options(options: Options) -> _Szip:
    options_mask, pixels_per_block, bits_per_pixel, pixels_per_scanline = options[:4]
    # A scanline shorter than a block would be padded to many times its length.
    if not (
        pixels_per_block in range(2, 33, 2)
        and pixels_per_block <= pixels_per_scanline <= 128 * pixels_per_block
        and (1 <= bits_per_pixel <= 32 or bits_per_pixel == 64)
    ):
        raise ValueError(f"its options are {options}")
    return _Szip(options_mask & 0xFF, pixels_per_block, bits_per_pixel, pixels_per_scanline)


def _szip(source: Source, out: Bytes, options: Options) -> int:
    """Decoded bytes as a little-endian 4-byte number, then one szip stream.

    Szip codes pixels of 32 and 64 bits as shuffled bytes, and pads each scanline to whole blocks. Both are undone here,
    because where the library does it, it returns memory as it finds it for a stream that ends early.
    """
    szip = _szip_options(options)
    (nbytes,) = struct.unpack_from("<I", source)
    target = _prefix(out, nbytes)
    if len(source) == 4:
        raise ValueError("it is empty")
    shuffled = szip.bits_per_pixel >= 32
    bits = 8 if shuffled else szip.bits_per_pixel
    pixel_bytes = 1 if bits <= 8 else 2 if bits <= 16 else 4
    padded_pixels = -(-szip.pixels_per_scanline // szip.pixels_per_block) * szip.pixels_per_block
    line_bytes, padded_bytes = szip.pixels_per_scanline * pixel_bytes, padded_pixels * pixel_bytes
    lines, rest = divmod(nbytes, line_bytes)
    needed = lines * padded_bytes + rest
    coded = _scratch.take("coded", needed) if shuffled or needed > nbytes else target
    decoded = imagecodecs.szip_decode(
        source[4:], szip.options_mask, szip.pixels_per_block, bits, padded_pixels, out=memoryview(coded)
    )
    if len(decoded) != needed:
        raise ValueError(f"{len(decoded)} bytes instead of {needed}")
    if needed > nbytes:
        padded, coded = coded, _scratch.take("unpadded", nbytes) if shuffled else target
        end = lines * line_bytes
        inner = padded[: needed - rest].reshape(lines, padded_bytes)[:, :line_bytes]
        coded[:end].reshape(lines, line_bytes)[...] = inner
        coded[end:] = padded[needed - rest :]
    return _unshuffle(coded, target, (szip.bits_per_pixel // 8,)) if shuffled else nbytes


def _blosc(source: Source, out: Bytes, options: Options) -> int:
    """One Blosc chunk, which begins with decoded bytes, block bytes and stored bytes."""
    nbytes, _, stored = struct.unpack_from("<3I", source, 4)
    # The library takes no length of its input: it trusts this header.
    if stored > len(source):
        raise ValueError(f"it claims {stored} stored bytes of {len(source)}")
    return len(imagecodecs.blosc_decode(source, numthreads=1, out=memoryview(_prefix(out, nbytes))))


# Shuffles ------------------------------------------------------------------------------------------------------------


def _unshuffle(source: Source, out: Bytes, options: Options) -> int:
    """Undo the byte shuffle. HDF5 leaves the bytes of a last, partial element where they are."""
    (itemsize,) = options[:1]
    nbytes = len(source)
    target = _prefix(out, nbytes)
    framed: Any = _scratch.with_headroom(source, _BLOSC_BYTES) if itemsize < 256 and nbytes < 1 << 29 else None
    if framed is not None:
        # With a header before it that declares one raw, shuffled block, this is a Blosc chunk: its unshuffle is
        # vectorised and several times as fast as numpy's copies.
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


def _bitshuffle_options(options: Options) -> _Bitshuffle:
    # Three numbers are always there; older files lack the block's elements (0: the default) and the codec.
    result = _Bitshuffle(options[2], *(*options[3:5], 0, 0)[:2])
    if not 0 < result.itemsize < 1 << 16 or result.block % 8 or result.codec not in (0, 2, 3):
        raise ValueError(f"its options are {options}")
    return result


def _bitshuffle(source: Source, out: Bytes, options: Options) -> int:
    """Undo the bit shuffle and its codec: none, LZ4 (2) or Zstandard (3)."""
    itemsize, block, codec = _bitshuffle_options(options)
    if codec:
        source, block = _bitshuffle_blocks(source, len(out), itemsize, codec)
    # Blocks that do not fit the chunk are as good as one block.
    block = min(block, -(-len(source) // itemsize) + 7 & ~7)
    target = memoryview(_prefix(out, len(source)))
    # Bytes, not an array: of an array it would take the item size.
    data: Any = memoryview(source)
    return len(imagecodecs.bitshuffle_decode(data, itemsize=itemsize, blocksize=block, out=target))


def _bitshuffle_blocks(source: Source, limit: int, itemsize: int, codec: int) -> tuple[Bytes, int]:
    """Decode the blocks of a bit-shuffled chunk.

    The chunk holds decoded bytes (8), block bytes (4), then each block after its length (4), all big-endian; the last
    block holds what is left of whole groups of 8 elements; what is left then follows as it is.

    Returns
    -------
    shuffled : (decoded bytes,) uint8
        Scratch.
    block : int
        Elements of a block.
    """
    nbytes, block_bytes = struct.unpack_from(">QI", source)
    if not 0 < nbytes <= limit or nbytes % itemsize or not block_bytes or block_bytes % (8 * itemsize):
        raise ValueError(f"it claims {nbytes} decoded bytes in blocks of {block_bytes}")
    shuffled = _scratch.take("shuffled", nbytes)
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
    """Decode frames into the first `packed` bytes of `out`: one after another they are one stream."""
    view: Any = memoryview(source)
    frames = [view[begin:end] for begin, end in spans]
    data = frames[0] if len(frames) == 1 else b"".join(frames)
    return len(imagecodecs.zstd_decode(data, out=memoryview(out[:packed])))


def _lz4_blocks(source: Source, spans: list[tuple[int, int]], out: Bytes, packed: int, block_bytes: int) -> int:
    """Decode blocks into the first `packed` bytes of `out`.

    The LZ4 filter's framing is the same, so that its codec decodes all blocks in one call. But it takes a block for raw
    that is as long as its room in `out`; chunks with such a block are decoded one block at a time.
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


# Blosc2 --------------------------------------------------------------------------------------------------------------


def _blosc2(source: Source, out: Bytes, options: Options) -> int:
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
    target = _prefix(out, nbytes)
    if stored == 0:
        _blosc2_constant(data[header:], itemsize, target)
        return nbytes
    chunk = data[header : header + stored]
    # Blocks that span the chunk but for the first axis lie as in the chunk.
    decoded = target
    if grid is not None and (padded_bytes != nbytes or block[1:] != shape[1:]):
        if padded_bytes > _MAX_PADDING * len(out):
            raise ValueError(f"its blocks of shape {block} are padded to {padded_bytes} bytes")
        decoded = _scratch.take("blocks", padded_bytes)
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


# Packed bits ---------------------------------------------------------------------------------------------------------


def _unpack(packed: Source, bits: int, count: int) -> npt.NDArray[Any]:
    """(count,) unsigned integers of `bits` bits each, packed with the most significant bit first.

    Raises
    ------
    ValueError
        There are not that many.
    """
    nbytes = -(-count * bits // 8)
    if len(packed) < nbytes:
        raise ValueError(f"it has {len(packed)} bytes instead of {nbytes}")
    packed = packed[:nbytes]
    if bits <= 32 or bits == 64:
        if bits in (3, 5, 6, 7):
            # imagecodecs reads a byte past the end of these.
            packed = np.append(packed, np.uint8(0))[:nbytes]
        # imagecodecs leaves whole machine words as they are: big-endian.
        dtype = {8: "u1", 16: ">u2", 32: ">u4", 64: ">u8"}.get(
            bits, "u1" if bits < 8 else "=u2" if bits < 16 else "=u4"
        )
        unpacked: npt.NDArray[Any] = imagecodecs.packints_decode(packed, np.dtype(dtype), bits, runlen=count)
        return unpacked
    # 8 integers take `bits` bytes, and their bits lie alike in each such group.
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


def _nbit_options(options: Options) -> _Nbit:
    # Number of options, "nothing to do", elements; then the type: arrays (2) of bytes and element type, integers and
    # floats (1) of bytes, byte order, significant bits and the bits below them.
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


def _nbit(source: Source, out: Bytes, options: Options) -> int:
    """Only the significant bits of each element are stored; the others become 0, also above a negative number."""
    count, dtype, precision, offset = _nbit_options(options)
    values = _prefix(out, count * np.dtype(dtype).itemsize).view(dtype)
    native = values.dtype.newbyteorder("=").type
    for piece, integers in _pieces(source, precision, values):
        piece[...] = integers.astype(native) << native(offset) if offset else integers
    return values.nbytes


class _Scaleoffset(NamedTuple):
    elements: int
    dtype: str
    decimals: int
    fill: bytes | None


def _scaleoffset_options(options: Options) -> _Scaleoffset:
    # How to scale, by what, elements; class, bytes, sign and byte order of the type; whether a fill value follows.
    scale, factor, count, kind, size, _, order, filled = options[:8]
    if (scale, kind) not in ((2, 0), (0, 1)) or size not in ((1, 2, 4, 8), (4, 8))[kind] or order > 1:
        raise ValueError(f"its options are {options}")
    fill = struct.pack("<2I", *(*options[8:10], 0)[:2])[:size] if filled else None
    return _Scaleoffset(count, f"{'<>'[order]}{'uf'[kind]}{size}", (factor + (1 << 31)) % (1 << 32) - (1 << 31), fill)


def _scaleoffset(source: Source, out: Bytes, options: Options) -> int:
    """Differences to the chunk's minimum, in as few bits as they need; floats as multiples of a power of 10.

    The chunk begins with the bits of a difference (4), the bytes of the minimum (1), and the minimum (16), all
    little-endian. A difference of only ones stands for the fill value.
    """
    count, dtype, decimals, fill = _scaleoffset_options(options)
    values = _prefix(out, count * np.dtype(dtype).itemsize).view(dtype)
    native = values.dtype.newbyteorder("=").type
    size = values.itemsize
    bits, minimum_bytes = struct.unpack_from("<IB", source)
    minimum = source[5 : 5 + min(minimum_bytes, 8)].tobytes().ljust(8, b"\0")
    differences = source[21:]
    if bits > 8 * size or len(source) < 21:
        raise ValueError(f"it claims {bits} bits for elements of {size} bytes")
    if bits == 8 * size:
        # Stored as they are, but in the byte order of the machine that wrote them; all that matter are little-endian.
        values[...] = _prefix(differences, values.nbytes).view(values.dtype.newbyteorder("<"))
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


_CODECS = (
    "bitshuffle_decode",
    "blosc2_decode",
    "blosc_decode",
    "bz2_decode",
    "deflate_decode",
    "h5checksum_fletcher32",
    "lz4_decode",
    "lz4h5_decode",
    "lzf_decode",
    "packints_decode",
    "szip_decode",
    "zstd_decode",
)

# Pipelines -----------------------------------------------------------------------------------------------------------


def _checked(source: Source) -> Bytes:
    """What the last 4 bytes are the Fletcher-32 checksum of."""
    if len(source) <= 4:
        raise ValueError("it is too short")
    data: Bytes = source[:-4]
    stored = source[-4:].tobytes()
    computed = int(imagecodecs.h5checksum_fletcher32(source[:-4])).to_bytes(4, "little")
    # HDF5 before 1.6.3 exchanged the bytes within both halves.
    if stored != computed and stored != bytes(computed[i] for i in (1, 0, 3, 2)):
        raise ValueError("its checksum is wrong")
    return data


DECODERS: dict[int, Decode] = {
    1: _gzip,
    SHUFFLE: _unshuffle,
    4: _szip,
    NBIT: _nbit,
    SCALEOFFSET: _scaleoffset,
    307: _bzip2,
    32000: _lzf,
    32001: _blosc,
    32004: _lz4,
    32008: _bitshuffle,
    32015: _zstd,
    32026: _blosc2,
}
"""Decoder of each HDF5 filter number that changes bytes; Fletcher-32 only checks them."""

FILTER_NAMES = {
    1: "gzip",
    SHUFFLE: "shuffle",
    FLETCHER32: "fletcher32",
    4: "szip",
    NBIT: "nbit",
    SCALEOFFSET: "scaleoffset",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32026: "blosc2",
}
"""What filters are commonly called. Files may name them otherwise, or not at all."""

_OPTIONS: dict[int, Callable[[Options], Any]] = {
    4: _szip_options,
    NBIT: _nbit_options,
    SCALEOFFSET: _scaleoffset_options,
    32008: _bitshuffle_options,
}
"""What reads a filter's options, raising where they are none that is known here."""


def _is_idle(item: Filter, itemsize: int) -> bool:
    """Whether a filter leaves all bytes as they are; HDF5 writes such filters when asked to."""
    if item.id == SHUFFLE:
        return (item.options or (itemsize,))[0] <= 1
    if item.id == NBIT:
        return len(item.options) > 1 and item.options[1] != 0
    if item.id == SCALEOFFSET:
        # Integers stored with all their bits.
        return len(item.options) > 4 and item.options[0] == 2 and item.options[1] == 8 * item.options[4]
    return False


def _limits(steps: Sequence[Filter], nbytes: int) -> list[int]:
    """Bytes that each step's input may have at most where the first step's has `nbytes`."""
    limits = [nbytes]
    for step in steps:
        # A checksum takes 4 bytes. Codecs make what they cannot compress longer, but not by much.
        grown = {SHUFFLE: limits[-1], FLETCHER32: limits[-1] + 4}.get(step.id, 2 * nbytes + (64 << 10))
        limits.append(grown)
    return limits


def unsupported(filters: Sequence[Filter]) -> str | None:
    """Why a pipeline cannot be undone here; None where it can."""
    for item in filters:
        if item.id not in DECODERS and item.id != FLETCHER32:
            return (
                f"its chunks are compressed with the filter {item.name!r} ({item.id}), which this version does not read"
            )
        if item.id in _OPTIONS and not _is_idle(item, 1):
            try:
                _OPTIONS[item.id](item.options)
            except (*_FAILURES, TypeError) as error:
                return (
                    f"its chunks are compressed with the filter {item.name!r} ({item.id}) in a way which this version "
                    f"does not read: {error}"
                )
    return None


def undo_filter(item: Filter, stored: Any, limit: int) -> Bytes:
    """Undo one filter alone.

    Parameters
    ----------
    limit : int
        Bytes that it may decode to.

    Raises
    ------
    ValueError
    """
    out = np.empty(limit, np.uint8)
    try:
        return out[: DECODERS[item.id](np.frombuffer(stored, np.uint8), out, item.options)]
    except _FAILURES as error:
        raise ValueError(str(error)) from None


def load_codecs() -> None:
    """Load what is otherwise loaded by the first chunk that needs it: later, no file may be opened any more."""
    for name in _CODECS:
        getattr(imagecodecs, name)


def decode_chunk(stored: Any, filters: Sequence[Filter], mask: int, itemsize: int, out: Bytes) -> None:
    """Undo a chunk's filter pipeline into `out`.

    Parameters
    ----------
    stored : bytes-like
        The chunk as it lies in the file.
    filters : sequence of Filter
        In the order in which they were applied.
    mask : int
        Bit i set: filter i was skipped for this chunk.
    itemsize : int
        Bytes of an element.
    out : (chunk bytes,) uint8
        C-contiguous.

    Raises
    ------
    DatasetCorrupt
        The bytes do not decode to a chunk, or not to the one whose checksum was stored.
    """
    steps = [item for i, item in enumerate(filters) if not mask >> i & 1 and not _is_idle(item, itemsize)]
    limits = _limits(steps, len(out))
    current: Bytes = np.frombuffer(stored, np.uint8) if len(stored) else out[:0]
    try:
        for position, item in reversed(list(enumerate(steps))):
            if len(current) == 0:
                raise ValueError("it is empty")
            if item.id == FLETCHER32:
                current = _checked(current)
                continue
            # The last step writes to `out`; those before take turns, so that none overwrites what it reads.
            target = out if position == 0 else _scratch.take("odd" if position % 2 else "even", limits[position])
            options = item.options or ((itemsize,) if item.id == SHUFFLE else ())
            current = target[: DECODERS[item.id](current, target, options)]
        if len(current) != len(out):
            raise ValueError(f"{len(current)} bytes instead of {len(out)}")
    except _FAILURES as error:
        name = f" with the filter {item.name!r}" if steps else ""
        raise DatasetCorrupt(f"a chunk does not decode{name}: {error}") from None
    if not steps or steps[0].id == FLETCHER32:
        out[...] = current
