"""Arrays of all kinds, by chance from a seed: dtype × layout × filter × padding × members × creation properties."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from h5py import h5d, h5p, h5t

from tests.support.hdf5_arrays import DONT_FILTER_PARTIAL_CHUNKS, create, set_bits, set_chunk_options, text_type

NUMBERS = [
    "|u1",
    "|i1",
    "<u2",
    ">i2",
    "<i4",
    ">u4",
    "<i8",
    ">u8",
    "<f2",
    ">f2",
    "<f4",
    ">f4",
    "<f8",
    ">f8",
    "<c8",
    ">c16",
    "|b1",
]

PADDINGS = (h5t.STR_NULLTERM, h5t.STR_NULLPAD, h5t.STR_SPACEPAD)

FAILURES = (ValueError, TypeError, OSError, RuntimeError, AttributeError)
"""What h5py, and its HDF5, say of combinations that they cannot write."""

Fill = Callable[[h5py.Dataset, np.random.Generator], None]


def write_variety(path: Path, seed: int, arrays: int) -> None:
    """A file of arrays that share their rows; those that cannot be written are left out."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 40))
    options = {"libver": random.choice(["earliest", "v108", "v110", "latest"])}
    if random.random() < 0.2:
        options["userblock_size"] = int(random.choice([512, 4096]))
    with h5py.File(path, "w", **options) as file:
        # Whatever else fails, there is one dataset.
        file["plain"] = np.arange(rows)
        for number in range(arrays):
            name = f"a{number}"
            try:
                _write(file, name, rows, random)
            except FAILURES:
                with contextlib.suppress(KeyError):
                    del file[name]


def _write(file: h5py.File, name: str, rows: int, random: np.random.Generator) -> None:
    kind, fill, plain = _element(random)
    shape = (rows, *(int(extent) for extent in random.integers(1, 7, random.integers(0, 3) if plain else 0)))
    properties = h5p.create(h5p.DATASET_CREATE)
    layout = random.choice(["contiguous", "compact", "chunked", "chunked", "chunked", "chunked"])
    maxshape: tuple[int | None, ...] | None = None
    if layout == "compact":
        properties.set_layout(h5d.COMPACT)
    elif layout == "chunked":
        maxshape = tuple(_most(extent, random) for extent in shape)
        chunk = [int(width) for width in random.integers(1, 12, len(shape))]
        if random.random() < 0.3:
            chunk = [1, *shape[1:]] if random.random() < 0.5 else list(shape)
        chunk = [width if most is None else min(width, most) for width, most in zip(chunk, maxshape, strict=True)]
        properties.set_chunk(tuple(chunk))
        _filter(properties, kind, random)
        if random.random() < 0.3:
            set_chunk_options(properties, DONT_FILTER_PARTIAL_CHUNKS)
    if random.random() < 0.3:
        times = (h5d.ALLOC_TIME_EARLY, h5d.ALLOC_TIME_LATE, h5d.ALLOC_TIME_INCR)
        properties.set_alloc_time(times[random.integers(3)])
    if random.random() < 0.3 and kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.STRING) and plain:
        properties.set_fill_value(np.array(7 if kind.get_class() != h5t.STRING else b"ab "))
    dataset = create(file, name, kind, shape, properties, maxshape)
    if random.random() < 0.8:
        fill(dataset, random)
    elif random.random() < 0.5:
        with contextlib.suppress(*FAILURES):
            values = np.zeros(shape, dataset.dtype)
            start = int(random.integers(rows))
            dataset[start : start + 3] = values[start : start + 3]
    dataset.attrs["units"] = "m"


def _most(extent: int, random: np.random.Generator) -> int | None:
    chance = random.random()
    return None if chance < 0.25 else extent + int(random.integers(0, 20)) if chance < 0.5 else extent


def _filter(properties: h5p.PropDCID, kind: h5t.TypeID, random: np.random.Generator) -> None:
    """A pipeline: what rearranges or rounds, what packs, a checksum; each or none."""
    lists = kind.detect_class(h5t.VLEN) or (kind.get_class() == h5t.STRING and kind.is_variable_str())
    odd = lists or kind.get_class() == h5t.COMPOUND
    chance = random.random()
    if chance < 0.4:
        properties.set_shuffle()
    elif chance < 0.5 and not odd:
        properties.set_scaleoffset(h5py.h5z.SO_INT, 0)
    elif chance < 0.6 and not odd:
        properties.set_filter(h5py.h5z.FILTER_NBIT, 0, ())
    packers: list[Any] = [None, "gzip", "gzip", "lzf", hdf5plugin.Zstd(), hdf5plugin.LZ4(), hdf5plugin.BZip2()]
    if not odd:
        packers += ["szip", hdf5plugin.Blosc(), hdf5plugin.Blosc2(), hdf5plugin.Bitshuffle()]
    packer = packers[random.integers(len(packers))]
    if packer == "gzip":
        properties.set_deflate(int(random.integers(0, 10)))
    elif packer == "lzf":
        properties.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL, ())
    elif packer == "szip":
        properties.set_szip(h5py.h5z.SZIP_NN_OPTION_MASK, 8)
    elif packer is not None:
        properties.set_filter(packer["compression"], h5py.h5z.FLAG_OPTIONAL, packer["compression_opts"])
    if random.random() < 0.25:
        properties.set_fletcher32()


def _element(random: np.random.Generator) -> tuple[h5t.TypeID, Fill, bool]:
    """A type, what writes all rows of it, and whether it may have further axes."""
    chance = random.random()
    if chance < 0.4:
        dtype = np.dtype(str(random.choice(NUMBERS)))
        return h5t.py_create(dtype, logical=True), _by_values, True
    if chance < 0.55:
        return text_type(int(random.integers(1, 9)), PADDINGS[random.integers(3)]), _by_bytes, False
    if chance < 0.6:
        base = str(random.choice(["|i1", "<i2", ">u4"]))
        names = {"A": 0, "B": 1, "Ü": 100}
        return h5t.py_create(h5py.enum_dtype(names, basetype=base), logical=True), _by_bytes, True
    if chance < 0.66:
        kind = [h5t.STD_I32LE, h5t.STD_U16BE, h5t.STD_I64BE][random.integers(3)]
        bits = int(random.integers(1, 8 * kind.get_size()))
        return set_bits(kind, bits, int(random.integers(0, 8 * kind.get_size() - bits + 1))), _by_bytes, True
    if chance < 0.69:
        return [h5t.STD_B8LE, h5t.STD_B16BE, h5t.STD_B64LE][random.integers(3)], _by_bytes, True
    if chance < 0.75:
        return h5t.py_create(h5py.string_dtype(), logical=True), _by_values, False
    if chance < 0.8:
        dtype = np.dtype(str(random.choice(["<i4", "<f8", "|u1", "|b1"])))
        return h5t.py_create(h5py.vlen_dtype(dtype), logical=True), _by_values, False
    if chance < 0.83:
        return h5t.py_create(np.dtype((str(random.choice(NUMBERS)), (2, 3)))), _by_values, False
    members = [(f"m{number}", *_member(random)) for number in range(random.integers(1, 6))]
    dtype = np.dtype(members, align=bool(random.random() < 0.5))
    if any(h5py.check_vlen_dtype(dtype[name]) or dtype[name].kind == "O" for name in dtype.names or ()):
        dtype = np.dtype(members)
    kind = h5t.py_create(dtype, logical=True)
    return kind, _by_values, False


def _member(random: np.random.Generator) -> tuple[Any, ...]:
    chance = random.random()
    if chance < 0.2:
        return (h5py.string_dtype(),)
    if chance < 0.3:
        return (h5py.vlen_dtype(np.dtype("<i2")),)
    if chance < 0.4:
        return (f"S{random.integers(1, 7)}",)
    if chance < 0.5:
        return (str(random.choice(NUMBERS)), (int(random.integers(1, 4)), 2))
    if chance < 0.55:
        return (h5py.enum_dtype({"A": 0, "B": 1}, basetype="i1"),)
    return (str(random.choice(NUMBERS)),)


def _by_bytes(dataset: h5py.Dataset, random: np.random.Generator) -> None:
    """Any bytes; of text those that padding is made of, and some that it is not."""
    kind = dataset.id.get_type()
    nbytes = dataset.size * kind.get_size()
    few = kind.get_class() == h5t.STRING
    raw = random.choice(np.frombuffer(b"  \0\0aB", "u1"), nbytes) if few else random.integers(0, 256, nbytes, "u1")
    dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(raw), mtype=kind)


def _by_values(dataset: h5py.Dataset, random: np.random.Generator) -> None:
    values = np.zeros(dataset.shape, dataset.dtype)
    if values.dtype.names:
        for name in values.dtype.names:
            values[name] = _values(values.dtype[name], values.shape, random)
    else:
        values = _values(dataset.dtype, dataset.shape, random)
    dataset[...] = values


def _values(dtype: np.dtype[Any], shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if dtype.subdtype is not None:
        return _values(dtype.subdtype[0], (*shape, *dtype.subdtype[1]), random)
    size = int(np.prod(shape))
    item = h5py.check_vlen_dtype(dtype)
    if dtype.kind == "O":
        found = np.empty(size, object)
        for place in range(size):
            length = int(random.integers(0, 6))
            found[place] = "é" * length if h5py.check_string_dtype(dtype) else _values(item, (length,), random)
        return found.reshape(shape)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    if dtype.kind == "S":
        return np.array([b"abcdefgh"[: random.integers(0, 9)] for _ in range(size)], dtype).reshape(shape)
    if dtype.kind in "fc":
        return (random.standard_normal(shape) * 100).astype(dtype)
    return random.integers(0, 256, size * dtype.itemsize, "u1").view(dtype).reshape(shape)
