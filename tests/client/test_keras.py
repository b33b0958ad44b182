"""The Sequence under real Keras (JAX backend) and a real server."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.errors import BadParameter, RevisionChanged
from h5feed.keras import Sequence as KerasSequence
from h5feed.loops.sharding import shard_of

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 203
BATCH = 10
AHEAD = int(keras.backend.backend() == "jax" and tuple(map(int, keras.version().split(".")[:2])) < (3, 15))
"""Batches that Keras takes ahead of the last step of `fit`, and drops when it ends."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset whose input is the row's own id, so that a model sees which rows it is given."""
    folder = tmp_path_factory.mktemp("ids")
    with h5py.File(folder / "ids.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype=np.float32)[:, None] + np.array([[0.0, 0.0]], np.float32)
        file["y"] = np.arange(ROWS) % 3
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["ids"]
    server.stop()


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the rows of each training epoch, as the model saw them."""

    def __init__(self, sequence: Any) -> None:
        super().__init__()
        self.epochs: list[list[int]] = []
        self._sequence = sequence
        self._arrays = sequence._arrays
        self._recording = False
        sequence._arrays = self._record

    def _record(self, batch: Any, epoch: int) -> Any:
        arrays = self._arrays(batch, epoch)
        if self._recording:
            self.epochs[-1] += arrays[0][:, 0].astype(int).tolist()
        return arrays

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append([])
        self._recording = True

    def on_test_begin(self, logs: Any = None) -> None:
        self._recording = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._recording = False


def model_of() -> Any:
    """A model that is built by looking at data, as most are."""
    model = keras.Sequential([keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


EVERY = list(range(ROWS))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("keras_shuffle", [True, False])
def test_each_row_once_per_epoch(dataset: Any, shuffle: bool, validate: bool, keras_shuffle: bool) -> None:
    """Three epochs of fit deliver every row once each, in different orders when shuffled, ascending when not."""
    train = dataset.sequence("all", batch_size=BATCH, shuffle=shuffle)
    seen = Recorder(train)
    val = dataset.sequence("all", batch_size=50) if validate else None
    model_of().fit(train, validation_data=val, epochs=3, verbose=0, callbacks=[seen], shuffle=keras_shuffle)
    assert [sorted(rows) for rows in seen.epochs] == [EVERY] * 3
    if shuffle:
        assert len({tuple(rows) for rows in [*seen.epochs, EVERY]}) == 4
        expected = [b.rows.tolist() for e in range(3) for b in dataset.batches(batch_size=BATCH, shuffle=True, epoch=e)]
        assert [row for rows in seen.epochs for row in rows] == [row for rows in expected for row in rows]
    else:
        assert seen.epochs == [EVERY] * 3
    train.close()


def test_a_second_fit_goes_on_counting(dataset: Any) -> None:
    """Two fits of one epoch, with models yet to be built, are epochs 0 and 1; looking at data does not count."""
    train = dataset.sequence("all", batch_size=BATCH, shuffle=True)
    orders = []
    for _ in range(2):
        seen = Recorder(train)
        model_of().fit(train, epochs=1, verbose=0, callbacks=[seen])
        train._arrays = seen._arrays
        orders += seen.epochs
    expected = [
        [row for batch in dataset.batches(batch_size=BATCH, shuffle=True, epoch=e) for row in batch.rows.tolist()]
        for e in range(2)
    ]
    assert orders == expected
    train.close()


def test_steps_per_epoch_cut_a_pass_without_losing_a_row(dataset: Any) -> None:
    """21 batches in epochs of 7: three epochs are one pass, six are two."""
    train = dataset.sequence("all", batch_size=BATCH, shuffle=True)
    seen = Recorder(train)
    model_of().fit(train, epochs=6, steps_per_epoch=7, verbose=0, callbacks=[seen])
    rows = [row for epoch in seen.epochs for row in epoch]
    assert sorted(rows[:ROWS]) == sorted(rows[ROWS:]) == EVERY
    train.close()


def test_stopped_in_mid_epoch_and_fitted_again(dataset: Any) -> None:
    """A fit that is stopped in the middle leaves nothing behind: the next has a whole, new pass."""

    class Stop(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 3:
                raise KeyboardInterrupt

    train = dataset.sequence("all", batch_size=BATCH, shuffle=True)
    model = model_of()
    with pytest.raises(KeyboardInterrupt):
        model.fit(train, epochs=1, verbose=0, callbacks=[Stop()])
    seen = Recorder(train)
    model.fit(train, epochs=2, verbose=0, callbacks=[seen])
    assert [sorted(rows) for rows in seen.epochs] == [EVERY] * 2
    assert train.epoch >= 2
    train.close()


def test_predictions_align_with_row_ids(dataset: Any) -> None:
    """predict gives one row for each of `row_ids`, in that order, from a shuffled sequence too."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inputs * 1.0)
    for options in ({"shuffle": True}, {"shuffle": False}, {"last": "pad"}, {"limit": 57}):
        sequence = dataset.sequence("train", batch_size=BATCH, test=0.2, **options)
        for _ in range(2):
            predicted = model.predict(sequence, verbose=0)
            np.testing.assert_array_equal(predicted[:, 0].astype(int), sequence.row_ids)
        sequence.close()


def test_padded_tail_has_no_weight(dataset: Any) -> None:
    """With last="pad" every batch is full, and repeated rows have weight 0."""
    sequence = dataset.sequence("all", batch_size=BATCH, last="pad")
    batches = [sequence[i] for i in range(len(sequence))]
    assert {len(x) for x, _, _ in batches} == {BATCH}
    assert sum(weight.sum() for _, _, weight in batches) == ROWS
    assert batches[-1][2].tolist() == [1] * 3 + [0] * 7
    model = model_of()
    model.fit(sequence, epochs=1, verbose=0)
    sequence.close()


def test_a_loop_by_number(dataset: Any) -> None:
    """Indexing through all batches gives a pass, the same one again until `on_epoch_end` says that it has ended."""
    sequence = dataset.sequence("all", batch_size=BATCH, shuffle=True)
    passes = []
    for ends in (False, True, False):
        passes.append([row for index in range(len(sequence)) for row in sequence[index][0][:, 0].astype(int).tolist()])
        if ends:
            sequence.on_epoch_end()
    assert passes == [every_row_of(dataset.batches(batch_size=BATCH, shuffle=True, epoch=e)) for e in (0, 0, 1)]
    with pytest.raises(IndexError):
        sequence[len(sequence)]
    sequence.close()


def test_fields_are_chosen(dataset: Any) -> None:
    """x and y name fields: one gives an array, several a dict, none nothing."""
    both = dataset.sequence("all", x=["x", "y"], y=[])
    assert set(both[0][0]) == {"x", "y"} and len(both[0]) == 1
    with pytest.raises(BadParameter, match="did you mean 'shuffle'\\? The options are"):
        dataset.sequence("all", shufle=True)
    both.close()


def test_server_killed_and_restarted_in_mid_training(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """SIGKILL in mid-epoch and a restart a second later: fit goes on, each row still once in every epoch."""
    server = serve(folder, "--workers", "2")

    class Kill(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2 and not restarts:
                server.kill()
                restarts.append(threading.Timer(1.0, server.start))
                restarts[0].start()

    restarts: list[threading.Timer] = []
    with h5feed.connect(server.url, deadline=60) as feed:
        train = feed["tall"].sequence("all", batch_size=4, shuffle=True, x="w", readahead=400_000)
        rows: list[list[int]] = []
        taken = train._arrays

        def record(batch: Any, epoch: int) -> Any:
            rows.append(batch.rows.tolist())
            return taken(batch, epoch)

        train._arrays = record  # type: ignore[method-assign]
        model = keras.Sequential([keras.Input((300, 300)), keras.layers.Flatten(), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(train, epochs=2, verbose=0, callbacks=[Kill()])
        restarts[0].join()
        train.close()
    # The first batch was a look at its shape, to build the model.
    assert sorted(itertools.chain(*rows[-20:-10])) == list(range(40))
    assert sorted(itertools.chain(*rows[-10:])) == list(range(40))


def test_threads_end_with_the_sequence(dataset: Any) -> None:
    """Dropping a sequence ends its read-ahead threads."""

    def readahead_threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("h5feed-readahead")}

    before = readahead_threads()
    sequence = dataset.sequence("all", batch_size=2, readahead=1000)
    assert len(sequence[0][0]) == len(sequence[1][0]) == 2
    assert not readahead_threads() <= before
    del sequence
    wait_until(lambda: readahead_threads() <= before)


def every_row_of(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def test_epoch_is_where_to_go_on(dataset: Any) -> None:
    """After whole passes, in fit or in a loop, `epoch` is the number of the next, so that a saved one repeats none."""
    train = dataset.sequence("all", batch_size=BATCH, shuffle=True, epoch=5)
    assert train.epoch == 5
    model_of().fit(train, epochs=2, verbose=0)
    assert train.epoch == 7
    for _ in train:
        pass
    assert train.epoch == 8
    for index in range(len(train)):
        train[index]
    assert train.epoch == 8
    train.set_epoch(3)
    resumed = [row for x, _ in train for row in x[:, 0].astype(int).tolist()]
    assert resumed == every_row_of(dataset.batches(batch_size=BATCH, shuffle=True, epoch=3))
    train.close()


@pytest.mark.parametrize("built", [True, False])
def test_predicting_in_the_middle_of_a_pass(dataset: Any, built: bool) -> None:
    """A callback that predicts and evaluates with the sequence under training takes no row from the pass."""

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch in (4, 5):
                seen._recording = False
                predicted = probe.predict(train, verbose=0)
                np.testing.assert_array_equal(predicted[:, 0].astype(int), train.row_ids)
                probe.evaluate(train, verbose=0, steps=3)
                seen._recording = True

    if built:
        inputs = keras.Input((2,))
        probe = keras.Model(inputs, inputs * 1.0)
    else:
        probe = keras.Sequential([keras.layers.Rescaling(1.0)])
    probe.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train = dataset.sequence("all", batch_size=BATCH, shuffle=True)
    seen = Recorder(train)
    model_of().fit(train, validation_data=train, epochs=4, steps_per_epoch=11, verbose=0, callbacks=[seen, Look()])
    rows = [row for epoch in seen.epochs for row in epoch]
    expected = every_row_of(dataset.batches(batch_size=BATCH, shuffle=True, epoch=0))
    assert rows[:ROWS] == expected
    train.close()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_failure_leaves_nothing_broken(dataset: Any, shuffle: bool) -> None:
    """After a failed fetch, at any position of an evaluation, a pass or a look, all goes on as if it had not been."""
    sequence = dataset.sequence("all", batch_size=BATCH, shuffle=shuffle, readahead=1)
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inputs * 1.0)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trained = model_of()
    trained.build((None, 2))
    client = dataset._client
    body = client.body

    def failing_after(requests: int) -> Any:
        left = iter(range(requests))

        def fetch(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise h5feed.FeedError("injected")
            return body(*args, **options)

        return fetch

    try:
        for fail in (0, 1):
            for call in (model.predict, trained.fit, model_of().fit, model.evaluate):
                sequence.close()
                client.body = failing_after(fail)
                with pytest.raises(h5feed.FeedError, match="injected"):
                    for _ in range(5):
                        call(sequence, verbose=0)
                client.body = body
                predicted = model.predict(sequence, verbose=0)
                np.testing.assert_array_equal(predicted[:, 0].astype(int), sequence.row_ids)
                assert sorted(row for x, _ in sequence for row in x[:, 0].astype(int).tolist()) == EVERY
    finally:
        del client.body
    sequence.close()


def test_a_subclass(dataset: Any) -> None:
    """A subclass that overrides `__getitem__` and the hooks is treated as the sequence itself."""

    class Doubled(KerasSequence):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            x, y = super().__getitem__(index)
            return 2 * x, y

        def on_epoch_begin(self) -> None:
            super().on_epoch_begin()

        def on_epoch_end(self) -> None:
            super().on_epoch_end()

    train = Doubled(dataset, "all", batch_size=BATCH, shuffle=True)
    inputs = keras.Input((2,))
    predicted = keras.Model(inputs, inputs * 0.5).predict(train, verbose=0)
    np.testing.assert_array_equal(predicted[:, 0].astype(int), train.row_ids)
    for fitted in (1, 2):
        seen = Recorder(train)
        model_of().fit(train, epochs=1, steps_per_epoch=5, verbose=0, callbacks=[seen])
        train._arrays = seen._arrays  # type: ignore[method-assign]
        expected = every_row_of(dataset.batches(batch_size=BATCH, shuffle=True, epoch=fitted - 1))
        assert seen.epochs == [expected[: (5 + AHEAD) * BATCH]]
    train.close()


def seen_by(sequence: Any, batches: int | None = None) -> list[list[int]]:
    """The rows of the next batches of a sequence, of as many as there are in a pass or so many."""
    return [next(sequence)[0][:, 0].astype(int).tolist() for _ in range(batches or len(sequence))]


@pytest.mark.parametrize("last", ["pad", "drop"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_share_each_step(dataset: Any, shuffle: bool, last: Any) -> None:
    """All shards have as many batches; a step is the run of the global order; only the tail is lost."""
    options = {"shuffle": shuffle, "last": last, "verbose": False}
    whole = seen_by(dataset.sequence(batch_size=24, **options))
    parts = [seen_by(dataset.sequence(batch_size=8, shard=shard, shards=3, **options)) for shard in range(3)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole
    rows = [row for step in whole for row in step]
    assert len(set(rows)) == (ROWS if last == "pad" else ROWS // 24 * 24)


def test_more_or_fewer_shards_go_on_in_the_same_order(dataset: Any) -> None:
    """A state of one process is taken up by three, and theirs by two, if a step has as many rows: no row is lost."""
    options = {"shuffle": True, "last": "pad", "verbose": False}
    alone = dataset.sequence(batch_size=24, **options)
    whole = seen_by(dataset.sequence(batch_size=24, **options))
    assert seen_by(alone, 2) == whole[:2]
    state = json.loads(json.dumps(alone.state_dict()))
    for shards, start, stop in [(3, 2, 5), (2, 5, 9)]:
        parts = []
        for shard in range(shards):
            sequence = dataset.sequence(batch_size=24 // shards, shard=shard, shards=shards, **options)
            sequence.load_state_dict(state)
            parts.append(seen_by(sequence, stop - start))
        assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole[start:stop]
        state = sequence.state_dict()
    assert (state["epoch"], state["delivered"]) == (1, 0)


def test_states_of_something_else_are_refused(dataset: Any) -> None:
    """A state of other data or of another order is an error that names the difference."""
    state = dataset.sequence(batch_size=10, shuffle=True, verbose=False).state_dict()
    sequence = dataset.sequence(batch_size=10, shuffle=True, seed=1, verbose=False)
    with pytest.raises(BadParameter, match="seed=0, but here seed=1"):
        sequence.load_state_dict(state)
    with pytest.raises(BadParameter, match="10 rows per step, but here a step has 20"):
        dataset.sequence(batch_size=20, shuffle=True, verbose=False).load_state_dict(state)
    with pytest.raises(RevisionChanged, match="restart the pass"):
        dataset.sequence(batch_size=10, shuffle=True, verbose=False).load_state_dict({**state, "revision": "other"})
    with pytest.raises(BadParameter, match="not a state"):
        sequence.load_state_dict({"epoch": 3})


def test_a_loop_resumed(dataset: Any) -> None:
    """After load_state_dict a loop has the rest of the pass, and the next one a whole pass."""
    first = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    begun = [row for _ in range(7) for row in next(first)[0][:, 0].astype(int).tolist()]
    resumed = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    resumed.load_state_dict(first.state_dict())
    rest = [row for x, _ in resumed for row in x[:, 0].astype(int).tolist()]
    assert begun + rest == every_row_of(dataset.batches(batch_size=BATCH, shuffle=True))
    then = [row for x, _ in resumed for row in x[:, 0].astype(int).tolist()]
    assert then == every_row_of(dataset.batches(batch_size=BATCH, shuffle=True, epoch=1))


@pytest.mark.parametrize(
    ("environment", "shard", "shards", "expected"),
    [
        ({}, "auto", None, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "auto", None, (2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 0, None, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 1, 2, (1, 2)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "auto", 3, "found 4 processes"),
        ({"RANK": "2"}, "auto", None, "must both be integers"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "auto", None, "must be from 0 to"),
        ({}, "first", None, "must be an integer or 'auto'"),
    ],
)
def test_the_shard_is_found_when_asked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], shard: Any, shards: Any, expected: Any
) -> None:
    """RANK and WORLD_SIZE count for shard="auto" only; what cannot be is said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(BadParameter, match=expected):
            shard_of(shard, shards)
    else:
        assert shard_of(shard, shards) == expected


@pytest.mark.skipif(
    not hasattr(keras.distribution.ModelParallel, "data_shard_id"), reason="Keras tells its data shards from 3.15 on"
)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_shards_are_replicas(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    """Processes that share a replica of a model are given the same rows: the shard is Keras' data shard."""
    mesh = keras.distribution.DeviceMesh((replicas, 4 // replicas), ("data", "model"), [f"cpu:{n}" for n in range(4)])
    layout = keras.distribution.LayoutMap(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="data")
    distribution._num_processes = 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    with distribution.scope():
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            distribution._process_id = rank
            assert shard_of("auto", None) == (distribution.data_shard_id, replicas)


def test_what_a_generator_of_keras_tells(dataset: Any, feed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """samples, classes, class_indices, class_weight and the line that is printed."""
    train = dataset.sequence("train", test=0.2, shuffle=True)
    assert capsys.readouterr().out == "Found 162 rows belonging to 3 classes (as numbers).\n"
    assert train.samples == len(train.row_ids) == 162
    np.testing.assert_array_equal(train.classes, train.row_ids % 3)
    assert train.class_indices == {"0": 0, "1": 1, "2": 2}
    counts = np.bincount(train.classes)
    assert train.class_weight == pytest.approx({index: 162 / (3 * count) for index, count in enumerate(counts)})
    limited = dataset.sequence("train", test=0.2, limit=10, verbose=False)
    counts = np.bincount(limited.classes)
    assert limited.class_weight == pytest.approx({index: 10 / (3 * count) for index, count in enumerate(counts)})
    feed["mixed"].sequence(x="images", y="labels")
    assert capsys.readouterr().out == "Found 1000 images belonging to 4 classes (as numbers).\n"
    feed["mixed"].sequence(x="half", y="half", shard=1, shards=2)
    assert capsys.readouterr().out == ""
    next(train)
    assert train.stats()["steps"] == 1 and train.stats()["rows"] == 32 and train.stats()["preparing"] > 0
    train.close()


def test_balanced_training_and_plain_evaluation(dataset: Any) -> None:
    """Sampling options are of training; evaluating and predicting have each row once."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, balance=True, epoch_rows=60, verbose=False)
    assert len(train) == 6 and train.samples == ROWS
    seen = Recorder(train)
    model_of().fit(train, epochs=2, verbose=0, callbacks=[seen])
    assert [len(rows) for rows in seen.epochs] == [60, 60] and seen.epochs[0] != seen.epochs[1]
    assert np.bincount(np.array(seen.epochs[0]) % 3).tolist() == [20, 20, 20]
    inputs = keras.Input((2,))
    predicted = keras.Model(inputs, inputs * 1.0).predict(train, verbose=0)
    np.testing.assert_array_equal(predicted[:, 0].astype(int), EVERY)
    train.close()
