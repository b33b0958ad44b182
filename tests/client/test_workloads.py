"""``h5feed bench --workload``: data of the sizes of MLPerf Storage, and accelerators that are fed or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.bench.feeding import Feeding, _search, feed_accelerators, feeding_text
from h5feed.bench.workloads import WORKLOADS, Workload
from h5feed.cli import main
from h5feed.errors import BadParameter, FeedError, TooLarge
from h5feed_server.cli import main as server_main
from h5feed_server.settings import Settings
from h5feed_server.workload import write_workload

from tests.support.server_process import ServerProcess

TINY = replace(WORKLOADS["cosmoflow"], sample_bytes=2000.0, spread=500.0, batch_size=4, step=0.4, utilisation=0.02)
"""Any machine feeds it."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    write_workload(TINY, 40, folder / "tiny.h5")
    assert server_main(["workload", "retinanet", "-o", str(folder / "retinanet.h5"), "--samples", "50"]) == 0
    return serve_module(folder)


@pytest.fixture
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=60) as connected:
        yield connected


def _fed(feed: h5feed.Feed, workload: Workload, accelerators: int, name: str = "tiny") -> Feeding:
    return feed_accelerators(
        feed[name],
        workload,
        accelerators,
        split="all",
        options={},
        token=None,
        deadline=60.0,
        seconds=6.0,
        server_memory=None,
        report=lambda phase, done, rate: None,
    )


def test_samples_have_the_sizes_of_the_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean and spread are right for few samples too; bytes do not repeat; each run writes the same."""
    for name in ("one", "two"):
        write_workload(TINY, 200, tmp_path / f"{name}.h5")
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "two.h5") as two:
        sizes = np.diff(one["samples.offsets"][:])
        assert abs(sizes.mean() - 2000) < 1 and abs(sizes.std() - 500) < 10 and sizes.min() > 0
        assert len(one["samples"]) == sizes.sum()
        np.testing.assert_array_equal(one["samples"][:], two["samples"][:])
        assert abs(one["samples"][:].mean() - 127.5) < 1
        assert one.attrs["workload"] == "cosmoflow" and WORKLOADS["cosmoflow"].source in one.attrs["source"]
    assert server_main(["workload", "resnet50", "-o", str(tmp_path / "new" / "r.h5"), "--samples", "400"]) == 0
    with h5py.File(tmp_path / "new" / "r.h5") as file:
        assert file["samples"].shape == (400, 114_660)
    assert "400 samples" in capsys.readouterr().out


def test_data_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few samples for a step, no room, and a file that is there; and what the server needs for the largest row."""
    with pytest.raises(BadParameter, match=r"--samples 3.* takes 4"):
        write_workload(TINY, 3, tmp_path / "a.h5")
    with pytest.raises(TooLarge, match="use fewer --samples"):
        write_workload(WORKLOADS["unet3d"], 10_000_000, tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Settings.model_fields["max_body_bytes"], "default", 2 << 20)
    assert "H5FEED" not in write_workload(TINY, 8, tmp_path / "small.h5")
    said = write_workload(replace(TINY, sample_bytes=1e6, spread=1e5), 8, tmp_path / "a.h5")
    assert "serve with H5FEED_MAX_BODY_BYTES=" in said
    with pytest.raises(BadParameter, match="exists"):
        write_workload(TINY, 8, tmp_path / "a.h5")


def test_the_values_of_mlperf() -> None:
    """What one accelerator reads per second, from the values of the configurations that are named."""
    rates = {name: round(workload.bytes_per_second / 1e6) for name, workload in WORKLOADS.items()}
    assert rates == {"retinanet": 163, "unet3d": 6335, "resnet50": 205, "cosmoflow": 808}
    for workload in WORKLOADS.values():
        path, commit = workload.source.split(" at ")
        assert path.startswith(f"configs/dlio/workload/{workload.name}_{workload.accelerator.lower()}")
        assert len(commit) == 40


def test_accelerators_that_are_fed(feed: h5feed.Feed) -> None:
    """All pass, up to the number for which there are samples; the run is labelled as one from the page cache."""
    found = _fed(feed, TINY, 4)
    assert [trial.accelerators for trial in found.trials] == [4, 8, 10]
    assert found.fed == 10 and all(trial.steps > 0 for trial in found.trials)
    for trial in found.trials:
        assert trial.samples_per_second == pytest.approx(trial.accelerators * 4 / 0.4 * trial.utilisation, rel=0.25)
    text = feeding_text(found, 100)
    assert "PASS: 4 accelerators" in text and "at least 10: the dataset has no samples for more" in text
    assert found.is_cached is True and "FROM THE PAGE CACHE" in text and "not a verified MLPerf result" in text


def test_accelerators_that_are_not_fed(feed: h5feed.Feed) -> None:
    """A step in a microsecond, which no server is fast enough for: fewer are tried, and none passes."""
    found = _fed(feed, replace(TINY, step=1e-6), 4)
    assert [trial.accelerators for trial in found.trials] == [4, 2, 1]
    assert found.fed == 0 and not found.passed(found.trials[0])
    text = feeding_text(found, 100)
    assert "FAIL: 4 accelerators" in text and "This server feeds none" in text and "and one needs 8.0 GB/s" in text


@pytest.mark.parametrize(("can", "most"), [(0, 9), (1, 9), (3, 9), (4, 9), (5, 9), (8, 9), (9, 9), (1, 1), (0, 1)])
@pytest.mark.parametrize("first", [1, 4, 9])
def test_the_number_that_is_fed_is_found(can: int, most: int, first: int) -> None:
    """With few trials, none of them twice."""
    tried: list[int] = []

    def attempt(count: int) -> bool:
        tried.append(count)
        return count <= can

    _search(attempt, min(first, most), most)
    assert len(tried) == len(set(tried)) <= 6 and set(tried) <= set(range(1, most + 1))
    assert max((count for count in tried if count <= can), default=0) == can
    assert can == most or min(count for count in tried if count > can) == can + 1


def test_what_is_refused(feed: h5feed.Feed, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Other data, too many accelerators, a process that fails, and options that would have no effect."""
    with pytest.raises(BadParameter, match=r"2\.0 kB on average, the samples of retinanet .*h5feed-server workload"):
        _fed(feed, WORKLOADS["retinanet"], 1)
    with pytest.raises(BadParameter, match=r"accelerators=11 need 44 samples.* has 40"):
        _fed(feed, TINY, 11)
    with pytest.raises(BadParameter, match="accelerators=0"):
        _fed(feed, TINY, 0)
    with pytest.raises(FeedError, match="nothing"):
        feed_accelerators(
            feed["tiny"],
            TINY,
            1,
            split="all",
            options={"fields": ["samples"], "where": "nothing > 3"},
            token=None,
            deadline=60.0,
            seconds=6.0,
            server_memory=None,
            report=lambda phase, done, rate: None,
        )
    for options, said in (
        (["--workload", "retinanet", "--batch-size", "8"], "--batch-size cannot be used with --workload retinanet"),
        (["--workload", "retinanet", "--step-ms", "8"], "--step-ms cannot be used"),
        (["--accelerators", "2"], "--accelerators needs --workload"),
        (["--server-memory", "2GB"], "--server-memory needs --workload"),
    ):
        assert main(["bench", server.url, "retinanet", *options]) == 1
        assert said in capsys.readouterr().err


def test_the_command(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the verdict, and returns 0 or 1; the server's memory decides what is called cached."""
    command = ["bench", server.url, "retinanet", "--workload", "retinanet", "--seconds", "4", "--json"]
    code = main([*command, "--server-memory", "1MB"])
    told = json.loads(capsys.readouterr().out)
    assert (code == 0) == told["passed"] == (told["trials"][0]["utilisation"] >= 0.85)
    assert told["trials"][0]["accelerators"] == 1 and told["trials"][0]["steps"] > 0
    assert told["sample_bytes"] == pytest.approx(322_957, rel=1e-3) and told["from_page_cache"] is False
    assert told["workload"]["source"] == WORKLOADS["retinanet"].source


def test_a_server_whose_memory_is_not_known(serve: Callable[..., ServerProcess], feed: h5feed.Feed) -> None:
    """Then nothing is claimed."""
    found = Feeding(TINY, "http://gpu-box:8000", "tiny", 40, 2000.0, None)
    found.trials = _fed(feed, TINY, 10).trials
    text = feeding_text(found, 100)
    assert "not known whether" in text and "--server-memory" in text
