"""Crops of rows: against numpy on h5py's arrays, for arrays of all kinds, and what is read for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5feed.wire
import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.crops import cells_of, grid_starts, random_starts
from h5feed.errors import BadParameter, FieldNotFound
from h5feed.order import order_key
from h5feed.stored.crop_reader import GAP_BYTES, Spans
from h5feed_server.batches.pieces import PiecesPlan
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.order_spec import OrderSpec
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

ROWS, ARRAYS = 7, 60
WIDE = (40, 30_000)
"""Rows whose lines are further apart than what is read along, in chunks that are not read as a whole."""

FILTERS: list[dict[str, Any]] = [
    {},
    {"compression": "gzip"},
    {"compression": "lzf", "shuffle": True},
    dict(hdf5plugin.LZ4()),
]

PACKED = {"scale_factor": 0.5, "add_offset": -3.0}


def _write(path: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(ARRAYS):
            shape = tuple(int(extent) for extent in random.integers(1, 14, random.integers(1, 5)))
            dtype = np.dtype(str(random.choice(["|u1", "<i2", ">i4", "<f4", ">f8", "<f2", "<c8", ">c16", "|b1"])))
            values = random.integers(0, 256, (ROWS, *shape, dtype.itemsize), np.uint8)
            array = values.view(dtype)[..., 0] if dtype.kind in "ui" else values[..., 0].astype(dtype)
            fill = np.array(7, dtype)[()]
            options: dict[str, Any] = {}
            if random.random() < 0.8:
                options["chunks"] = tuple(int(random.integers(1, extent + 1)) for extent in array.shape)
                if random.random() < 0.2:
                    options["chunks"] = (1, *shape)
                options |= FILTERS[random.integers(4)]
            if "chunks" in options and random.random() < 0.3:
                made = file.create_dataset(f"a{number}", array.shape, dtype, fillvalue=fill, **options)
                # Some chunks are never written.
                made[2:4] = array[2:4]
            elif random.random() < 0.1:
                file.create_dataset(f"a{number}", array.shape, dtype, fillvalue=fill)
            else:
                file.create_dataset(f"a{number}", data=array, **options)
        packed = file.create_dataset("packed", data=random.integers(0, 99, (ROWS, 9, 12), np.int16), chunks=(3, 4, 5))
        packed.attrs.update(PACKED)
        records = np.zeros(ROWS, [("number", "<i4"), ("picture", "<u2", (6, 8))])
        records["picture"] = random.integers(0, 999, (ROWS, 6, 8))
        file["table"] = records
        wide = random.integers(0, 256, (ROWS, *WIDE), np.uint8)
        file["wide"] = wide
        file.create_dataset("wide_chunks", data=wide, chunks=(1, 40, 29_000))
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((ROWS, 5, 5))
        inline = h5py.Dataset(h5py.h5d.create(file.id, b"inline", h5py.h5t.NATIVE_INT16, space, compact))
        inline[...] = random.integers(0, 99, (ROWS, 5, 5))
        virtual = h5py.VirtualLayout((ROWS, 9, 12), "<i2")
        virtual[...] = h5py.VirtualSource(file["packed"])
        file.create_virtual_dataset("virtual", virtual)
        file["label"] = np.arange(ROWS) % 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.h5"
    _write(path)
    return path


@pytest.fixture(scope="module", params=["cached", "uncached"])
def services(
    path: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    """Fields are in memory as a whole, or read from the file for each batch, without a cache of chunks."""
    caches: dict[str, Any] = {} if request.param == "cached" else {"cache_bytes": 0, "chunk_cache_bytes": 0}
    begun = Services.start(Settings(data_dir=path.parent, cache_dir=tmp_path_factory.mktemp("cache"), **caches))
    try:
        begun.catalog.dataset_within(60, "data")
        yield begun
    finally:
        begun.close()


@pytest.fixture(scope="module")
def truth(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays, as they are served."""
    found = {}
    with h5py.File(path) as file:
        for name, item in file.items():
            array = item[()]
            if name == "table":
                found["table.picture"] = array["picture"]
            elif name == "packed":
                found[name] = (array * PACKED["scale_factor"] + PACKED["add_offset"]).astype("<f4")
            elif array.dtype.kind == "c":
                found[name] = np.stack([array.real, array.imag], -1)
            else:
                found[name] = array
    return found


def _lease(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


def _bodies(services: Services, spec: OrderSpec, batch_size: int = 3) -> list[dict[str, npt.NDArray[Any]]]:
    """All batches of an order, each as a body of its own."""
    plan = services.batcher.plan("data", spec, batch_size, None)
    bodies = [plan.filled(index, index + 1, _lease) for index in range(plan.grid.batches)]
    if bodies:
        assert plan.filled(0, plan.grid.batches, _lease).tobytes() == b"".join(body.tobytes() for body in bodies)
    return [h5feed.wire.read_body(body)[0] for body in bodies]


def _check(tensors: dict[str, npt.NDArray[Any]], name: str, array: npt.NDArray[Any], crop: tuple[int, ...]) -> None:
    """Each sample is the part of its row that begins where it says."""
    assert tensors["__crop__"].dtype == np.int64
    assert tensors["__crop__"].shape == (len(tensors["__rows__"]), len(crop))
    for row, starts, sample in zip(tensors["__rows__"], tensors["__crop__"], tensors[name], strict=True):
        assert (starts >= 0).all()
        part = tuple(slice(start, start + length) for start, length in zip(starts, crop, strict=True))
        expected = array[row][part]
        assert sample.shape == expected.shape == (*crop, *array.shape[1 + len(crop) :])
        np.testing.assert_array_equal(sample, expected)


def _axes(services: Services, name: str) -> int:
    return services.catalog.dataset("data").field(name).row_shape.axes


@given(data=st.data())
def test_crops_are_parts_of_rows(services: Services, truth: dict[str, npt.NDArray[Any]], data: st.DataObject) -> None:
    """Of all layouts, filters and types, by all three rules: each sample once, the same in runs of batches."""
    names = sorted(name for name in truth if _axes(services, name))
    name = data.draw(st.sampled_from(names))
    axes = data.draw(st.integers(1, _axes(services, name)))
    extents = truth[name].shape[1 : 1 + axes]
    wide = name.startswith("wide")
    crop = tuple(data.draw(st.integers(extent // 3 if wide else 1, extent), label="length") for extent in extents)
    at = data.draw(st.sampled_from(["random", "center", "grid"]))
    spec = OrderSpec(
        crop="x".join(map(str, crop)),
        crop_at=at,
        crop_fields=name.replace(" ", "%20"),
        fields=f"{name},label",
        shuffle=data.draw(st.booleans()),
        window=None,
        seed=data.draw(st.integers(0, 3)),
        epoch=data.draw(st.integers(0, 3)),
    )
    bodies = _bodies(services, spec, data.draw(st.integers(1, 9)))
    for tensors in bodies:
        _check(tensors, name, truth[name], crop)
        np.testing.assert_array_equal(tensors["label"], tensors["__rows__"] % 3)
    rows = np.concatenate([tensors["__rows__"] for tensors in bodies])
    starts = np.concatenate([tensors["__crop__"] for tensors in bodies]).tolist()
    if at == "grid":
        along = [
            [min(cell * length, extent - length) for cell in range(-(-extent // length))]
            for length, extent in zip(crop, extents, strict=True)
        ]
        expected = [(row, *start) for row in range(ROWS) for start in itertools.product(*along)]
        found = [(row, *start) for row, start in zip(rows.tolist(), starts, strict=True)]
        assert found == expected or spec.shuffle
        assert sorted(found) == expected
    else:
        assert sorted(rows.tolist()) == list(range(ROWS))
    if at == "center":
        assert starts == [[(e - c) // 2 for e, c in zip(extents, crop, strict=True)]] * ROWS


@given(
    at=st.sampled_from(["random", "center", "grid"]),
    shards=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    window=st.sampled_from([None, 1, 2, 5, 2**61]),
    limit=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2),
)
@example(at="random", shards=2, batch_size=3, window=None, limit=None, seed=0)
def test_shards_have_the_samples_of_the_epoch(
    services: Services, at: str, shards: int, batch_size: int, window: int | None, limit: int | None, seed: int
) -> None:
    """Each once, at any number of shards: with the rows and parts that one reader gets."""

    def samples(shard: int, of: int) -> list[tuple[int, ...]]:
        spec = OrderSpec(
            crop="4x5", crop_at=at, fields="packed,virtual", shuffle=True, window=window, seed=seed, epoch=1,
            limit=limit, shard=shard, shards=of, last="pad",
        )  # fmt: skip
        return [
            (int(row), *start)
            for tensors in _bodies(services, spec, batch_size)
            for row, start, weight in zip(
                tensors["__rows__"].tolist(), tensors["__crop__"].tolist(), tensors["__weight__"], strict=True
            )
            if weight
        ]

    whole = samples(0, 1)
    assert len(whole) == (limit or ROWS) * (9 if at == "grid" else 1)
    assert sorted(itertools.chain.from_iterable(samples(shard, shards) for shard in range(shards))) == sorted(whole)
    assert at == "random" or len(set(whole)) == len(whole)
    assert {row for row, *_ in whole} <= set(range(limit or ROWS))


def test_random_crops_differ(services: Services) -> None:
    """By epoch, seed and sample, also those of a row that is drawn twice; images and masks have the same."""
    options = {"crop": "5x5", "fields": "wide,wide_chunks", "weights": "label", "epoch_rows": 20}
    first, again, epoch, seed = (
        _bodies(services, OrderSpec(**options, **more), 20)[0] for more in ({}, {}, {"epoch": 1}, {"seed": 1})
    )
    np.testing.assert_array_equal(first["__crop__"], again["__crop__"])
    np.testing.assert_array_equal(first["wide"], first["wide_chunks"])
    assert len(set(first["__rows__"].tolist())) < 20
    assert len({tuple(start) for start in first["__crop__"].tolist()}) == 20
    for other in (epoch, seed):
        assert (first["__crop__"] != other["__crop__"]).any(axis=1).all()


def test_random_starts_are_uniform() -> None:
    """All starts that fit are drawn, each about equally often, and axes are independent."""
    starts = random_starts(np.arange(30_000), (3, 7), (5, 9), order_key(0, 0, "all"))
    counts = np.zeros((3, 3), int)
    np.add.at(counts, tuple(starts.T), 1)
    assert counts.sum() == 30_000
    # Ten standard deviations of a binomial distribution.
    assert abs(counts - 30_000 / 9).max() < 10 * math.sqrt(30_000 / 9)


def test_grid_covers_rows() -> None:
    """Every element is in a cell, and cells of the inside do not overlap."""
    crop, extents = (4, 5), (10, 15)
    cells = math.prod(cells_of(crop, extents))
    assert cells == 9
    times = np.zeros(extents, int)
    for first, second in grid_starts(np.arange(cells), crop, extents):
        times[first : first + 4, second : second + 5] += 1
    assert times.min() == 1
    assert (times > 1).sum() == 2 * 15


@given(
    block=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    itemsize=st.sampled_from([1, 4, 5000]),
    data=st.data(),
)
def test_ranges_of_a_part(block: list[int], itemsize: int, data: st.DataObject) -> None:
    """They contain the part, and no gap of more than `GAP_BYTES`."""
    part = tuple(data.draw(st.integers(1, extent)) for extent in block)
    spans = Spans.of(tuple(block), part, itemsize)
    strides = [itemsize * math.prod(block[axis + 1 :]) for axis in range(len(block))]
    ranges = [(int(begin), int(begin) + spans.nbytes) for begin in spans.offsets(np.zeros(1, np.int64))]
    items = sorted(
        sum(index * stride for index, stride in zip(place, strides, strict=True)) for place in np.ndindex(part)
    )
    assert all(any(begin <= item and item + itemsize <= end for begin, end in ranges) for item in items)
    assert items[0] == ranges[0][0] and items[-1] + itemsize == ranges[-1][1]
    read = sum(end - begin for begin, end in ranges)
    assert spans.is_dense == (read == itemsize * len(items))
    gaps = [b - a - itemsize for a, b in itertools.pairwise(items)]
    assert read <= itemsize * len(items) + sum(gap for gap in gaps if gap <= GAP_BYTES)


@pytest.mark.parametrize("filters", [{}, {"compression": "gzip", "compression_opts": 1}])
def test_each_touched_chunk_is_read_once(tmp_path: Path, filters: dict[str, Any]) -> None:
    """Of volumes of 256³ in chunks of 64³, a batch of crops of 64³ reads the chunks that they touch, and no other."""
    size, chunk, rows = 256, 64, 20
    values = np.random.default_rng(0).integers(0, 4, (size, size, size), np.uint8)
    with h5py.File(tmp_path / "volumes.h5", "w") as file:
        volumes = file.create_dataset("volume", (rows, *[size] * 3), "u1", chunks=(1, *[chunk] * 3), **filters)
        # The others have the fill value: nothing is stored of them.
        volumes[3], volumes[11] = values, values[::-1]
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache"))
    try:
        services.catalog.dataset_within(60, "volumes")
        spec = OrderSpec(crop="64x64x64", fields="volume", shuffle=True, seed=5)
        plan = services.batcher.plan("volumes", spec, rows, None)
        fetched: list[tuple[int, int]] = []
        for _ in range(2):
            before = services.batcher.reader.decoded_chunks
            tensors = h5feed.wire.read_body(plan.filled(0, 1, _lease))[0]
            fetched.append((before, services.batcher.reader.decoded_chunks))
        touched = set()
        for row, starts, sample in zip(tensors["__rows__"], tensors["__crop__"], tensors["volume"], strict=True):
            part = tuple(slice(start, start + 64) for start in starts)
            whole = {3: values, 11: values[::-1]}.get(int(row), np.zeros_like(values))
            np.testing.assert_array_equal(sample, whole[part])
            if row in (3, 11):
                cells = [range(start // chunk, (start + 63) // chunk + 1) for start in starts]
                touched |= {(row, *cell) for cell in itertools.product(*cells)}
        assert 2 <= len(touched) <= 16
        assert fetched[0][1] - fetched[0][0] == len(touched)
        # What is decoded is kept; what is not filtered need not be.
        assert fetched[1][1] - fetched[1][0] == (0 if filters else len(touched))
    finally:
        services.close()


def test_pieces_are_sent_as_tensors(services: Services, truth: dict[str, npt.NDArray[Any]]) -> None:
    """Bodies that describe where rows are stored have cropped fields as arrays, and say why."""
    spec = OrderSpec(crop="4x5", fields="virtual,label,wide", crop_fields="virtual", last="pad")
    plan = services.batcher.plan("data", spec, 4, None)
    body = PiecesPlan(plan, Path("/"), named=False, unnamed="", compresses=True).filled(0, 2, _lease)
    tensors, about, _ = h5feed.wire.read_body(body)
    _check(tensors, "virtual", truth["virtual"], (4, 5))
    assert "rows are cropped" in about["pieces"]


def test_parts_of_a_batch(services: Services) -> None:
    """Rows of a batch that are requested alone have the parts that they have in the batch."""
    for fields in ("packed", "packed,label"):
        plan = services.batcher.plan("data", OrderSpec(crop="4x5", fields=fields, shuffle=True), ROWS, None)
        whole = h5feed.wire.read_body(plan.filled(0, 1, _lease))[0]
        part = h5feed.wire.read_body(plan.filled(0, 1, _lease, part=(2, 5)))[0]
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][2:5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": "4x5", "fields": "packed,wide"}, "differ in size.*crop_fields=packed"),
        ({"crop": "4x13", "fields": "packed"}, r"larger than the rows of 'packed'.*\[9, 12\]"),
        (
            {"crop": "4x5x6", "fields": "packed,label"},
            r"rows with 3 axes that can be cropped, .* \(packed: \[9, 12\], label: \[\]\)",
        ),
        ({"crop": "4", "fields": "packed,label", "crop_fields": "label"}, r"0 axes can be cropped, not 1"),
        ({"crop": "4x5", "fields": "packed", "crop_fields": ""}, "names no field"),
    ],
)
def test_what_cannot_be_cropped(services: Services, options: dict[str, Any], says: str) -> None:
    """Errors say which shape is in the way, and what would be right."""
    with pytest.raises(BadParameter, match=says):
        services.batcher.plan("data", OrderSpec(**options), 4, None)


def test_unknown_fields(services: Services) -> None:
    """A field to crop has to be one of the samples'."""
    with pytest.raises(FieldNotFound, match="packed"):
        services.batcher.plan("data", OrderSpec(crop="4x5", crop_fields="paked", fields="packed"), 4, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": "4y5"}, "64x64"),
        ({"crop": "0x5"}, "64x64"),
        ({"crop": "1x1x1x1x1"}, "at most 4"),
        ({"crop_at": "grid"}, "crop_at needs crop"),
        ({"crop_fields": "a"}, "crop_fields needs crop"),
        ({"crop": "4x5", "crop_at": "grid", "balance": True}, "crop_at=random"),
    ],
)
def test_contradicting_parameters(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OrderSpec(**options)
