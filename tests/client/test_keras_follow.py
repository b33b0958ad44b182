"""Keras over a file that grows: each pass has the rows that there are when it begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import keras
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed.keras import Sequence, StateBackup

from tests.support.growing_log import GrowingLog, growing_log
from tests.support.hdf5_writer import labels, values
from tests.support.server_process import ServerProcess

ORDER: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 5, "x": "x", "verbose": False, "follow": True}


@pytest.fixture
def log(tmp_path: Path, serve: Callable[..., ServerProcess]) -> Iterator[GrowingLog]:
    with growing_log(tmp_path / "log", serve) as made:
        yield made


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts the steps of each epoch, and grows the file at the end of the first ones."""

    def __init__(self, log: GrowingLog, growth: list[int]) -> None:
        super().__init__()
        self._log, self._growth = log, growth
        self.steps: list[int] = []
        self.told: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.steps.append(0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps[-1] += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.told.append(self.params["steps"])
        if epoch < len(self._growth):
            self._log.grow(self._growth[epoch])


class Kept(Sequence):
    """Keeps the labels of each batch that Keras takes."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        arrays = super().__getitem__(index)
        if hasattr(self, "kept"):
            self.kept.append(np.asarray(arrays[0])[:, 0])
        return arrays


def model_of() -> Any:
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Rescaling(1e-4)(inputs)))
    model.compile(optimizer="sgd", loss="mse")
    return model


def rows_in(kept: list[Any]) -> list[int]:
    """The rows that these values are of, sorted."""
    return sorted(((np.concatenate(kept) - 1) // 42).tolist())


def test_fit_sees_new_rows_from_the_next_epoch_on(log: GrowingLog) -> None:
    """Each epoch has every row once that there was at its begin, and Keras knows the number of its steps."""
    first = log.grow(30)
    train = Kept(first, y="y", workers=3, **ORDER)
    model = model_of()
    model.fit(train, epochs=1, verbose=0)
    train.set_epoch(0)
    train.kept = []
    recorder = Recorder(log, [20, 0, 40])
    history = model.fit(train, epochs=4, verbose=2, callbacks=[recorder])
    assert recorder.steps == recorder.told == [4, 7, 7, 12]
    assert len(history.history["loss"]) == 4
    ends = np.cumsum([0, *recorder.steps])
    for epoch, rows in enumerate((30, 50, 50, 90)):
        kept = train.kept[-sum(recorder.steps) :][ends[epoch] : ends[epoch + 1]]
        assert rows_in(kept) == list(range(rows))
    assert (len(train), train.samples, train.epoch) == (12, 90, 4)


def test_orders_are_those_of_the_revision(log: GrowingLog) -> None:
    """An epoch of a sequence that follows is the epoch of the same number of the dataset as it was then."""
    first = log.grow(30)
    train = first.sequence(y="y", **ORDER)
    grown = None
    for epoch, rows in enumerate((30, 50, 50)):
        if rows != len(first):
            grown = grown or log.grow(20)
        of_epoch = (grown or first).batches(batch_size=8, shuffle=True, seed=5, epoch=epoch, fields=["x"])
        wanted = [batch["x"].copy() for batch in of_epoch]
        for (x, _), expected in zip(train, wanted, strict=True):
            np.testing.assert_array_equal(x, expected)


def test_evaluate_and_predict_follow(log: GrowingLog) -> None:
    """They have the rows of now, and `row_ids` those of the last call; amid a training pass, they have those of the
    pass."""
    held = log.grow(20).sequence(y="y", **ORDER)
    model = model_of()
    assert model.predict(held, verbose=0).shape == (20, 1)
    log.grow(20)
    found = model.predict(held, verbose=0)
    assert found.shape == (40, 1) and held.row_ids.tolist() == list(range(40))
    np.testing.assert_allclose(found, model.predict(values(0, 40), verbose=0), rtol=1e-5)
    assert held.classes.tolist() == labels(0, 40).tolist()
    train = log.grow(10).sequence(y="y", **ORDER)
    history = model.fit(train, epochs=2, verbose=0, validation_data=held, callbacks=[Recorder(log, [10])])
    assert len(history.history["val_loss"]) == 2 and len(held.row_ids) == 60
    passed = iter(train)
    next(passed)
    log.grow(10)
    assert len(model.predict(train, verbose=0)) == 60
    assert 1 + sum(1 for _ in passed) == 8
    assert len(model.predict(train, verbose=0)) == 70


def test_states_of_passes_that_grow(log: GrowingLog, tmp_path: Path) -> None:
    """A state names the rows of its pass; the rest of that pass is resumed with them, the next has those of now."""
    first = log.grow(30)
    train = first.sequence(y="y", **ORDER)
    passed = iter(train)
    begun = [np.array(next(passed)[0]) for _ in range(2)]
    second = log.grow(20)
    state = train.state_dict()
    assert (state["revision"], state["delivered"]) == (first.revision, 2)
    resumed = second.sequence(y="y", **ORDER)
    resumed.load_state_dict(state)
    rest = [np.array(x) for x, _ in resumed]
    np.testing.assert_array_equal(np.sort(np.concatenate([*begun, *rest])[:, 0]), values(0, 30)[:, 0])
    for left, right in zip(rest, passed, strict=True):
        np.testing.assert_array_equal(left, right[0])
    for loop in (train, resumed):
        assert sum(len(x) for x, _ in loop) == 50 and loop.state_dict()["revision"] == second.revision


def test_backups_of_passes_that_grow(log: GrowingLog, tmp_path: Path) -> None:
    """A fit that is killed after its file has grown goes on with the rest of its pass."""
    train = Kept(log.grow(30), y="y", **ORDER)
    path = tmp_path / "feed.json"

    class Killed(Exception):
        pass

    class Killer(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if not epoch:
                log.grow(20)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            # `after` the first four of the second epoch were trained on
            if train.epoch == 1 and batch == 3 and path.exists() and '"epoch": 1, "delivered": 4' in path.read_text():
                log.grow(10)
                raise Killed

    model = model_of()
    backup = StateBackup(train, path, save_freq=1)
    with pytest.raises(Killed):
        model.fit(train, epochs=3, verbose=0, callbacks=[backup, Killer()])
    state = path.read_text()
    again = Kept(log.grow(10), y="y", **ORDER)
    again.kept = []
    recorder = Recorder(log, [])
    restored = StateBackup(again, path, save_freq=1)
    model.fit(again, initial_epoch=1, epochs=3, verbose=0, callbacks=[restored, recorder])
    # 50 rows in 7 batches, 4 of which were trained on; then 70 rows.
    assert recorder.steps == [3, 9], state
    rest = again.kept[-12:-9]
    whole = [batch["x"][:, 0].copy() for batch in log.at(revision_in(state)).batches(**order_of(1))]
    np.testing.assert_array_equal(np.concatenate(rest), np.concatenate(whole[4:]))
    assert rows_in(again.kept[-9:]) == list(range(70))


def revision_in(state: str) -> str:
    return str(json.loads(state)["revision"])


def order_of(epoch: int) -> dict[str, Any]:
    return {"batch_size": 8, "shuffle": True, "seed": 5, "epoch": epoch, "fields": ["x"]}


def test_what_cannot_follow(log: GrowingLog, tmp_path: Path) -> None:
    """Shards, which would have different rows; caches of one revision; mixtures."""
    dataset = log.grow(20)
    with pytest.raises(BadParameter, match="would not agree on the rows"):
        dataset.sequence(y="y", shard=0, shards=2, **ORDER)
    with pytest.raises(BadParameter, match="is of one revision"):
        dataset.sequence(y="y", cache=dataset.cache(tmp_path / "rows"), **ORDER)
    with pytest.raises(BadParameter, match="loops over one dataset"):
        h5feed.mix([dataset]).sequence(**ORDER)


def test_class_numbers_stay(log: GrowingLog) -> None:
    """Rows that would change the length of one-hot rows end the loop, instead of changing what targets mean."""
    loader = log.grow(10).loader(batch_size=5, x="x", y="y", class_mode="categorical", follow=True)
    assert {y.shape[1] for _, y in loader} == {5}
    log.grow(10)
    assert sum(len(y) for _, y in loader) == 20
