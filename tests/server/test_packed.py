"""Numbers that netCDF packs: served as stored, with a note; unpacked by ``apply = "scale"``, as xarray unpacks them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import netCDF4
import numpy as np
import pytest
import xarray
from h5feed.errors import BadParameter

from tests.support.server_process import ServerProcess

ROWS = 40
STORED = np.random.default_rng(0).integers(-30000, 30000, (ROWS, 5)).astype("<i2")
STORED[::7] = -32767

# Name: stored, attributes, what xarray makes of it.
PACKED: dict[str, tuple[np.ndarray, dict[str, np.generic], np.ndarray]] = {
    "double": (
        STORED,
        {"scale_factor": np.float64(0.01), "add_offset": np.float64(273.15), "_FillValue": np.int16(-32767)},
        np.where(STORED == -32767, np.nan, STORED.astype("f8") * 0.01 + 273.15),
    ),
    "single": (
        STORED.astype(">i2"),
        {"scale_factor": np.float32(0.01), "add_offset": np.float32(273.15), "missing_value": np.int16(-32767)},
        np.where(STORED == -32767, np.float32("nan"), STORED.astype("f4") * np.float32(0.01) + np.float32(273.15)),
    ),
    "wide": (
        STORED.astype("<i4"),
        {"scale_factor": np.float32(0.5), "add_offset": np.float32(1)},
        STORED.astype("f8") * 0.5 + 1,
    ),
    "offset": (STORED, {"add_offset": np.float32(1)}, STORED.astype("f8") + 1),
    "scale": (STORED, {"scale_factor": np.float32(0.5)}, STORED.astype("f4") * np.float32(0.5)),
    "missing": (STORED, {"_FillValue": np.int16(-32767)}, np.where(STORED == -32767, np.nan, STORED).astype("f4")),
    "floats": (
        STORED.astype("<f4"),
        {"_FillValue": np.float32(-32767)},
        np.where(STORED == -32767, np.nan, STORED).astype("f4"),
    ),
    "unsigned": (
        STORED.astype("i1"),
        {"scale_factor": np.float32(0.5), "_Unsigned": np.bytes_("true"), "_FillValue": np.int8(-1)},
        np.where(
            STORED.astype("i1").view("u1") == 255, np.nan, STORED.astype("i1").view("u1").astype("f4") * np.float32(0.5)
        ).astype("f4"),
    ),
}

PLAIN = {"nan": {"_FillValue": np.float32("nan")}, "units": {"units": np.bytes_("K")}}
"""Attributes that say nothing of packing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("packed") / "data"
    folder.mkdir()
    for name in ("stored", "unpacked"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for field, (values, attributes, _) in PACKED.items():
                chunks = (7, 5) if field == "double" else None
                dataset = file.create_dataset(field, data=values, chunks=chunks, compression=chunks and "gzip")
                dataset.attrs.update(attributes)
            for field, plain in PLAIN.items():
                file.create_dataset(field, data=STORED.astype("<f4")).attrs.update(plain)
    (folder / "h5feed.toml").write_text('[datasets.unpacked]\nfiles = ["unpacked.h5"]\napply = "scale"\n')
    return serve_module(folder)


def test_as_stored_with_a_note(feed: h5feed.Feed) -> None:
    """Without a word in h5feed.toml numbers are those of the file; a note says how they are packed."""
    dataset = feed["stored"]
    notes = {field["name"]: str(field.get("note")) for field in dataset.info["fields"]}
    for name, (values, _, _) in PACKED.items():
        np.testing.assert_array_equal(dataset.take(range(ROWS), fields=[name])[name], values)
        assert 'apply = "scale"' in notes[name]
    assert "times 0.01, plus 273.15, -32767 means missing" in notes["double"]
    assert all("scale" not in notes[name] for name in PLAIN)


@pytest.mark.parametrize("name", PACKED)
def test_unpacked(feed: h5feed.Feed, name: str) -> None:
    """Values, and the float that they are, are xarray's, shuffled too; statistics are those of what is served."""
    dataset, expected = feed["unpacked"], PACKED[name][2]
    rows = np.random.default_rng(1).permutation(ROWS)
    found = dataset.take(rows, fields=[name])[name]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected[rows])
    stats = dataset.stats(field=name)
    assert stats["nan"] == np.isnan(expected).sum()
    assert stats["min"] == pytest.approx(np.nanmin(expected)) and stats["mean"] == pytest.approx(np.nanmean(expected))


def test_unpacked_by_the_client(feed: h5feed.Feed) -> None:
    """With decode_cf, batches and loops have what xarray makes of the numbers; the server's statistics do not fit."""
    dataset, names = feed["stored"], list(PACKED)
    packed = {field["name"]: field["cf"] for field in dataset.info["fields"]}
    assert packed["double"] == [
        {
            "dtype": "float64",
            "scale_factor": 0.01,
            "add_offset": 273.15,
            "missing": [-32767],
            "unsigned": False,
            "problem": None,
        }
    ]
    assert packed["units"] is None and all(field["cf"] is None for field in feed["unpacked"].info["fields"])
    for batch in dataset.batches("all", batch_size=16, shuffle=True, fields=[*names, "units"], decode_cf=True):
        for name, (_, _, unpacked) in PACKED.items():
            assert batch[name].dtype == unpacked.dtype, name
            np.testing.assert_array_equal(batch[name], unpacked[batch.rows], name)
        np.testing.assert_array_equal(batch["units"], STORED[batch.rows].astype("<f4"))
    for x, y in dataset.loader(batch_size=ROWS, x="double", y="single", decode_cf=True):
        np.testing.assert_array_equal(x, PACKED["double"][2])
        np.testing.assert_array_equal(y, PACKED["single"][2])
    alone = dataset.batch(0, batch_size=ROWS, fields=["double"], decode_cf=True)
    np.testing.assert_array_equal(alone["double"], PACKED["double"][2])
    with pytest.raises(BadParameter, match="statistics of the stored numbers"):
        dataset.loader(x="double", y=[], mean="server", decode_cf=True)


# How netCDF4 writes them, and what is unclear about others: name, dtype, attributes.
VARIABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "temperature": ("i2", {"scale_factor": 0.01, "add_offset": 273.15, "_FillValue": np.int16(-32767)}),
    "of_one": ("i2", {"scale_factor": np.array([0.5]), "add_offset": np.array([1.0])}),
    "byte": ("i1", {"_Unsigned": "true", "scale_factor": np.float32(0.5), "_FillValue": np.int8(-1)}),
    "only_unsigned": ("i2", {"_Unsigned": "true"}),
    "not_unsigned": ("i2", {"_Unsigned": "false", "scale_factor": 2.0}),
    "missing": ("i4", {"missing_value": np.array([3, 5], "i4")}),
    "beyond": ("i2", {"missing_value": np.int32(65536 + 3)}),
    "fraction": ("i2", {"missing_value": 3.5}),
    "nan_of_integers": ("i2", {"missing_value": np.nan, "scale_factor": 0.5}),
    "nan": ("f4", {"_FillValue": np.float32("nan"), "add_offset": np.float32(1)}),
    "range": ("i2", {"valid_range": np.array([-100, 100], "i2"), "scale_factor": 0.1}),
    "plain": ("f4", {"units": "K"}),
}
UNCLEAR: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"scale_factor": "0.01"}, "scale_factor is not a number, but '0.01'"),
    "of_two": ({"add_offset": np.array([1.0, 2.0])}, "add_offset has 2 values instead of one"),
    "not_finite": ({"scale_factor": np.nan}, "scale_factor is nan"),
    "word": ({"missing_value": "none", "scale_factor": 0.5}, "missing_value is not a number, but 'none'"),
    "many": ({"missing_value": np.arange(17, dtype="i2")}, "missing_value has 17 values, more than 16"),
    "maybe": ({"_Unsigned": "maybe", "scale_factor": 0.5}, "_Unsigned is neither 'true' nor 'false'"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Feed, Path]]:
    """A file of the netCDF library."""
    folder = tmp_path_factory.mktemp("written") / "data"
    folder.mkdir()
    random = np.random.default_rng(3)
    with netCDF4.Dataset(folder / "weather.nc", "w") as file:
        file.createDimension("time", None)
        file.createDimension("x", 4)
        every = {name: (dtype, attributes) for name, (dtype, attributes) in VARIABLES.items()}
        every |= {name: ("i2", attributes) for name, (attributes, _) in UNCLEAR.items()}
        for name, (dtype, attributes) in every.items():
            rest = dict(attributes)
            variable = file.createVariable(name, dtype, ("time", "x"), fill_value=rest.pop("_FillValue", None))
            variable.set_auto_maskandscale(False)
            variable.setncatts(rest)
            low, high = (-128, 127) if dtype == "i1" else (-300, 300)
            variable[:] = random.integers(low, high, (ROWS, 4)).astype(dtype)
            variable[::5, 0] = attributes.get("_FillValue", 3)
    shutil.copy(folder / "weather.nc", folder / "unpacked.nc")
    (folder / "h5feed.toml").write_text('[datasets.unpacked]\nfiles = ["unpacked.nc"]\napply = "scale"\n')
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(process.url, deadline=60) as connected:
        yield connected, folder / "weather.nc"
    assert process.stop() == 0


@pytest.mark.parametrize("name", VARIABLES)
def test_as_xarray_unpacks(written: tuple[h5feed.Feed, Path], name: str) -> None:
    """Values and dtypes are xarray's, whoever unpacks; and those of netCDF4, except for its range of valid numbers."""
    feed, path = written
    with xarray.open_dataset(path, engine="netcdf4", drop_variables=list(UNCLEAR)) as opened:
        expected = opened[name].values
    options: dict[str, Any] = {"batch_size": ROWS, "fields": [name]}
    if name == "plain":
        with pytest.raises(BadParameter, match="none of the fields \\['plain'\\] of 'weather' has attributes"):
            feed["weather"].batch(0, decode_cf=True, **options)
        with pytest.raises(BadParameter, match="none of the fields"):
            next(iter(feed["weather"].loader(x=name, y=[], batch_size=4, decode_cf=True)))
        return
    here = feed["weather"].batch(0, decode_cf=True, **options)[name]
    there = feed["unpacked"].batch(0, **options)[name]
    for found in (here, there):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    with netCDF4.Dataset(path) as file:
        masked = file[name][:]
    kept = ~np.ma.getmaskarray(masked)
    np.testing.assert_allclose(here[kept], masked[kept], rtol=1e-6)
    if name == "range":
        note = next(field["note"] for field in feed["weather"].info["fields"] if field["name"] == name)
        assert not np.isnan(here).any() and not kept.all() and "valid_range: numbers outside" in note


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_attributes_do_not_tell(written: tuple[h5feed.Feed, Path], name: str) -> None:
    """Fields with meaningless attributes are served as stored, and not taken for unpacked ones."""
    feed, path = written
    reason = UNCLEAR[name][1]
    fields = {field["name"]: field for field in feed["weather"].info["fields"]}
    assert reason in fields[name]["note"] and reason in fields[name]["cf"][0]["problem"]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(feed["weather"].take(range(ROWS), fields=[name])[name], file[name])
    with pytest.raises(BadParameter, match=reason):
        feed["weather"].batch(0, batch_size=4, fields=[name, "temperature"], decode_cf=True)
    with pytest.raises(h5feed.UnsupportedField, match=reason):
        feed["unpacked"].take([0], fields=[name])


def test_unpacked_in_mixtures(written: tuple[h5feed.Feed, Path]) -> None:
    """One source with packed numbers is enough, but one it must be."""
    feed, path = written
    mixture = h5feed.mix([(feed["weather"], 1), (feed["unpacked"], 1)])
    with pytest.raises(BadParameter, match="none of the fields"):
        next(iter(mixture.batches(batch_size=4, fields=["plain"], decode_cf=True)))
    with xarray.open_dataset(path, engine="netcdf4", drop_variables=list(UNCLEAR)) as opened:
        expected = opened["temperature"].values
    packed = h5feed.mix({"weather": feed["weather"], "again": feed["weather"]})
    for batch in packed.batches(batch_size=8, fields=["temperature"], decode_cf=True):
        assert np.isin(batch["temperature"][~np.isnan(batch["temperature"])], expected).all()
