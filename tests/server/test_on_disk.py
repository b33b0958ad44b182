"""Where libhdf5 says one thing and the disk another: records, padded text, edges, indices, odd types. All as h5py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5feed
import h5py
import hdf5plugin
import numpy as np
import pytest
from h5py import h5d, h5p, h5t

from tests.support.hdf5_arrays import (
    DONT_FILTER_PARTIAL_CHUNKS,
    EARLY,
    by_h5py,
    create,
    index_of,
    same,
    set_bits,
    set_chunk_options,
    text_type,
)
from tests.support.server_process import ServerProcess

ROWS = 30
RANDOM = np.random.default_rng(3)

RECORD = np.dtype(
    [
        ("id", "<i4"),
        ("name", h5py.string_dtype()),
        ("score", "<f8"),
        ("list", h5py.vlen_dtype(np.dtype("<i2"))),
        ("box", ">i2", (2, 2)),
        ("ref", h5py.ref_dtype),
        ("tag", "S5"),
        ("wave", "<c8"),
    ]
)

COLOURS = [b"red", b"blue"]

PADDINGS = {"nullterm": h5t.STR_NULLTERM, "nullpad": h5t.STR_NULLPAD, "spacepad": h5t.STR_SPACEPAD}


def _records(file: h5py.File) -> np.ndarray:
    values = np.zeros(ROWS, RECORD)
    for row in range(ROWS):
        values[row]["name"] = f"näme {row}" * (row % 3)
        values[row]["ref"] = file.ref
        values[row]["list"] = np.arange(row % 4, dtype="<i2")
    values["id"], values["score"] = np.arange(ROWS), RANDOM.random(ROWS)
    values["box"] = RANDOM.integers(-99, 99, (ROWS, 2, 2))
    values["tag"], values["wave"] = [b"t%d" % row for row in range(ROWS)], RANDOM.random(ROWS) * 1j
    return values


def _write_records(path: Path) -> None:
    with h5py.File(path, "w") as file:
        values = _records(file)
        file["plain"] = values
        file.create_dataset("gzip", data=values, chunks=(7,), compression="gzip", shuffle=True)
        file.create_dataset("zstd", data=values, chunks=(7,), **hdf5plugin.Zstd())
        file.create_dataset("chunks", data=values, chunks=(7,))
        half = file.create_dataset("half", (ROWS,), RECORD, chunks=(7,))
        half[:9] = values[:9]
        compact = h5p.create(h5p.DATASET_CREATE)
        compact.set_layout(h5d.COMPACT)
        create(file, "compact", h5t.py_create(RECORD, logical=True), (ROWS,), compact)[...] = values
        # Members that do not lie in the order in which they are named.
        kind = h5t.create(h5t.COMPOUND, 32)
        for name, offset, member in (("z", 24, h5t.IEEE_F64LE), ("a", 0, h5t.STD_I32LE), ("s", 8, _any_text())):
            kind.insert(name.encode(), offset, member)
        mixed = create(file, "mixed", kind, (ROWS,))
        rows = np.zeros(ROWS, mixed.dtype)
        rows["z"], rows["a"], rows["s"] = RANDOM.random(ROWS), np.arange(ROWS), [f"s{row}" for row in range(ROWS)]
        mixed[...] = rows


def _any_text() -> h5t.TypeID:
    return h5t.py_create(h5py.string_dtype(), logical=True)


def _write_text(path: Path) -> None:
    """As C and Fortran leave it: what lies behind the end of a text is what lay there before."""
    raw = np.zeros((ROWS, 8), np.uint8)
    for row in range(ROWS):
        raw[row] = np.frombuffer(COLOURS[row % 2].ljust(6, b"\0") + bytes([row, 7]), np.uint8)
    blanks = np.array([list(COLOURS[row % 2].ljust(8)) for row in range(ROWS)], np.uint8)
    odd = [b"ab\0cd   ", b"        ", b" a b    ", b"ab \0\0\0\0\0", b"abcdefgh", b"a\0b\0    ", b"\0\0\0\0\0\0\0\0"]
    strange = np.array([list(odd[row % len(odd)]) for row in range(ROWS)], np.uint8)
    with h5py.File(path, "w") as file:
        for name, padding in PADDINGS.items():
            kind = text_type(8, padding)
            gzip = h5p.create(h5p.DATASET_CREATE)
            gzip.set_chunk((7,))
            gzip.set_deflate(1)
            create(file, name, kind, (ROWS,), raw=blanks if name == "spacepad" else raw)
            create(file, f"odd_{name}", kind, (ROWS,), gzip, raw=strange)
            record = h5t.create(h5t.COMPOUND, 14)
            for member, offset, one in (("s", 2, kind), ("i", 0, h5t.STD_I16LE), ("j", 10, h5t.STD_I32BE)):
                record.insert(member.encode(), offset, one)
            whole = RANDOM.integers(0, 99, (ROWS, 14), dtype=np.uint8)
            whole[:, 2:10] = strange
            create(file, f"record_{name}", record, (ROWS,), raw=whole)
            filled = h5p.create(h5p.DATASET_CREATE)
            filled.set_fill_value(np.array(b"ab", "S8"))
            create(file, f"filled_{name}", kind, (ROWS,), filled)
        create(
            file,
            "classes",
            text_type(6, h5t.STR_SPACEPAD),
            (2,),
            raw=np.array([list(b"cat   "), list(b"dog   ")], "u1"),
        )
        file["x"] = RANDOM.random((ROWS, 4))


def _write_edges(path: Path) -> None:
    """Chunks that reach beyond the array are stored without filters, where they are told to."""
    values = RANDOM.integers(0, 99, (ROWS, 7)).astype("<i4")
    with h5py.File(path, "w", libver="latest") as file:
        for name in ("gzip", "shuffle", "fletcher32", "all"):
            for growth, maxshape in (("fixed", None), ("grows", (None, 7)), ("both", (None, None)), ("wide", (40, 20))):
                properties = h5p.create(h5p.DATASET_CREATE)
                properties.set_chunk((8, 4))
                if name in ("shuffle", "all"):
                    properties.set_shuffle()
                if name in ("gzip", "all"):
                    properties.set_deflate(4)
                if name in ("fletcher32", "all"):
                    properties.set_fletcher32()
                set_chunk_options(properties, DONT_FILTER_PARTIAL_CHUNKS)
                create(file, f"{name}_{growth}", h5t.STD_I32LE, (ROWS, 7), properties, maxshape)[...] = values


def _write_indices(path: Path) -> None:
    """Each kind of chunk index; libhdf5 mistakes the places in one that grows along another axis than the first."""
    values = np.arange(ROWS * 11 * 3, dtype="<i4").reshape(ROWS, 11, 3) + 1
    with h5py.File(path, "w", libver="latest") as file:
        for name, maxshape in (
            ("single", None),
            ("fixed", (ROWS, 11, 3)),
            ("wider", (2 * ROWS, 40, 3)),
            ("first", (None, 11, 3)),
            ("first_wider", (None, 40, 9)),
            ("second", (ROWS, None, 3)),
            ("last", (ROWS, 11, None)),
            ("two", (None, None, 3)),
        ):
            for part in ("whole", "part"):
                properties = h5p.create(h5p.DATASET_CREATE)
                properties.set_chunk(values.shape if name == "single" else (4, 5, 2))
                dataset = create(file, f"{name}_{part}", h5t.STD_I32LE, values.shape, properties, maxshape)
                # What is not beyond the array, when it is mistaken, is what is told wrongly.
                rows = slice(None) if part == "whole" else slice(0, 8)
                columns = slice(None) if part == "whole" else slice(0, 5)
                dataset[rows, columns] = values[rows, columns]
        early = h5p.create(h5p.DATASET_CREATE)
        early.set_chunk((4, 5, 2))
        early.set_alloc_time(EARLY)
        create(file, "implicit", h5t.STD_I32LE, values.shape, early)[...] = values
        assert {index_of(dataset) for dataset in file.values()} >= {1, 2, 3, 4, 5}


def _write_types(path: Path) -> None:
    """What is no number of numpy's on disk, and what h5py makes one of."""
    numbers = RANDOM.integers(0, 200, ROWS)
    with h5py.File(path, "w") as file:
        for name in ("B8LE", "B16BE", "B32LE", "B64LE"):
            kind = getattr(h5t, f"STD_{name}")
            create(file, f"bits_{name}", kind, (ROWS,), raw=RANDOM.integers(0, 256, ROWS * kind.get_size(), "u1"))
        create(file, "i24", set_bits(h5t.STD_I32LE, 24), (ROWS,))[...] = numbers - 99
        create(file, "u10", set_bits(h5t.STD_U16BE, 10, 3), (ROWS,), raw=RANDOM.integers(0, 256, 2 * ROWS, "u1"))
        for name, size, fields, bias in (
            ("fp8", 1, (7, 3, 4, 0, 3), 7),
            ("f24", 3, (23, 15, 8, 0, 15), 127),
            ("f32wide", 4, (31, 20, 11, 0, 20), 1023),
            ("f64shifted", 8, (39, 31, 8, 8, 23), 127),
        ):
            kind = h5t.IEEE_F64LE.copy()
            kind.set_fields(*fields)
            kind.set_ebias(bias)
            kind.set_precision(fields[0] + 1)
            kind.set_size(size)
            create(file, name, kind, (ROWS,))[...] = numbers / 8
        record = h5t.create(h5t.COMPOUND, 11)
        for member, offset, one in (
            ("i", 0, set_bits(h5t.STD_I32LE, 24)),
            ("b", 4, h5t.STD_B8LE),
            ("x", 5, h5t.IEEE_F32LE),
        ):
            record.insert(member.encode(), offset, one)
        table = create(file, "record", record, (ROWS,))
        table[...] = np.array([(row - 9, row, row / 3) for row in range(ROWS)], table.dtype)
        kind = h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, basetype="i2")
        file.create_dataset("bools", data=numbers % 2, dtype=kind)
        for name, options in (("zstd", hdf5plugin.Zstd()), ("lz4", hdf5plugin.LZ4()), ("bzip2", hdf5plugin.BZip2())):
            texts = [f"wörd {row}" * (row % 5) for row in range(ROWS)]
            file.create_dataset(f"text_{name}", data=texts, dtype=h5py.string_dtype(), chunks=(7,), **options)
            lists = file.create_dataset(
                f"lists_{name}", (ROWS,), h5py.vlen_dtype(np.dtype("<f4")), chunks=(7,), **options
            )
            for row in range(ROWS):
                lists[row] = np.arange(row % 4, dtype="<f4")
            fixed = np.array([b"abc"[: row % 4] for row in range(ROWS)], "S3")
            file.create_dataset(f"fixed_{name}", data=fixed, chunks=(7,), **options)
        file.create_dataset("square", data=[[f"{row} {column}" for column in "ab"] for row in range(ROWS)])
        pairs = np.zeros((ROWS, 2), [("a", "<i4"), ("b", "S3")])
        pairs["a"] = RANDOM.integers(0, 9, (ROWS, 2))
        file["pairs"] = pairs


FILES = {
    "records": _write_records,
    "text": _write_text,
    "edges": _write_edges,
    "indices": _write_indices,
    "types": _write_types,
}

REFUSED = {
    "records": {f"{name}.ref": "reference" for name in ("plain", "gzip", "zstd", "chunks", "half", "compact")},
    "text": {"classes": "class names"},
    "types": {"square": "more than one axis", "pairs.b": "more than one string per row"},
}
"""What is not served, and a word of the reason."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("on_disk") / "data"
    folder.mkdir()
    for name, write in FILES.items():
        write(folder / f"{name}.h5")
    # Arrays that are all alike might be classes, one after the other.
    alike = [f'[datasets.{name}]\nfiles = ["{name}.h5"]\nclasses = false\n' for name in ("edges", "indices")]
    (folder / "h5feed.toml").write_text("".join(alike))
    return serve_module(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_as_h5py_reads_it(server: ServerProcess, feed: h5feed.Feed, name: str) -> None:
    """All that is served is bit by bit what h5py gives, shuffled, with duplicates; the rest says truly why not."""
    dataset, refused = feed[name], REFUSED.get(name, {})
    assert dataset.rows == ROWS
    rows = np.concatenate([RANDOM.permutation(ROWS), [0, ROWS - 1, 0]])
    assert {field for field, about in dataset.fields.items() if not about.readable} == set(refused)
    for field, word in refused.items():
        assert word in str(dataset.fields[field].reason)
    for field in set(dataset.fields) - set(refused):
        expected = by_h5py(server.folder / f"{name}.h5", field)
        assert same(dataset.take(rows, fields=[field]), field, expected[rows]), field


@pytest.mark.parametrize("padding", ["nullterm", "spacepad"])
def test_padded_text_has_its_classes(feed: h5feed.Feed, padding: str) -> None:
    """Two colours are two classes, half of the rows each, whatever their padding; strata and statistics follow."""
    dataset = feed["text"]
    rows = dataset.split_rows("test", test=6, stratify=padding)
    texts = dataset.take(rows, fields=[padding]).text(padding)
    assert sorted(texts) == ["blue"] * 3 + ["red"] * 3
    found = dataset.stats(field=padding)["values"]
    assert {entry["value"]: entry["rows"] for entry in found} == {"blue": ROWS // 2, "red": ROWS // 2}
