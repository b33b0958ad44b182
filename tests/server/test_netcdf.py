"""Dimensions of netCDF files: rows are time steps, along whichever axis these are. Values are held against xarray's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5feed
import netCDF4
import numpy as np
import pytest
import xarray

from tests.support.server_process import ServerProcess

TIMES, LATITUDES, LONGITUDES = 12, 5, 4


def _write(path: Path, order: tuple[str, ...], *, unlimited: bool, chunks: bool, latitudes: int = LATITUDES) -> None:
    random = np.random.default_rng(len(path.name))
    sizes = {"time": TIMES, "lat": latitudes, "lon": LONGITUDES}
    with netCDF4.Dataset(path, "w") as file:
        for name, size in sizes.items():
            file.createDimension(name, None if unlimited and name == "time" else size)
            file.createVariable(name, "f8", (name,))[:] = np.arange(size)
        file["time"].units = "hours since 1900-01-01"
        for name in ("t2m", "wind"):
            shape = tuple(sizes[axis] for axis in order)
            chunk = tuple(1 if axis == "time" else sizes[axis] for axis in order) if chunks else None
            packed = file.createVariable(name, "f4", order, chunksizes=chunk, zlib=chunks)
            packed[:] = random.normal(size=shape)
        count = file.createVariable("station", "i4", ("time",))
        count[:] = np.arange(TIMES) % 3
        file.createVariable("mask", "i1", ("lat", "lon"))[:] = random.integers(0, 2, (latitudes, LONGITUDES))


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Feed, Path]]:
    folder = tmp_path_factory.mktemp("netcdf") / "data"
    folder.mkdir()
    _write(folder / "first.nc", ("time", "lat", "lon"), unlimited=True, chunks=False)
    _write(folder / "last.nc", ("lat", "lon", "time"), unlimited=True, chunks=True)
    _write(folder / "middle.nc", ("lat", "time", "lon"), unlimited=False, chunks=False)
    # By chance, as many latitudes as times.
    _write(folder / "square.nc", ("lat", "lon", "time"), unlimited=False, chunks=True, latitudes=TIMES)
    with netCDF4.Dataset(folder / "profiles.nc", "w") as file:
        # Neither unlimited nor time.
        file.createDimension("depth", 6)
        file.createDimension("place", 9)
        file.createVariable("salt", "f4", ("place", "depth"))[:] = np.arange(54).reshape(9, 6)
        file.createVariable("depth", "f4", ("depth",))[:] = np.arange(6)
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(process.url, deadline=60) as connected:
        yield connected, folder
    assert process.stop() == 0


@pytest.mark.parametrize("name", ["first", "last", "middle", "square"])
def test_rows_are_times(feed: tuple[h5feed.Feed, Path], name: str) -> None:
    """Rows in any order are xarray's along time; what has no time is listed, and a dataset of its own."""
    connected, folder = feed
    dataset = connected[name]
    fields = {field["name"]: field for field in dataset.info["fields"]}
    rows = np.random.default_rng(2).permutation(TIMES)
    assert dataset.rows == TIMES
    with xarray.open_dataset(folder / f"{name}.nc", decode_times=False) as opened:
        for field in ("t2m", "wind", "station", "time"):
            expected = opened[field].transpose("time", ...).values
            np.testing.assert_array_equal(dataset.take(rows, fields=[field])[field], expected[rows])
        np.testing.assert_array_equal(
            connected[f"{name}.{'mask' if name == 'square' else 'lat'}"].take(range(3), fields=["mask"])["mask"],
            opened["mask"][:3],
        )
    axis = {"first": None, "middle": 1}.get(name, 2)
    assert fields["time"]["role"] == "other" and fields["t2m"]["role"] == "input"
    assert fields["t2m"]["note"] == (None if axis is None else f"its rows are along axis {axis}, 'time'")
    assert not fields["mask"]["readable"] and "dataset of its own" in fields["mask"]["reason"]
    assert not fields["lon"]["readable"] and "not that of the rows" in fields["lon"]["reason"]
    if name == "square":
        assert "it does not have the dimension of the rows, 'time'" in fields["mask"]["reason"]
        assert "not that of the rows" in fields["lat"]["reason"]
    if name == "last":
        batches = [x for x, _ in dataset.loader(x="t2m", y="station", batch_size=5, shuffle=True, seed=3)]
        assert sum(map(len, batches)) == TIMES and batches[0].shape == (5, LATITUDES, LONGITUDES)


def test_rows_are_along_the_first_axis_of_others(feed: tuple[h5feed.Feed, Path]) -> None:
    """Without time and without an unlimited dimension, rows are along the first axis."""
    dataset = feed[0]["profiles"]
    assert dataset.rows == 9
    np.testing.assert_array_equal(
        dataset.take(range(9), fields=["salt"])["salt"], np.arange(54, dtype="f4").reshape(9, 6)
    )
