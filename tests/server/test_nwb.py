"""NWB files, as pynwb writes them: series and tables have rows of their own; columns with a VectorIndex are lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.served_rows import lines_of
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


def _series(file: h5py.File, path: str, data: Any, kind: str = "TimeSeries", **about: float) -> None:
    """Of a rate if `about` has one, else with the timestamps to add."""
    group = file.create_group(path)
    group.attrs.update(neurodata_type=kind, namespace="core", object_id=path)
    group["data"] = data
    group["data"].attrs.update(conversion=1e-3, resolution=-1.0, unit="volts")
    if "rate" in about:
        group["starting_time"] = about["start"]
        group["starting_time"].attrs.update(rate=np.float32(about["rate"]), unit="seconds")


def _times(file: h5py.File, path: str, values: Any) -> None:
    file[f"{path}/timestamps"] = values
    if isinstance(file.get(f"{path}/timestamps", getlink=True), h5py.HardLink):
        file[f"{path}/timestamps"].attrs.update(interval=np.int32(1), unit="seconds")


ONES = np.arange(50.0)


def _write_clocks(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update(nwb_version="2.8.0", neurodata_type="NWBFile", namespace="core")
        # As many units as trials.
        for table, kind, name in (("units", "Units", "depth"), ("intervals/trials", "TimeIntervals", "start_time")):
            file.create_group(table).attrs.update(neurodata_type=kind, namespace="core", colnames=[name])
            _column(file, f"{table}/id", np.arange(6), "ElementIdentifiers")
            _column(file, f"{table}/{name}", np.arange(6.0) * 3)
        _column(file, "units/electrodes", np.arange(6), "DynamicTableRegion")
        # Pairs of series, of other shapes, as many samples, and the same times or others.
        for pair, (first, second) in {
            "same": ((5.0, 10.0), (5.0, 10.0)),
            "rates": ((5.0, 10.0), (5.0, 20.0)),
            "starts": ((0.0, 10.0), (5.0, 10.0)),
        }.items():
            _series(file, f"processing/{pair}/position", ONES[:, None] + [0, 1], start=first[0], rate=first[1])
            _series(file, f"processing/{pair}/speed", ONES + 100, start=second[0], rate=second[1])
        for pair, one, other in (
            ("soft", ONES, h5py.SoftLink("/processing/soft/position/timestamps")),
            ("equal", ONES * 2, ONES * 2),
            ("later", ONES * 3, ONES * 3 + 1),
            # As floats, they would be equal.
            ("ticks", ONES.astype(np.int64) + (1 << 60), ONES.astype(np.int64) + (1 << 60) + 1),
        ):
            _series(file, f"processing/{pair}/position", ONES[:, None] + [0, 1])
            _series(file, f"processing/{pair}/speed", ONES + 100)
            _times(file, f"processing/{pair}/position", one)
            _times(file, f"processing/{pair}/speed", other)
        _series(file, "processing/untold/position", ONES[:, None] + [0, 1])
        _series(file, "processing/untold/speed", ONES + 100)
        # Of one kind, but of different things.
        _series(file, "acquisition/pupil", ONES, start=0.0, rate=10.0)
        _series(file, "acquisition/wheel", ONES * 2, start=0.0, rate=20.0)
        # Of as many channels as samples.
        _series(file, "stimulus/square", np.zeros((6, 6)), "ElectricalSeries", start=0.0, rate=29.97)
        _column(file, "stimulus/square/electrodes", np.arange(6), "DynamicTableRegion")
        file["stimulus/square/channel_conversion"], file["stimulus/square/control"] = np.ones(6), np.zeros(6, "u1")


def test_rows_of_other_clocks_and_tables_are_not_paired(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Only series with the same times share their rows, however many rows others have."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write_clocks(folder / "s.nwb")
    server = serve(folder)
    with h5feed.connect(server.url, deadline=60) as feed:
        fields = {name: {*feed[name].fields} for name in lines_of(server)}
        together = {name for name, found in fields.items() if {"position.data", "speed.data"} <= found}
        assert together == {f"s.processing.{pair}" for pair in ("same", "soft", "equal")}
        for pair in ("rates", "starts", "later", "ticks", "untold"):
            assert {f"s.processing.{pair}.position", f"s.processing.{pair}.speed"} <= fields.keys()
        assert {"id", "depth", "electrodes"} == fields["s.units"] and {"id", "start_time"} == fields[
            "s.intervals.trials"
        ]
        assert feed["s.acquisition.pupil"].rows == feed["s.acquisition.wheel"].rows == 50
        np.testing.assert_array_equal(feed["s.acquisition.wheel"].take([7, 3], fields=["data"])["data"], [14, 6])
        both = feed["s.processing.same"].take([7, 3], fields=["position.data", "speed.data"])
        np.testing.assert_array_equal(both["position.data"], [[7, 8], [3, 4]])
        np.testing.assert_array_equal(both["speed.data"], [107, 103])
        square = feed["s.stimulus.square"]
        assert "not the samples" in str(square.fields["electrodes"].reason) and square.fields["data"].readable
        assert "its rows are channels" in str(square.fields["channel_conversion"].reason)
        assert square.fields["control"].readable


def test_categories_of_an_aligned_table_share_its_rows(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """By its attribute: other tables below it have rows of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    recordings = "general/intracellular_ephys/intracellular_recordings"
    with h5py.File(folder / "s.nwb", "w") as file:
        file.attrs["nwb_version"] = "2.8.0"
        for table in ("", "/stimuli", "/responses", "/others"):
            file.require_group(recordings + table).attrs["neurodata_type"] = "DynamicTable"
            _column(file, f"{recordings}{table}/id", np.arange(5), "ElementIdentifiers")
            _column(file, f"{recordings}{table}/value", np.arange(5.0) * (len(table) + 1))
        file[recordings].attrs["categories"] = ["stimuli", "responses"]
        file[recordings].attrs["neurodata_type"] = "IntracellularRecordingsTable"
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        joined = feed[f"s.{recordings.replace('/', '.')}"]
        of_categories = [f"{category}.{name}" for category in ("stimuli", "responses") for name in ("id", "value")]
        assert sorted(joined.fields) == sorted(["id", "value", *of_categories])
        batch = joined.take([3], fields=["value", "stimuli.value", "responses.value"])
        assert [values.tolist() for values in batch.values()] == [[3.0], [27.0], [33.0]]
        assert feed[f"{joined.name}.others"].rows == 5


def test_times_of_regular_samples_are_told(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """By a note of the samples. Of joined series, those of the first one, and it says so."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "s.nwb", "w") as file:
        file.attrs["nwb_version"] = "2.8.0"
        for number in range(3):
            _series(file, f"acquisition/sweep_{number}", ONES + number, start=float(number), rate=10.0)
    (folder / "j.nwb").write_bytes((folder / "s.nwb").read_bytes())
    (folder / "h5feed.toml").write_text('[datasets.j]\nfiles = ["j.nwb"]\nepisodes = true\n')
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        told = {field["name"]: field for field in feed["s.acquisition.sweep_1"].info["fields"]}
        assert told["data"]["note"] == "row n is at 1.0 + n / 10.0 seconds, by starting_time and its rate"
        assert told["data"]["attributes"]["unit"] == "volts"
        assert told["starting_time"]["attributes"] == {"rate": 10.0, "unit": "seconds"}
        joined = feed["j"]
        assert joined.rows == 150
        note = next(field["note"] for field in joined.info["fields"] if field["name"] == "data")
        assert note.startswith("in its first piece, row n is at 0.0 + n / 10.0 seconds")
