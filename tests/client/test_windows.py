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


class Reference:
    """Windows by plain loops over lists."""

    def __init__(self, split: list[int], episodes: list[int], options: dict[str, Any]) -> None:
        self._options = options
        self._runs: list[list[int]] = []
        for row in split:
            if self._runs and self._runs[-1][-1] == row - 1 and episodes[row - 1] == episodes[row]:
                self._runs[-1].append(row)
            else:
                self._runs.append([row])
        self.run_of = {row: run for run in self._runs for row in run}

    def offsets(self, field: str) -> int | list[int]:
        own = self._options.get("offsets", {}).get(field)
        if own is not None:
            return own if isinstance(own, int) else list(own)
        length, rate = self._options.get("sequence_length"), self._options.get("sampling_rate", 1)
        return 0 if length is None else [rate * step for step in range(length)]

    def samples(self) -> list[int]:
        every = [0]
        for name in (None, *self._options.get("offsets", {})):
            own = self.offsets(name)
            every += [own] if isinstance(own, int) else own
        found = []
        for run in self._runs:
            anchors = run
            if self._options.get("ends") != "pad":
                anchors = [row for row in run if all(row + offset in run for offset in every)]
            found += anchors[:: self._options.get("sequence_stride", 1)]
        return found

    def rows(self, sample: int, field: str) -> tuple[Any, Any]:
        """Row ids of a field of a sample, and which of them are real."""
        run, own = self.run_of[sample], self.offsets(field)
        wanted = [sample + offset for offset in ([own] if isinstance(own, int) else own)]
        rows, real = [min(max(row, run[0]), run[-1]) for row in wanted], [row in run for row in wanted]
        return (rows[0], real[0]) if isinstance(own, int) else (rows, real)


_OFFSETS = st.one_of(
    st.integers(-4, 5),
    st.lists(st.integers(-3, 4), min_size=1, max_size=4),
    st.builds(range, st.integers(-3, 0), st.integers(1, 5), st.integers(1, 2)),
)
FIELDS = ["x", "packed", "target"]


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """Options of orders whose samples are windows."""
    options: dict[str, Any] = {"fields": FIELDS}
    has_length = draw(st.booleans())
    if has_length:
        options |= {"sequence_length": draw(st.integers(1, 4)), "sampling_rate": draw(st.integers(1, 2))}
    if draw(st.booleans()) or not has_length:
        options["offsets"] = draw(st.dictionaries(st.sampled_from(FIELDS), _OFFSETS, min_size=1))
    options |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "sequence_stride": st.integers(1, 4),
                "ends": st.sampled_from(["drop", "pad"]),
                "episode": st.sampled_from(["trial", "none"]),
                "shuffle": st.just(True),
                "seed": st.integers(0, 3),
                "epoch": st.integers(0, 3),
                "where": st.sampled_from(["target >= 11", "target < 40"]),
                "limit": st.integers(1, 9),
            },
        )
    )
    return options


def _expected(batch: h5feed.Batch, reference: Reference) -> None:
    for field in FIELDS:
        found = [reference.rows(row, field) for row in batch.rows.tolist()]
        source = SERIES["x" if field == "packed" else field]
        np.testing.assert_array_equal(batch[field], source[np.array([rows for rows, _ in found])])
        if f"{field}.mask" in batch:
            np.testing.assert_array_equal(batch[f"{field}.mask"], [real for _, real in found])
        else:
            assert all(np.all(real) for _, real in found)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(options=orders(), batch_size=st.integers(1, 9), shards=st.integers(1, 3), split=st.sampled_from(["all", "val"]))
def test_equal_to_plain_loops(
    series: h5feed.Dataset, options: dict[str, Any], batch_size: int, shards: int, split: str
) -> None:
    """The rows of each sample, each sample once over all shards, and any batch alike when asked for alone."""
    rows = list(range(SERIES_ROWS))
    if split == "val":
        options["val"] = 1 if options.get("episode") == "trial" else 0.4
        rows = series.split_rows("val", **{name: options[name] for name in options if name in _OF_SPLITS}).tolist()
    episodes = IDS.tolist() if options.get("episode") == "trial" else [0] * SERIES_ROWS
    reference = Reference(rows, episodes, options)
    samples = reference.samples()
    if not samples:
        with pytest.raises(BadParameter, match="spans"):
            series.plan(split, **options)
        return
    if condition := options.get("where"):
        samples = [row for row in samples if (row >= 11 if ">=" in condition else row < 40)]
    samples = samples[: options.get("limit")]
    seen: list[int] = []
    for shard in range(shards):
        last = {} if shards == 1 else {"last": "pad"}
        order = {**options, "batch_size": batch_size, "shard": shard, "shards": shards, **last}
        batches = list(series.batches(split, **order))
        for index, batch in enumerate(batches):
            _expected(batch, reference)
            real = np.ones(len(batch.rows), bool) if batch.weight is None else batch.weight > 0
            seen += batch.rows[real].tolist()
            if index % 3 == 1:
                alone = series.batch(index, split=split, **order)
                assert {name: array.tobytes() for name, array in alone.items()} == {
                    name: array.tobytes() for name, array in batch.items()
                }
    assert sorted(seen) == samples
    if shards == 1 and not options.get("shuffle"):
        assert seen == samples


_OF_SPLITS = ("val", "sequence_length", "sampling_rate", "offsets", "ends", "episode", "sequence_stride")
