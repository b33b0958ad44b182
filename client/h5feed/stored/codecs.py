"""Decodes the filters of HDF5 chunks without libhdf5, with codec libraries that release the GIL.

Stored bytes may be malicious. Every size in them is checked against the output buffer before a codec uses it, and no
codec allocates more than a small multiple of the chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import imagecodecs
import numpy as np

from ..errors import DatasetCorrupt
from .blosc2 import blosc2
from .codec_interface import Decode, Options, Source, prefix, scratch
from .layout import Filter
from .packed_bits import nbit, nbit_options, scaleoffset, scaleoffset_options
from .scratch import Bytes
from .shuffles import bitshuffle, bitshuffle_options, unshuffle

SHUFFLE, FLETCHER32, NBIT, SCALEOFFSET = 2, 3, 5, 6

_FAILURES = (ArithmeticError, LookupError, RuntimeError, ValueError, struct.error)
"""Exceptions of the codecs and of the checks here. The errors of imagecodecs are RuntimeErrors."""


# Codecs --------------------------------------------------------------------------------------------------------------


def _gzip(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.deflate_decode(source, out=memoryview(out)))


def _lzf(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.lzf_decode(source, out=memoryview(out)))


def _bzip2(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.bz2_decode(source, out=memoryview(out)))


def _zstd(source: Source, out: Bytes, options: Options) -> int:
    return len(imagecodecs.zstd_decode(source, out=memoryview(out)))


def _lz4(source: Source, out: Bytes, options: Options) -> int:
    """Decode the LZ4 filter: decoded bytes, block bytes, then blocks. All lengths are big-endian."""
    (nbytes,) = struct.unpack_from(">Q", source)
    # The codec takes a block for uncompressed if it is as long as the rest of `out`, which must have the exact length.
    return len(imagecodecs.lz4h5_decode(source, out=memoryview(prefix(out, nbytes))))


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
    """Decode szip: decoded bytes as a little-endian 4-byte number, then one szip stream.

    Szip encodes pixels of 32 and 64 bits as shuffled bytes, and pads each scanline to whole blocks. Both are undone
    here, because the library would return uninitialised memory for a stream that ends early.
    """
    szip = _szip_options(options)
    (nbytes,) = struct.unpack_from("<I", source)
    target = prefix(out, nbytes)
    if len(source) == 4:
        raise ValueError("it is empty")
    shuffled = szip.bits_per_pixel >= 32
    bits = 8 if shuffled else szip.bits_per_pixel
    pixel_bytes = 1 if bits <= 8 else 2 if bits <= 16 else 4
    padded_pixels = -(-szip.pixels_per_scanline // szip.pixels_per_block) * szip.pixels_per_block
    line_bytes, padded_bytes = szip.pixels_per_scanline * pixel_bytes, padded_pixels * pixel_bytes
    lines, rest = divmod(nbytes, line_bytes)
    needed = lines * padded_bytes + rest
    coded = scratch.take("coded", needed) if shuffled or needed > nbytes else target
    decoded = imagecodecs.szip_decode(
        source[4:], szip.options_mask, szip.pixels_per_block, bits, padded_pixels, out=memoryview(coded)
    )
    if len(decoded) != needed:
        raise ValueError(f"{len(decoded)} bytes instead of {needed}")
    if needed > nbytes:
        padded, coded = coded, scratch.take("unpadded", nbytes) if shuffled else target
        end = lines * line_bytes
        inner = padded[: needed - rest].reshape(lines, padded_bytes)[:, :line_bytes]
        coded[:end].reshape(lines, line_bytes)[...] = inner
        coded[end:] = padded[needed - rest :]
    return unshuffle(coded, target, (szip.bits_per_pixel // 8,)) if shuffled else nbytes


def _blosc(source: Source, out: Bytes, options: Options) -> int:
    """Decode one Blosc chunk. Its header has the decoded bytes, block bytes and stored bytes."""
    nbytes, _, stored = struct.unpack_from("<3I", source, 4)
    # The library does not take the length of its input: it trusts this header.
    if stored > len(source):
        raise ValueError(f"it claims {stored} stored bytes, but has {len(source)}")
    return len(imagecodecs.blosc_decode(source, numthreads=1, out=memoryview(prefix(out, nbytes))))


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
    """Check the Fletcher-32 checksum in the last 4 bytes. Returns the bytes before it."""
    if len(source) <= 4:
        raise ValueError("it is too short")
    data: Bytes = source[:-4]
    stored = source[-4:].tobytes()
    computed = int(imagecodecs.h5checksum_fletcher32(source[:-4])).to_bytes(4, "little")
    # HDF5 before 1.6.3 swapped the bytes of each half.
    if stored != computed and stored != bytes(computed[i] for i in (1, 0, 3, 2)):
        raise ValueError("its checksum is wrong")
    return data


DECODERS: dict[int, Decode] = {
    1: _gzip,
    SHUFFLE: unshuffle,
    4: _szip,
    NBIT: nbit,
    SCALEOFFSET: scaleoffset,
    307: _bzip2,
    32000: _lzf,
    32001: _blosc,
    32004: _lz4,
    32008: bitshuffle,
    32015: _zstd,
    32026: blosc2,
}
"""Decoders by HDF5 filter number. Fletcher-32 is not among them: it only checks the bytes."""

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
"""Common names of filters. Files may have other names for them, or none."""

_OPTIONS: dict[int, Callable[[Options], Any]] = {
    4: _szip_options,
    NBIT: nbit_options,
    SCALEOFFSET: scaleoffset_options,
    32008: bitshuffle_options,
}
"""Parsers of filter options. They raise if options are not supported."""


def _is_idle(item: Filter, itemsize: int) -> bool:
    """Whether a filter does not change any bytes. HDF5 stores such filters if a program adds them."""
    if item.id == SHUFFLE:
        return (item.options or (itemsize,))[0] <= 1
    if item.id == NBIT:
        return len(item.options) > 1 and item.options[1] != 0
    if item.id == SCALEOFFSET:
        # Integers stored with all their bits.
        return len(item.options) > 4 and item.options[0] == 2 and item.options[1] == 8 * item.options[4]
    return False


def _limits(steps: Sequence[Filter], nbytes: int) -> list[int]:
    """Upper bounds on the input size of each step, if the input of the first step has `nbytes`.

    Steps are in the order of encoding.
    """
    limits = [nbytes]
    for step in steps:
        # A checksum adds 4 bytes. Codecs make incompressible data longer, but not by much.
        grown = {SHUFFLE: limits[-1], FLETCHER32: limits[-1] + 4}.get(step.id, 2 * nbytes + (64 << 10))
        limits.append(grown)
    return limits


def unsupported(filters: Sequence[Filter]) -> str | None:
    """Why a filter pipeline cannot be decoded here; None if it can."""
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
                    f"its chunks are compressed with the filter {item.name!r} ({item.id}) in a way that this version "
                    f"does not read: {error}"
                )
    return None


def undo_filter(item: Filter, stored: Any, limit: int) -> Bytes:
    """Decode a single filter.

    Parameters
    ----------
    item : Filter
    stored : bytes-like
    limit : int
        Maximum number of decoded bytes.

    Returns
    -------
    (decoded bytes,) uint8

    Raises
    ------
    ValueError
        The bytes do not decode.
    """
    out = np.empty(limit, np.uint8)
    try:
        return out[: DECODERS[item.id](np.frombuffer(stored, np.uint8), out, item.options)]
    except _FAILURES as error:
        raise ValueError(str(error)) from None


def load_codecs() -> None:
    """Load all codecs now instead of at first use, for processes that cannot open files later."""
    for name in _CODECS:
        getattr(imagecodecs, name)


def decode_chunk(stored: Any, filters: Sequence[Filter], mask: int, itemsize: int, out: Bytes) -> None:
    """Decode a chunk's filter pipeline into `out`.

    Parameters
    ----------
    stored : bytes-like
        The chunk as stored in the file.
    filters : sequence of Filter
        In the order in which they were applied when writing.
    mask : int
        Bit i set: filter i was skipped for this chunk.
    itemsize : int
        Bytes of an element.
    out : (chunk bytes,) uint8
        C-contiguous.

    Raises
    ------
    DatasetCorrupt
        The bytes do not decode to a whole chunk, or the checksum is wrong.
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
            # The last step writes to `out`. The steps before it alternate between two buffers, so that none overwrites
            # its own input.
            target = out if position == 0 else scratch.take("odd" if position % 2 else "even", limits[position])
            options = item.options or ((itemsize,) if item.id == SHUFFLE else ())
            current = target[: DECODERS[item.id](current, target, options)]
        if len(current) != len(out):
            raise ValueError(f"{len(current)} bytes instead of {len(out)}")
    except _FAILURES as error:
        name = f" with the filter {item.name!r}" if steps else ""
        raise DatasetCorrupt(f"a chunk does not decode{name}: {error}") from None
    if not steps or steps[0].id == FLETCHER32:
        out[...] = current
