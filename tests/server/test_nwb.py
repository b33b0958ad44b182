"""NWB files, as pynwb writes them: columns of tables with a VectorIndex are lists."""

from __future__ import annotations

from collections.abc import Callable

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

random = np.random.default_rng(0)
SPIKES = [random.random(count) for count in (0, 3, 1, 4, 0, 2)]
ENDS = np.cumsum([len(spikes) for spikes in SPIKES]).astype("u1")
VOLTAGES = random.normal(size=(200, 4))


def _column(file: h5py.File, path: str, values: object, kind: str = "VectorData") -> None:
    file[path] = values
    file[path].attrs.update(neurodata_type=kind, namespace="hdmf-common")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("nwb") / "data"
    folder.mkdir()
    with h5py.File(folder / "session.nwb", "w") as file:
        file.attrs["nwb_version"] = "2.8.0"
        _column(file, "units/id", np.arange(6), "ElementIdentifiers")
        _column(file, "units/depth", random.random(6))
        _column(file, "units/spike_times", np.concatenate(SPIKES))
        _column(file, "units/spike_times_index", ENDS, "VectorIndex")
        _column(file, "units/broken", random.random(9))
        _column(file, "units/broken_index", ENDS, "VectorIndex")
        _column(file, "units/waveforms", random.random(10))
        _column(file, "units/waveforms_index", np.array([1, 3, 4, 8, 9, 10], "u1"), "VectorIndex")
        _column(file, "units/waveforms_index_index", np.arange(1, 7, dtype="u1"), "VectorIndex")
        file["acquisition/lfp/data"] = VOLTAGES
        file["acquisition/lfp/timestamps"] = np.arange(200) / 100
    return serve_module(folder)


def test_indexed_columns_are_lists(feed: h5feed.Feed) -> None:
    """Rows in any order, also empty ones; what does not fit is listed with the reason."""
    units, rows = feed["session.units"], [3, 0, 5, 1, 4, 2]
    assert units.rows == len(SPIKES)
    for row, found in zip(rows, units.take(rows, fields=["spike_times"]).lists("spike_times"), strict=True):
        np.testing.assert_array_equal(found, SPIKES[row])
    reasons = {field["name"]: field["reason"] for field in units.info["fields"] if not field["readable"]}
    assert "does not ascend to 9" in reasons["broken"] and reasons["waveforms"] == "its rows are lists of lists"


def test_rows_of_series_are_samples(feed: h5feed.Feed) -> None:
    series = feed["session.acquisition.lfp"]
    np.testing.assert_array_equal(series.take(range(200), fields=["data"])["data"], VOLTAGES)
    assert {field["name"]: field["role"] for field in series.info["fields"]} == {"data": "input", "timestamps": "other"}
