"""Numbers that netCDF packs: served as stored, with a note; unpacked by ``apply = "scale"``, as xarray unpacks them."""

from __future__ import annotations

from collections.abc import Iterator

import h5feed
import h5py
import numpy as np
import pytest
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
def feed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
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
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(process.url, deadline=60) as connected:
        yield connected
    assert process.stop() == 0


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
        {"dtype": "float64", "scale_factor": 0.01, "add_offset": 273.15, "missing": [-32767], "unsigned": False}
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
