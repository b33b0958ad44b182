"""Chunks of every filter, decoded without libhdf5 and compared bit by bit with what h5py reads."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import imagecodecs
import numpy as np
import pytest
from h5feed.errors import DatasetCorrupt
from h5feed.stored.codecs import decode_chunk, unsupported
from h5feed.stored.layout import Filter

Array = np.ndarray[Any, Any]

DTYPES = ("u1", "<i2", ">i4", "<f4", "<f8", "<f2")
SHAPES = ((1000,), (37, 41), (3, 20, 67), (64, 128), (2, 3, 5, 11))

PIPELINES: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle": {"shuffle": True},
    "shuffle-gzip": {"shuffle": True, "compression": "gzip"},
    "fletcher32": {"fletcher32": True},
    "fletcher32-gzip": {"fletcher32": True, "compression": "gzip"},
    "fletcher32-shuffle": {"fletcher32": True, "shuffle": True},
    "fletcher32-shuffle-gzip": {"fletcher32": True, "shuffle": True, "compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "shuffle-lzf": {"shuffle": True, "compression": "lzf"},
    "szip-nn": {"compression": "szip", "compression_opts": ("nn", 8)},
    "szip-nn-32": {"compression": "szip", "compression_opts": ("nn", 32)},
    "szip-ec": {"compression": "szip", "compression_opts": ("ec", 16)},
    "fletcher32-shuffle-szip": {
        "fletcher32": True,
        "shuffle": True,
        "compression": "szip",
        "compression_opts": ("nn", 10),
    },
    "bzip2": dict(hdf5plugin.BZip2()),
    "zstd": dict(hdf5plugin.Zstd()),
    "fletcher32-shuffle-zstd": {"fletcher32": True, "shuffle": True, **hdf5plugin.Zstd()},
    "lz4": dict(hdf5plugin.LZ4()),
    "lz4-1024": dict(hdf5plugin.LZ4(nbytes=1024)),
    "shuffle-lz4": {"shuffle": True, **hdf5plugin.LZ4()},
    **{
        f"bitshuffle-{codec}-{elements}": dict(hdf5plugin.Bitshuffle(nelems=elements, cname=codec))
        for codec in ("none", "lz4", "zstd")
        for elements in (0, 64)
    },
    **{
        f"blosc-{codec}-{shuffle}": dict(hdf5plugin.Blosc(cname=codec, shuffle=shuffle))
        for codec in ("blosclz", "lz4", "lz4hc", "zlib", "zstd")
        for shuffle in (0, 1, 2)
    },
    **{
        f"blosc2-{codec}-{shuffle}": dict(hdf5plugin.Blosc2(cname=codec, filters=shuffle))
        for codec in ("blosclz", "lz4", "lz4hc", "zlib", "zstd")
        for shuffle in (0, 1, 2, 3, 4)
    },
}


class Chunk(NamedTuple):
    """A chunk as it lies in a file, and as h5py reads it."""

    stored: bytes
    filters: tuple[Filter, ...]
    mask: int
    expected: bytes
    itemsize: int

    def decode(self) -> bytes:
        # Bytes that a decoder must not touch lie around those that it must all write.
        memory = np.full(len(self.expected) + 128, 0xA5, np.uint8)
        out = memory[64:-64]
        decode_chunk(self.stored, self.filters, self.mask, self.itemsize, out)
        assert (memory[:64] == 0xA5).all() and (memory[-64:] == 0xA5).all()
        return out.tobytes()


def read_chunk(dataset: h5py.Dataset, written: Array | None = None) -> Chunk:
    """The only chunk of a dataset; its bytes as they are in the file's type, also where numpy has no such type."""
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
    mask, stored = dataset.id.read_direct_chunk((0,) * dataset.ndim)
    expected = np.empty(dataset.shape, dataset.dtype)
    try:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, expected, dataset.id.get_type())
    except OSError:
        # HDF5 before 2.0 stores differences that need all bits as they are, but cannot read them.
        if written is None or dataset.scaleoffset is None or h5py.version.hdf5_version_tuple >= (2,):
            raise
        expected = written
    return Chunk(
        bytes(stored),
        tuple(Filter(number, name.decode(), tuple(options)) for number, _, options, name in filters),
        mask,
        expected.tobytes(),
        dataset.dtype.itemsize,
    )


def write_chunk(values: Array, **options: Any) -> Chunk:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.create_dataset("x", data=values, chunks=values.shape, **options)
    with h5py.File(memory, "r") as file:
        return read_chunk(file["x"], values)


def contents(shape: tuple[int, ...], dtype: str, seed: int = 1) -> Iterator[Array]:
    """Arrays that compress well, not at all, and to next to nothing."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    steps = np.cumsum(rng.integers(-3, 4, shape)).reshape(shape)
    yield steps.astype(kind) if kind.kind == "f" else (steps % 100).astype(kind)
    yield rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind).reshape(shape)
    yield np.zeros(shape, kind)
    yield np.full(shape, 7, kind)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_bit_exact(name: str, dtype: str) -> None:
    for shape in SHAPES:
        for values in contents(shape, dtype):
            chunk = write_chunk(values, **PIPELINES[name])
            assert unsupported(chunk.filters) is None
            assert chunk.decode() == chunk.expected, (shape, chunk.filters, chunk.mask)


@pytest.mark.parametrize("shape", [(65, 65, 65), (3, 200, 201), (7, 1, 33, 5), (300000,)])
def test_blosc2_blocks_with_padding(shape: tuple[int, ...]) -> None:
    for values in contents(shape, "<f4"):
        chunk = write_chunk(values, **hdf5plugin.Blosc2(cname="lz4"))
        assert chunk.decode() == chunk.expected


def test_constants_of_floats() -> None:
    for value in (np.nan, -0.0, 2.5):
        for dtype in ("<f4", "<f8"):
            for shape in ((100,), (30, 40)):
                chunk = write_chunk(np.full(shape, value, dtype), **hdf5plugin.Blosc2())
                assert chunk.decode() == chunk.expected


@pytest.mark.parametrize(("mask", "skipped"), [(0b01, "shuffle"), (0b10, "gzip"), (0b11, "both")])
def test_masked_filters_are_skipped(mask: int, skipped: str) -> None:
    values = next(contents((50, 60), "<i4"))
    planes = np.ascontiguousarray(values.reshape(-1).view(np.uint8).reshape(-1, 4).T).tobytes()
    stored = {
        "shuffle": zlib.compress(values.tobytes()),
        "gzip": planes,
        "both": values.tobytes(),
    }[skipped]
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        dataset = file.create_dataset("x", values.shape, "<i4", chunks=values.shape, shuffle=True, compression="gzip")
        dataset.id.write_direct_chunk((0, 0), stored, filter_mask=mask)
    with h5py.File(memory, "r") as file:
        assert np.array_equal(file["x"], values)
        chunk = read_chunk(file["x"])
    assert chunk.mask == mask
    assert chunk.decode() == values.tobytes()


@pytest.mark.parametrize("name", ["lzf", "bzip2", "lz4", "blosc-lz4-1", "blosc2-zstd-1", "bitshuffle-lz4-0", "szip-nn"])
def test_one_compressor_after_another(name: str) -> None:
    """The second sees bytes of any length. Not written by libhdf5, which crashes for some of these."""
    seconds: list[tuple[Filter, Callable[[bytes], bytes]]] = [
        (Filter(1, "deflate", (4,)), zlib.compress),
        (Filter(32004, "lz4", ()), lambda data: bytes(imagecodecs.lz4h5_encode(data, blocksize=512))),
        (Filter(32015, "zstd", ()), lambda data: bytes(imagecodecs.zstd_encode(data))),
    ]
    for values in contents((40, 50), "<i4"):
        chunk = write_chunk(values, **PIPELINES[name])
        for second, encode in seconds:
            both = chunk._replace(stored=encode(chunk.stored), filters=(*chunk.filters, second))
            assert both.decode() == chunk.expected


# Scale-offset and n-bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">i2", "<i4", ">u4", "<i8", ">u8"])
def test_scaleoffset_of_integers(dtype: str) -> None:
    kind = np.dtype(dtype)
    rng = np.random.default_rng(2)
    whole = 8 * kind.itemsize
    for bits in sorted({1, 2, 3, 5, 7, 8, 12, 15, 16, 21, 24, 31, 32, 33, 47, 63, 64} & set(range(1, whole + 1))):
        info = np.iinfo(kind)
        low = -(1 << bits - 1) if kind.kind == "i" else 0
        high = max(low, min(low + (1 << bits) - 3, int(info.max)))
        for shape in ((7,), (37, 41), (2, 170, 97)):
            values = rng.integers(low, high, shape, kind.newbyteorder("="), endpoint=True).astype(kind)
            # 0: as many bits as needed; otherwise so many, which may be too few, and then HDF5's result counts.
            for factor in (0, min(bits + 1, whole)):
                for fill in (None, 1):
                    chunk = write_chunk(values, scaleoffset=factor, fillvalue=fill)
                    assert unsupported(chunk.filters) is None
                    assert chunk.decode() == chunk.expected, (bits, shape, factor, fill)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_scaleoffset_of_floats(dtype: str) -> None:
    rng = np.random.default_rng(3)
    for scale in (1.0, 1e3, 1e7):
        values = (rng.normal(size=(37, 41)) * scale).astype(dtype)
        values.flat[::7] = 2.5
        for decimals in (0, 1, 2, 3, 5, 9):
            for fill in (None, 2.5):
                for extra in ({}, {"shuffle": True, "compression": "gzip"}):
                    chunk = write_chunk(values, scaleoffset=decimals, fillvalue=fill, **extra)
                    assert chunk.decode() == chunk.expected, (scale, decimals, fill)


def nbit_chunk(stored_type: h5py.h5t.TypeID, values: Array) -> Chunk:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(values.shape)
        plist.set_filter(5, 0, ())
        space = h5py.h5s.create_simple(values.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"x", stored_type, space, plist))[...] = values
    with h5py.File(memory, "r") as file:
        return read_chunk(file["x"])


@pytest.mark.parametrize("base", ["STD_U8LE", "STD_I16LE", "STD_U16BE", "STD_U32LE", "STD_I32BE", "STD_I64LE"])
def test_nbit_of_integers(base: str) -> None:
    whole = 8 * getattr(h5py.h5t, base).get_size()
    rng = np.random.default_rng(4)
    # Less than half of a type's bits HDF5 takes for a corrupt file.
    for bits in range(whole // 2 + 1, whole + 1, max(1, whole // 16)):
        for offset in {0, (whole - bits) // 2, whole - bits}:
            stored_type = getattr(h5py.h5t, base).copy()
            stored_type.set_precision(bits)
            stored_type.set_offset(offset)
            for shape in ((5,), (33, 35)):
                values = rng.integers(0, 1 << bits - 1, shape, np.uint64).astype(f"u{whole // 8}")
                chunk = nbit_chunk(stored_type, values)
                assert unsupported(chunk.filters) is None
                assert chunk.decode() == chunk.expected, (bits, offset, shape)


def test_nbit_of_negative_numbers_and_floats() -> None:
    stored_type = h5py.h5t.STD_I16LE.copy()
    stored_type.set_precision(12)
    chunk = nbit_chunk(stored_type, np.arange(-999, 1000, dtype=np.int16))
    assert chunk.decode() == chunk.expected
    chunk = nbit_chunk(h5py.h5t.IEEE_F32LE, np.linspace(-1, 1, 999, dtype=np.float32))
    assert chunk.decode() == chunk.expected


# What only other writers make ----------------------------------------------------------------------------------------


def test_bitshuffled_blocks_as_long_as_raw_ones() -> None:
    """LZ4 blocks that shrink by nothing look like raw blocks of the LZ4 filter, which this filter does not have."""
    rng = np.random.default_rng(5)
    block_bytes = 64 * 4
    planes: Array
    for zeros in range(block_bytes):
        planes = rng.integers(0, 256, block_bytes, np.uint8)
        planes[:zeros] = 0
        packed = imagecodecs.lz4_encode(planes.tobytes(), header=False)
        if len(packed) == block_bytes:
            break
    else:
        pytest.fail("no block of that length")
    small = imagecodecs.lz4_encode(bytes(block_bytes), header=False)
    values = np.zeros((3, 64), "<i4")
    values[[0, 2]] = np.frombuffer(imagecodecs.bitshuffle_decode(planes.tobytes(), itemsize=4, blocksize=64), "<i4")
    stored = struct.pack(">QI", values.nbytes, block_bytes)
    for block in (packed, small, packed):
        stored += struct.pack(">I", len(block)) + block
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        dataset = file.create_dataset("x", (3, 64), "<i4", chunks=(3, 64), **hdf5plugin.Bitshuffle(nelems=64))
        dataset.id.write_direct_chunk((0, 0), stored)
    with h5py.File(memory, "r") as file:
        assert np.array_equal(file["x"], values)
        chunk = read_chunk(file["x"])
    assert chunk.decode() == values.tobytes()


def test_checksums() -> None:
    chunk = write_chunk(next(contents((100,), "<i4")), fletcher32=True, compression="gzip")
    plain = write_chunk(next(contents((100,), "<i4")), fletcher32=True)
    data, (a, b, c, d) = plain.stored[:-4], plain.stored[-4:]
    assert plain._replace(stored=data + bytes((b, a, d, c))).decode() == plain.expected, "as before HDF5 1.6.3"
    for place in (0, 50, len(plain.stored) - 1):
        wrong = bytearray(plain.stored)
        wrong[place] ^= 4
        with pytest.raises(DatasetCorrupt, match=r"fletcher32.*checksum"):
            plain._replace(stored=bytes(wrong)).decode()
        with pytest.raises(DatasetCorrupt, match="fletcher32"):
            chunk._replace(stored=zlib.compress(bytes(wrong))).decode()


def test_filters_that_are_not_read() -> None:
    chunk = write_chunk(np.zeros((8, 8), "<f4"), **hdf5plugin.Zfp())
    assert "zfp" in (unsupported(chunk.filters) or "").lower()
    assert "no-such" in (unsupported([Filter(60000, "no-such", ())]) or "")
    assert "scaleoffset" in (unsupported([Filter(6, "scaleoffset", (1, 4, 10, 1, 4, 0, 0, 0))]) or "")
    assert "bitshuffle" in (unsupported([Filter(32008, "bitshuffle", (0, 4, 4, 0, 9))]) or "")
    assert "szip" in (unsupported([Filter(4, "szip", (141, 32, 8))]) or "")
    compound = np.zeros(10, [("a", "<i4"), ("b", "<i2")])
    chunk = nbit_chunk(h5py.h5t.py_create(compound.dtype), compound)
    filters = [Filter(5, "nbit", (chunk.filters[0].options[0], 0, *chunk.filters[0].options[2:]))]
    assert "nbit" in (unsupported(filters) or "")


def test_threads_do_not_share_scratch() -> None:
    names = ("fletcher32-shuffle-gzip", "bitshuffle-lz4-0", "blosc2-zstd-1", "szip-nn", "shuffle-lzf")
    chunks = [
        write_chunk(values, **PIPELINES[name]) for name in names for values in contents((64, 129), "<f4", len(name))
    ]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda chunk: chunk.decode() == chunk.expected, chunks * 20))


# Hostile chunks ------------------------------------------------------------------------------------------------------

LIES: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lambda stored: struct.pack(">Q", 1 << 40) + stored[8:],
    "bitshuffle-lz4-0": lambda stored: struct.pack(">Q", 1 << 40) + stored[8:],
    "bitshuffle-zstd-0": lambda stored: stored[:12] + struct.pack(">I", 1 << 30) + stored[16:],
    "blosc-lz4-1": lambda stored: stored[:4] + struct.pack("<I", 0x7FFFFFFF) + stored[8:],
    "blosc-zstd-0": lambda stored: stored[:12] + struct.pack("<I", len(stored) + 1) + stored[16:],
    "blosc2-lz4-1": lambda stored: stored[:48] + struct.pack(">i", 1 << 20) + stored[52:],
    "szip-nn": lambda stored: struct.pack("<I", 0xFFFFFFFF) + stored[4:],
    "gzip": lambda stored: zlib.compress(bytes(8 << 20)),
    "zstd": lambda stored: bytes(imagecodecs.zstd_encode(bytes(8 << 20))),
    "shuffle": lambda stored: stored + b"0",
    "none": lambda stored: stored[:-1],
}


@pytest.mark.parametrize("name", LIES)
def test_sizes_that_lie(name: str) -> None:
    chunk = write_chunk(next(contents((37, 41), "<i2")), **PIPELINES[name])
    with pytest.raises(DatasetCorrupt, match=chunk.filters[0].name.split()[0][:6] if chunk.filters else "bytes"):
        chunk._replace(stored=LIES[name](chunk.stored)).decode()
    with pytest.raises(DatasetCorrupt):
        chunk._replace(stored=b"").decode()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_corrupt_chunks_decode_or_raise(seed: int) -> None:
    """In a process of its own, whose crash is a failure."""
    done = subprocess.run([sys.executable, __file__, str(seed)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def corrupted(chunk: Chunk, rng: np.random.Generator) -> Chunk:
    """The same chunk but for a few bytes, its length, or its filter's options."""
    stored = bytearray(chunk.stored)
    filters = list(chunk.filters)
    kind = rng.integers(5)
    if kind == 0:
        for place in rng.integers(0, len(stored), 4):
            stored[place] = rng.integers(256)
    elif kind == 1:
        # Headers, where the sizes are.
        place = int(rng.integers(min(120, len(stored))))
        number = int(rng.choice([0, 1, 255, 65536, 1 << 31, (1 << 32) - 1]))
        stored[place : place + 4] = number.to_bytes(4, "little" if rng.integers(2) else "big")
    elif kind == 2:
        stored = stored[: rng.integers(len(stored))]
    elif kind == 3:
        stored += rng.integers(0, 256, 40, np.uint8).tobytes()
    else:
        number = int(rng.integers(len(filters)))
        options = list(filters[number].options)
        if options:
            options[rng.integers(len(options))] = int(rng.choice([0, 1, 3, 8, 33, 255, 65536, (1 << 32) - 1]))
            options = options[: int(rng.integers(len(options), len(options) + 2)) - int(rng.integers(2))]
        filters[number] = Filter(filters[number].id, filters[number].name, tuple(options))
    return chunk._replace(stored=bytes(stored), filters=tuple(filters))


def peak_kib() -> int:
    """Most memory that this process has held; what `resource` tells begins with the peak of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def corrupt_many(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pipelines = {**PIPELINES, "scaleoffset": {"scaleoffset": 0}, "scaleoffset-lzf": {"scaleoffset": 9}}
    del pipelines["none"]
    chunks = [
        write_chunk(next(contents(shape, dtype)), **options)
        for name, options in pipelines.items()
        for shape, dtype in (((37, 41), "<i4"), ((2, 9, 17), "<i2"))
    ]
    stored_type = h5py.h5t.STD_U64LE.copy()
    stored_type.set_precision(45)
    chunks.append(nbit_chunk(stored_type, np.arange(999, dtype=np.uint64)))
    before = peak_kib()
    for chunk in chunks:
        for _ in range(60):
            try:
                corrupted(chunk, rng).decode()
            except DatasetCorrupt as error:
                # No filter is to blame where the options that remain make all of them idle.
                if not any(item.name in str(error) for item in chunk.filters) and "instead of" not in str(error):
                    raise
    grown = peak_kib() - before
    assert grown < 64 << 10, f"{grown} KiB more"


if __name__ == "__main__":
    corrupt_many(int(sys.argv[1]))
