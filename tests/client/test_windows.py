"""Windows of rows as samples: the rows, the ends of episodes, and which rows splits have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter, UnsupportedField
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess

Arrays = dict[str, npt.NDArray[Any]]

LENGTHS = [9, 14, 1, 12, 17, 3]
"""Of the episodes."""
SERIES_ROWS = 60
IDS = np.repeat([7, 3, 7, 5], [20, 8, 15, 17])
"""Episode 7 comes twice: the two parts are not next to each other, but belong together."""


def _demo(rows: int, number: int) -> Arrays:
    random = np.random.default_rng(number)
    return {
        "actions": random.random((rows, 3)).astype("f4"),
        "dones": (np.arange(rows) == rows - 1).astype("i8"),
        "obs/eef": random.random((rows, 2)),
        "obs/image": random.integers(0, 256, (rows, 40, 40, 3), np.uint8),
        "rewards": random.random(rows),
    }


DEMOS = [_demo(rows, number) for number, rows in enumerate(LENGTHS)]
EVERY = {name.replace("/", "."): np.concatenate([demo[name] for demo in DEMOS]) for name in DEMOS[0]}
SERIES: Arrays = {
    "x": np.random.default_rng(1).random((SERIES_ROWS, 2)).astype("f4"),
    "target": np.arange(SERIES_ROWS, dtype="i4"),
    "trial": IDS,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A file as robomimic writes it, and a time series with the ids of its episodes."""
    folder = tmp_path_factory.mktemp("windows")
    with h5py.File(folder / "robot.h5", "w") as file:
        for number, demo in enumerate(DEMOS):
            for name, values in demo.items():
                file[f"data/demo_{number}/{name}"] = values
            file[f"data/demo_{number}"].attrs["num_samples"] = len(demo["dones"])
        file["mask/train"] = [b"demo_0", b"demo_1", b"demo_3", b"demo_4"]
        file["mask/valid"] = [b"demo_2", b"demo_5"]
    with h5py.File(folder / "series.h5", "w") as file:
        for name, values in SERIES.items():
            file[name] = values
        file.create_dataset("packed", data=SERIES["x"], chunks=(7, 2), compression="gzip")
        file["words"] = [f"row {row}" for row in range(SERIES_ROWS)]
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=60) as connected:
        yield connected


@pytest.fixture
def robot(feed: h5feed.Feed) -> h5feed.Dataset:
    return feed["robot"]


@pytest.fixture
def series(feed: h5feed.Feed) -> h5feed.Dataset:
    return feed["series"]


def robomimic_sequence(
    demo: Arrays, index: int, keys: list[str], frame_stack: int, seq_length: int
) -> tuple[Arrays, npt.NDArray[np.bool_]]:
    """What `SequenceDataset.get_sequence_from_demo` of robomimic returns, with all padding on."""
    length, before = len(demo["dones"]), frame_stack - 1
    begin, end = max(0, index - before), min(length, index + seq_length)
    begin_pad, end_pad = max(0, before - index), max(0, index + seq_length - length)
    found = {
        key: np.concatenate(
            [np.repeat(demo[key][begin : begin + 1], begin_pad, 0), demo[key][begin:end]]
            + [np.repeat(demo[key][end - 1 : end], end_pad, 0)]
        )
        for key in keys
    }
    return found, np.array([False] * begin_pad + [True] * (end - begin) + [False] * end_pad)


def test_sequences_as_robomimic_has_them(robot: h5feed.Dataset) -> None:
    """Frame stacks repeat the first row of an episode, sequences the last, and masks say where: every sample."""
    stack, length, chunk = 2, 10, 16
    options: dict[str, Any] = {
        "fields": ["obs.image", "obs.eef", "actions"],
        "offsets": {
            "obs.image": range(1 - stack, length),
            "obs.eef": range(1 - stack, length),
            "actions": range(1 - stack, chunk),
        },
        "ends": "pad",
    }
    starts, seen = np.cumsum([0, *LENGTHS]), []
    for batch in robot.batches(batch_size=4, shuffle=True, seed=3, **options):
        for place, row in enumerate(batch.rows.tolist()):
            number = int(np.searchsorted(starts, row, side="right")) - 1
            index = row - int(starts[number])
            seen.append(row)
            for keys, size in ((["obs/image", "obs/eef"], length), (["actions"], chunk)):
                expected, mask = robomimic_sequence(DEMOS[number], index, keys, stack, size)
                for key in keys:
                    name = key.replace("/", ".")
                    np.testing.assert_array_equal(batch[name][place], expected[key])
                    np.testing.assert_array_equal(batch[f"{name}.mask"][place], mask)
    assert sorted(seen) == list(range(sum(LENGTHS)))
