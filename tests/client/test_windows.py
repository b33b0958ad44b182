"""Windows of rows as samples: the rows, the ends of episodes, and which rows splits have."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter, FieldNotFound, UnsupportedField
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.object_store import SOURCES, served_from
from tests.support.server_process import ServerProcess
from tests.support.short_folder import short_folder
from tests.support.windows import OFFSETS, Windows

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


ZIPPED = np.repeat(np.random.default_rng(2).integers(0, 256, (30, 80, 1), np.uint8), 80, axis=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
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
    with h5py.File(folder / "zipped.h5", "w") as file:
        for name, height in (("single", 1), ("several", 4)):
            data = ZIPPED[:, :, : 80 // height]
            file.create_dataset(name, data=data, chunks=(height, *data.shape[1:]), compression="gzip")
    return serve_module(folder, "--workers", "2")


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
        key: np.concatenate([demo[key][[begin] * begin_pad], demo[key][begin:end], demo[key][[end - 1] * end_pad]])
        for key in keys
    }
    return found, np.array([False] * begin_pad + [True] * (end - begin) + [False] * end_pad)


@pytest.mark.parametrize("ends", ["drop", "pad_start", "pad_end", "pad"])
def test_sequences_as_robomimic_has_them(robot: h5feed.Dataset, ends: str) -> None:
    """Frame stacks repeat the first row of an episode, sequences the last, and masks say where: as many samples as with
    `pad_frame_stack` and `pad_seq_length`."""
    pad_frame_stack, pad_seq_length = ends in ("pad", "pad_start"), ends in ("pad", "pad_end")
    stack, length, chunk = 2, 10, 16
    options: dict[str, Any] = {
        "fields": ["obs.image", "obs.eef", "actions"],
        "offsets": {
            "obs.image": range(1 - stack, length),
            "obs.eef": range(1 - stack, length),
            "actions": range(1 - stack, chunk),
        },
        "ends": ends,
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
                    if ends == "drop":
                        assert mask.all() and f"{name}.mask" not in batch
                    else:
                        np.testing.assert_array_equal(batch[f"{name}.mask"][place], mask)
    expected_samples = [
        int(start) + index
        for start, rows in zip(starts, LENGTHS, strict=False)
        for index in range(0 if pad_frame_stack else stack - 1, rows if pad_seq_length else rows - (chunk - 1))
    ]
    assert sorted(seen) == expected_samples


FIELDS = ["x", "packed", "target"]


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """Options of orders whose samples are windows."""
    options: dict[str, Any] = {"fields": FIELDS}
    has_length = draw(st.booleans())
    if has_length:
        options |= {"sequence_length": draw(st.integers(1, 4)), "sampling_rate": draw(st.integers(1, 2))}
    if draw(st.booleans()) or not has_length:
        options["offsets"] = draw(st.dictionaries(st.sampled_from(FIELDS), OFFSETS, min_size=1))
    options |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "sequence_stride": st.integers(1, 4),
                "ends": st.sampled_from(["drop", "pad", "pad_start", "pad_end"]),
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


def _expected(batch: h5feed.Batch, reference: Windows) -> None:
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
    reference = Windows(rows, episodes, options)
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


def _windows(batches: Any, *names: str) -> dict[str, list[Any]]:
    """The rows of samples, and their fields as lists."""
    found: dict[str, list[Any]] = {name: [] for name in ("rows", *names)}
    for batch in batches:
        found["rows"] += batch.rows.tolist()
        for name in names:
            found[name] += batch[name].tolist()
    return found


def test_sequences_end_with_their_episode(robot: h5feed.Dataset) -> None:
    """Groups are episodes: without padding, sequences begin where they fit, every so many rows."""
    expected: list[int] = []
    for first, length in zip(np.cumsum([0, *LENGTHS]).tolist(), LENGTHS, strict=False):
        expected += range(first, first + length - 4, 3)
    found = _windows(robot.batches(sequence_length=5, sequence_stride=3, fields=["actions"]), "actions")
    assert found["rows"] == expected
    np.testing.assert_array_equal(found["actions"], [EVERY["actions"][row : row + 5] for row in expected])


def test_the_whole_dataset_may_be_one_episode(robot: h5feed.Dataset) -> None:
    """With episode=none, sequences go on in the next group."""
    assert robot.plan(sequence_length=5, episode="none").rows == sum(LENGTHS) - 4
    assert robot.plan(sequence_length=5).rows == sum(max(0, length - 4) for length in LENGTHS)


def test_a_forecast(series: h5feed.Dataset) -> None:
    """As `keras.utils.timeseries_dataset_from_array` does it: a window, and the target that follows it."""
    data, targets = SERIES["x"][:-12], SERIES["target"][12:]
    found = _windows(
        series.batches(
            fields=["x", "target"], sequence_length=4, sampling_rate=3, sequence_stride=2, offsets={"target": 12}
        ),
        "x",
        "target",
    )
    assert found["rows"] == list(range(0, SERIES_ROWS - 12, 2))
    for sample, window, target in zip(found["rows"], found["x"], found["target"], strict=True):
        if sample + 10 <= len(data):
            np.testing.assert_array_equal(window, data[sample : sample + 10 : 3])
        assert target == targets[sample]


def test_a_field_under_another_name(series: h5feed.Dataset) -> None:
    """Input and target can be rows of one field; `fields` can name either."""
    options: dict[str, Any] = {"sequence_length": 4, "offsets": {"next": ("target", 4)}, "ends": "pad"}
    batch = series.batch(1, batch_size=8, **options)
    assert batch["target"].shape == (8, 4) and batch["next"].tolist() == list(range(12, 20))
    assert batch["next.mask"].all()
    assert sorted(series.batch(0, fields=["next"], **options)) == ["next", "next.mask"]
    assert dict(series.batch(0, fields=[], **options)) == {}
    loader = series.loader(x="x", y=["target", "next"], **options)
    _, y = next(iter(loader))
    assert y["target"].shape == (32, 4) and y["next"].shape == (32,)
    train = series.sequence("train", x="x", y="next", sample_weight="next.mask", shuffle=True, val=0.2, **options)
    assert sorted(train.row_ids.tolist()) == list(range(48))
    assert train[0][1].shape == train[0][2].shape == (32,)


def test_splits_have_whole_episodes(robot: h5feed.Dataset) -> None:
    """Where there are episodes, they are divided, and the plan and the report say so."""
    options: dict[str, Any] = {"sequence_length": 3, "val": 2, "test": 1}
    rows_of: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        batches = list(robot.batches(split, fields=["episode"], **options, offsets={"episode": 0}))
        assert batches
        rows_of[split] = {row + step for batch in batches for row in batch.rows.tolist() for step in range(3)}
        assert rows_of[split] <= set(robot.split_rows(split, **options).tolist())
    numbers = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    episodes = {split: set(numbers[list(rows)].tolist()) for split, rows in rows_of.items()}
    assert not episodes["train"] & episodes["val"] and not (episodes["train"] | episodes["val"]) & episodes["test"]
    assert "episodes are divided" in (robot.plan("val", **options).note or "")
    report = robot.splits(**options)
    assert "episodes are divided" in report["note"] and report["splits"]["val"]["groups"] == 2
    assert report["method"] == "GroupShuffleSplit" and report["group"] == "__pieces__"


def test_splits_by_position(series: h5feed.Dataset) -> None:
    """Without episodes, val and test are at the end, and no row is in samples of two splits."""
    options: dict[str, Any] = {"sequence_length": 4, "offsets": {"x": range(-2, 1)}, "val": 0.2, "test": 10}
    last = -1
    for split in ("train", "val", "test"):
        samples = [row for batch in series.batches(split, **options) for row in batch.rows.tolist()]
        assert min(samples) - 2 > last
        last = max(samples) + 3
    assert last == SERIES_ROWS - 1
    assert "divided by position" in series.splits(**options)["note"]
    assert "divided by position" in (series.plan("train", **options).note or "")


def test_splits_by_a_field_of_episodes(series: h5feed.Dataset) -> None:
    """Parts of one episode that are not next to each other are in the same split, and no sample has rows of both."""
    options: dict[str, Any] = {"sequence_length": 2, "episode": "trial", "val": 1, "fields": ["trial"]}
    found = {split: _windows(series.batches(split, **options), "trial")["trial"] for split in ("train", "val")}
    of_split = {split: {one for pair in pairs for one in pair} for split, pairs in found.items()}
    assert all(first == second for pairs in found.values() for first, second in pairs)
    assert not of_split["train"] & of_split["val"] and of_split["train"] | of_split["val"] == {3, 5, 7}


def test_stored_splits(robot: h5feed.Dataset) -> None:
    """Samples of a stored split are of its episodes."""
    starts = np.cumsum([0, *LENGTHS])
    expected = [row for number in (0, 1, 3, 4) for row in range(starts[number], starts[number + 1] - 1)]
    assert [row for batch in robot.batches("train", sequence_length=2) for row in batch.rows.tolist()] == expected


def test_filters_choose_samples(series: h5feed.Dataset) -> None:
    """Only the sample's own row has to meet the condition."""
    found = _windows(series.batches(where="target >= 30", offsets={"target": [-9, 0]}, fields=["target"]), "target")
    assert found["rows"] == list(range(30, SERIES_ROWS))
    assert found["target"][0] == [21, 30]


def test_windows_read_here(server: ServerProcess, tmp_path: Path) -> None:
    """The client reads the rows of windows from the files, or decodes their chunks: the same arrays."""
    options: dict[str, Any] = {"sequence_length": 4, "ends": "pad", "shuffle": True, "batch_size": 8}
    with ExitStack() as stack:
        socket = stack.enter_context(short_folder()) / "socket"
        local = ServerProcess(server.folder, tmp_path / "cache", "--uds", str(socket))
        stack.callback(local.stop)
        near = stack.enter_context(h5feed.connect(f"unix://{socket}", deadline=60))
        loader = near["robot"].loader(x=["obs.image", "obs.image.mask"], y=[], **options)
        batches = near["robot"].batches(fields=["obs.image"], decode="server", **options)
        for (x,), batch in zip(loader, batches, strict=True):
            np.testing.assert_array_equal(x["obs.image"], batch["obs.image"])
            np.testing.assert_array_equal(x["obs.image.mask"], batch["obs.image.mask"])
        assert loader.stats().from_files == sum(LENGTHS)
    options["offsets"] = {"several": [-2, 3]}
    with h5feed.connect(server.url, local=False, deadline=60) as far:
        loader = far["zipped"].loader(x=["single", "several"], y=[], decode="client", **options)
        batches = far["zipped"].batches(fields=["single", "several"], decode="server", **options)
        for (x,), batch in zip(loader, batches, strict=True):
            rows = batch.rows[:, None]
            np.testing.assert_array_equal(x["single"], ZIPPED[np.minimum(rows + np.arange(4), 29)])
            np.testing.assert_array_equal(x["several"], ZIPPED[np.clip(rows + np.array([-2, 3]), 0, 29)][..., :20])
            np.testing.assert_array_equal(batch["several"], x["several"])
        assert loader.stats().from_chunks == 30


def test_text_at_an_offset(series: h5feed.Dataset) -> None:
    """Rows that differ in length can be of another row, but not several rows."""
    for batch in series.batches(offsets={"words": 3}, fields=["words", "target"], batch_size=7):
        assert batch.text("words") == [f"row {row + 3}" for row in batch.rows]
        assert batch["target"].tolist() == batch.rows.tolist()
    with pytest.raises(BadParameter, match="differ in length"):
        series.plan(sequence_length=2, fields=["words"])
    assert series.plan(sequence_length=2, fields=["words", "x"], offsets={"words": 0}).rows == SERIES_ROWS - 1


@pytest.mark.parametrize("source", SOURCES)
def test_any_server_sends_the_same(server: ServerProcess, tmp_path: Path, feed: h5feed.Feed, source: str) -> None:
    """A second server sends the same bytes, also from an object store."""
    options: dict[str, Any] = {
        "sequence_length": 3,
        "offsets": {"obs.image": [-1, 0]},
        "ends": "pad",
        "fields": ["obs.image", "actions", "rewards"],
        "shuffle": True,
        "batch_size": 5,
    }
    with (
        served_from(source, server.folder, tmp_path) as other,
        h5feed.connect(other.url, local=False, deadline=60) as second,
    ):
        pairs = zip(feed["robot"].batches(**options), second["robot"].batches(**options), strict=True)
        for one, two in pairs:
            assert {name: array.tobytes() for name, array in one.items()} == {
                name: array.tobytes() for name, array in two.items()
            }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequence_stride": 2}, "needs sequence_length or offsets"),
        ({"ends": "pad"}, "needs sequence_length or offsets"),
        ({"episode": "trial"}, "needs sequence_length or offsets"),
        ({"sampling_rate": 2, "offsets": {"x": [0, 1]}}, "sampling_rate needs sequence_length"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"sequence_length": 61}, "spans 61 rows, but the longest episode has 60"),
        ({"sequence_length": 2, "ends": "wrap"}, "drop"),
        ({"offsets": {"targets": [0, 1]}, "fields": ["x"]}, "did you mean 'target'"),
        ({"offsets": {"x": ("target", 1)}, "fields": ["x"]}, "a field of its own"),
        ({"offsets": {"next": ("targets", 1)}}, "did you mean 'target'"),
        ({"offsets": "=x:1"}, "NAME:OFFSETS"),
        ({"offsets": "x:0..1;x:3", "fields": ["x"]}, "named twice"),
        ({"offsets": "x:5..1", "fields": ["x"]}, "must ascend"),
        ({"offsets": "x:0..99999999", "fields": ["x"]}, "limit of 65536"),
        ({"offsets": "x=3", "fields": ["x"]}, "NAME:OFFSETS"),
        ({"offsets": "x:a", "fields": ["x"]}, "neither a number nor a range"),
        ({"offsets": {"x": []}, "fields": ["x"]}, "empty"),
        ({"offsets": {"x": 1.5}, "fields": ["x"]}, "integer"),
        ({"offsets": {"x": "0"}, "fields": ["x"]}, "integer"),
        ({"offsets": {}, "fields": ["x"]}, "names no field"),
        ({"offsets": [1], "fields": ["x"]}, "must be a dict"),
        ({"offsets": {"x": 1 << 50}, "fields": ["x"]}, "out of range"),
        ({"sequence_length": 2, "val": 0.2, "split": "val", "stratify": "trial"}, "cannot be stratified"),
        ({"sequence_length": 2, "episode": "x"}, "one value per row"),
    ],
)
def test_what_is_refused(series: h5feed.Dataset, options: dict[str, Any], said: str) -> None:
    """The message names the value, and what would be right."""
    with pytest.raises((BadParameter, FieldNotFound, UnsupportedField), match=said):
        series.plan(**options)


def test_names_are_percent_encoded(feed: h5feed.Feed, series: h5feed.Dataset) -> None:
    """The URL form is canonical: the same for equal offsets, and readable."""
    from h5feed.offsets import offsets_of, offsets_text, parse_offsets

    offsets = {
        "a:b;c": [-1, 0],
        "b": range(16),
        "c": 24,
        "d": [24],
        "e": range(0, 31, 2),
        "f": [3, 1, 2],
        "g=": ("a:b;c", 5),
    }
    text = offsets_text(offsets_of(offsets))
    assert text == "a%3Ab%3Bc:-1,0;b:0..15;c:24;d:24..24;e:0..30/2;f:3,1,2;g%3D=a%3Ab%3Bc:5"
    assert offsets_text(parse_offsets(text)) == text
    assert parse_offsets("x:0..2,7")["x"].offsets == (0, 1, 2, 7)
    assert series.plan(offsets="target:1..3", fields=["target"]).params["offsets"] == "target:1..3"


def test_a_loader_resumes(series: h5feed.Dataset) -> None:
    """A state that was saved within a pass continues with the next batch, and each sample comes once."""
    options: dict[str, Any] = {
        "x": ["x", "x.mask"],
        "y": "target",
        "sequence_length": 3,
        "offsets": {"target": 5},
        "ends": "pad",
        "shuffle": True,
        "seed": 4,
        "batch_size": 8,
    }
    whole = list(series.loader(**options))
    loader = series.loader(**options)
    for _, _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    resumed = series.loader(**options)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(whole) == 8 and len(rest) == 5
    for (x, y), (other_x, other_y) in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(y, other_y)
        for name in ("x", "x.mask"):
            np.testing.assert_array_equal(x[name], other_x[name])
    assert whole[0][0]["x"].shape == (8, 3, 2) and whole[0][0]["x.mask"].dtype == bool
    with pytest.raises(BadParameter):
        series.loader(**{**options, "sequence_length": 4}).load_state_dict(state)


def test_a_record_of_windows(series: h5feed.Dataset) -> None:
    """What was trained on can be opened again: the same samples."""
    options: dict[str, Any] = {"sequence_length": 3, "offsets": {"next": ("target", 3)}, "val": 0.2, "batch_size": 5}
    loader = series.loader("val", x="x", y="next", shuffle=True, **options)
    again = h5feed.reopen(loader.source().json()).loader(x="x", y="next")
    for one, two in zip(loader, again, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_keras_fits_sequences(series: h5feed.Dataset) -> None:
    """`Model.fit` gets sequences, targets of each step and masks as weights; statistics are of the rows of train."""
    import keras

    options: dict[str, Any] = {
        "x": "x",
        "y": "packed",
        "sample_weight": "packed.mask",
        "sequence_length": 4,
        "ends": "pad",
        "mean": "server",
        "std": "server",
        "val": 0.25,
        "batch_size": 16,
    }
    train = series.sequence("train", shuffle=True, **options)
    x, y, weight = train[0]
    assert x.shape == (16, 4, 2) and y.shape == (16, 4, 2) and weight.shape == (16, 4) and weight.dtype == np.float32
    rows = series.split_rows("train", sequence_length=4, val=0.25)
    stats = series.stats("train", field="x", sequence_length=4, val=0.25)
    assert stats["rows"] == len(rows) == 45
    ordered = series.sequence("train", **options)[0][0]
    scaled = (SERIES["x"][:4] - SERIES["x"][rows].mean(axis=0)) / SERIES["x"][rows].std(axis=0)
    np.testing.assert_allclose(ordered[0], scaled, rtol=1e-3, atol=1e-4)
    model = keras.Sequential([keras.layers.GRU(4, return_sequences=True), keras.layers.Dense(2)])
    model.compile(loss="mse")
    history = model.fit(train, validation_data=series.sequence("val", **options), epochs=1, verbose=0)
    assert np.isfinite(history.history["val_loss"]).all()


def test_the_other_loops(series: h5feed.Dataset) -> None:
    """All loops take the options of windows."""
    from h5feed.jax import to_device

    options: dict[str, Any] = {"x": "x", "y": "target", "sequence_length": 3, "offsets": {"target": 3}, "batch_size": 4}
    x, y = next(iter(to_device(series.loader(**options))))
    assert x.shape == (4, 3, 2) and y.tolist() == [3, 4, 5, 6]
    labels = series.loader(x="x", y="trial", sequence_length=3, batch_size=4, class_mode="categorical")
    assert next(iter(labels))[1].shape == (4, 3, 8)


def test_torch(series: h5feed.Dataset) -> None:
    """Batches of torch have windows; single rows have none."""
    pytest.importorskip("torch")
    options: dict[str, Any] = {"x": "x", "y": "target", "sequence_length": 3, "offsets": {"target": 3}}
    x, y = next(iter(series.torch(batch_size=4, **options)))
    assert tuple(x.shape) == (4, 3, 2) and y.tolist() == [3, 4, 5, 6]
    with pytest.raises(BadParameter, match="use torch"):
        series.torch_map(**options)


def test_tf_data(series: h5feed.Dataset) -> None:
    """Batches of tf.data have windows."""
    pytest.importorskip("tensorflow")
    data = series.tf_data(x="x", y="target", sequence_length=3, offsets={"target": 3}, batch_size=4)
    x, y = next(iter(data))
    assert tuple(x.shape) == (4, 3, 2) and y.numpy().tolist() == [3, 4, 5, 6]
