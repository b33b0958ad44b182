"""Datasets whose rows are along another axis than the first: slices of volumes, one file each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5feed.wire
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.stored import crop_reader
from h5feed_server.builder import BuildOptions, build
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.order_spec import OrderSpec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATASETS, FILES = 16, 3
FILTERS: list[dict[str, Any]] = [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}]

Truth = dict[str, npt.NDArray[Any]]


def _write(folder: Path) -> Truth:
    """Volumes of different numbers of slices, of random shapes and layouts; returns all slices of each dataset."""
    random, lines, truth = np.random.default_rng(1), [], {}
    for number in range(DATASETS):
        axes = int(random.integers(2, 5))
        axis = int(random.integers(0, axes))
        sides = [int(side) for side in random.integers(1, 12, axes - 1)]
        dtype = np.dtype(str(random.choice(["|u1", "<i2", ">f4", "<f8", "<c8", "|b1"])))
        slices = []
        for file_number in range(FILES):
            shape = [*sides]
            shape.insert(axis, int(random.integers(1, 9)))
            values = random.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
            options: dict[str, Any] = {}
            if random.random() < 0.7:
                options = {"chunks": tuple(int(random.integers(1, extent + 1)) for extent in shape)}
                options |= FILTERS[random.integers(len(FILTERS))]
            with h5py.File(folder / f"d{number}_{file_number}.h5", "w") as file:
                file.create_dataset("volume", data=values, **options)
                file["label"] = np.arange(shape[axis]) % 2
            turned = np.moveaxis(values, axis, 0)
            slices.append(np.stack([turned.real, turned.imag], -1) if dtype.kind == "c" else turned)
        truth[f"d{number}"] = np.concatenate(slices)
        lines.append(f'[datasets.d{number}]\nfiles = ["d{number}_*.h5"]\nrows_along = {axis}\n')
    (folder / "h5feed.toml").write_text("\n".join(lines))
    return truth


@pytest.fixture(scope="module", params=["cached", "uncached"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Services, Truth]]:
    """Fields are in memory as a whole, or read from the files for each batch."""
    folder = tmp_path_factory.mktemp("data")
    truth = _write(folder)
    caches: dict[str, Any] = {} if request.param == "cached" else {"cache_bytes": 0, "chunk_cache_bytes": 0}
    services = Services.start(Settings(data_dir=folder, cache_dir=tmp_path_factory.mktemp("cache"), **caches))
    try:
        for name in truth:
            services.catalog.dataset_within(60, name)
        yield services, truth
    finally:
        services.close()


def _lease(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "slices"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_are_rows(
    served: tuple[Services, Truth], is_whole: bool, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Of all files, types and layouts along any axis: shuffled, in windows, as crops, and all of them in order."""
    if not is_whole:
        monkeypatch.setattr(crop_reader, "MAX_WHOLE_BYTES", 0)
    services, truth = served
    name = data.draw(st.sampled_from(sorted(truth)))
    expected = truth[name]
    dataset = services.catalog.dataset(name)
    assert dataset.rows == len(expected)
    np.testing.assert_array_equal(services.batcher.reader.read_all(dataset.field("volume").column), expected)
    crop = None
    if (axes := dataset.field("volume").row_shape.axes) and data.draw(st.booleans()):
        crop = tuple(data.draw(st.integers(1, extent)) for extent in expected.shape[1 : 1 + axes])
    options: dict[str, Any] = {} if crop is None else {"crop": "x".join(map(str, crop)), "crop_fields": "volume"}
    spec = OrderSpec(shuffle=True, seed=data.draw(st.integers(0, 5)), fields="volume,label", **options)
    plan = services.batcher.plan(name, spec, data.draw(st.integers(1, 9)), None)
    seen = []
    for index in range(plan.grid.batches):
        tensors, _, _ = h5feed.wire.read_body(plan.filled(index, index + 1, _lease))
        rows = tensors["__rows__"].tolist()
        seen += rows
        for place, row in enumerate(rows):
            part = expected[row]
            if crop is not None:
                starts = tensors["__crop__"][place]
                part = part[tuple(slice(a, a + length) for a, length in zip(starts, crop, strict=True))]
            np.testing.assert_array_equal(tensors["volume"][place], part)
    assert sorted(seen) == list(range(len(expected)))


def test_only_touched_chunks_are_read(tmp_path: Path) -> None:
    """A slice across a chunked volume takes one layer of its chunks, once for all slices in it."""
    values = np.random.default_rng(0).integers(0, 100, (40, 50, 60), np.int16)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("volume", data=values, chunks=(20, 25, 6), compression="gzip")
    (tmp_path / "h5feed.toml").write_text('[datasets.scan]\nfiles = ["scan.h5"]\nrows_along = 2\n')
    services = Services.start(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache", cache_bytes=0))
    try:
        dataset = services.catalog.dataset_within(60, "scan")
        reader, column = services.batcher.reader, dataset.field("volume").column
        rows = np.array([13, 55, 12, 13], np.int64)
        out = np.empty((4, 40, 50), np.int16)
        before = reader.decoded_chunks
        reader.read(column, rows, out)
        np.testing.assert_array_equal(out, np.moveaxis(values, 2, 0)[rows])
        assert reader.decoded_chunks - before == 2 * 4
        assert dataset.field("volume").block_rows == 6
    finally:
        services.close()


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Feed, Path]]:
    folder = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(2)
    lengths = {"anna": 7, "bert": 12, "carl": 5, "dora": 9, "emil": 3}
    for name, length in lengths.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["volume"] = random.normal(size=(16, 12, length)).astype(np.float32)
            file["mask"] = random.integers(0, 2, (16, 12, length), np.uint8)
            file["tumour"] = np.arange(length) % 2
    (folder / "h5feed.toml").write_text(
        '[datasets.slices]\nfiles = ["*.h5"]\nrows_along = 2\n[datasets.broken]\nfiles = ["*.h5"]\nrows_along = 3\n'
        '[datasets.both]\nfiles = ["*.h5"]\nrows_along = 2\nstack = true\n'
        '[datasets.first]\nfiles = ["anna.h5"]\nrows_along = 0\nfields = { volume = "volume" }\n'
    )
    with h5feed.connect(str(folder)) as connected:
        yield connected, folder


def test_volumes_stay_together(feed: tuple[h5feed.Feed, Path]) -> None:
    """The file of each slice is a field, by which splits keep volumes together; statistics are those of the slices."""
    slices = feed[0]["slices"]
    assert slices.rows == 36 and slices.shape["volume"] == (36, 16, 12)
    split: dict[str, Any] = {"test": 0.4, "group": "file"}
    of_files = {}
    for name in ("train", "test"):
        of_files[name] = {
            text
            for batch in slices.batches(name, fields=["file"], batch_size=8, **split)
            for text in batch.text("file")
        }
    assert not of_files["train"] & of_files["test"]
    assert len(of_files["train"]) == 3 and len(of_files["test"]) == 2
    volumes = []
    for path in sorted(feed[1].glob("*.h5")):
        with h5py.File(path) as file:
            volumes.append(np.moveaxis(file["volume"][:], 2, 0))
    whole = np.concatenate(volumes)
    np.testing.assert_array_equal(slices[:]["volume"], whole)
    stats = slices.stats(field="volume")
    assert stats["count"] == whole.size
    assert stats["mean"] == pytest.approx(whole.mean(dtype=np.float64), rel=1e-9)
    loader = slices.loader(x="volume", y="mask", crop=(8, 8), shuffle=True, batch_size=6)
    x, y = next(iter(loader))
    assert x.shape == y.shape == (6, 8, 8)


def test_rows_along_the_first_axis(feed: tuple[h5feed.Feed, Path]) -> None:
    """Declared, they have the name of their file, too."""
    first = feed[0]["first"]
    assert first.rows == 16 and set(first[[0]]) >= {"volume"}
    assert "file" in first.fields


@pytest.mark.parametrize(("name", "says"), [("broken", "no array has an axis"), ("both", "stack = true")])
def test_declarations_that_cannot_be_followed(feed: tuple[h5feed.Feed, Path], name: str, says: str) -> None:
    with pytest.raises(h5feed.errors.FeedError, match=says):
        feed[0][name]


def test_a_build_writes_slices_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of arrays that are not served because their slices are scattered."""
    values = np.random.default_rng(3).integers(0, 100, (200, 90, 40), np.int16)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["volume"] = values
        file["label"] = np.arange(40) % 2
    (tmp_path / "h5feed.toml").write_text('[datasets.scan]\nfiles = ["scan.h5"]\nrows_along = 2\n')
    for limit in (crop_reader.MAX_WHOLE_BYTES, 0):
        monkeypatch.setattr("h5feed_server.catalog.grouping.assembly.MAX_WHOLE_BYTES", limit)
        report = build(tmp_path / "scan.h5", tmp_path / f"out{limit}.h5", BuildOptions())
        assert not report.left_out
        with h5py.File(tmp_path / f"out{limit}.h5") as file:
            np.testing.assert_array_equal(file["volume"][:], np.moveaxis(values, 2, 0))
