"""Looks at a Sequence on the backend that KERAS_BACKEND names: they cost nothing, and are what was asked for.

``make test-backends`` runs this once for each backend.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.keras import Sequence as KerasSequence

from tests.support.recording_model import identity, rows_of, witnessed
from tests.support.server_process import ServerProcess

ROWS = 43
BATCH = 4
BATCHES = 11
EVERY = list(range(ROWS))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    """A dataset whose input is the row's own id, so that a model sees which rows it is given."""
    folder = tmp_path_factory.mktemp("ids")
    with h5py.File(folder / "ids.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype=np.float32)[:, None] + np.array([[0.0, 0.0]], np.float32)
        file["y"] = np.arange(ROWS) % 3
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["ids"]
    server.stop()


def golden(dataset: h5feed.Dataset, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """The rows of each batch of a pass, as the server orders them."""
    return [batch.rows.tolist() for batch in dataset.batches(batch_size=BATCH, epoch=epoch, shuffle=shuffle)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_by_its_number(dataset: h5feed.Dataset, shuffle: bool) -> None:
    """``seq[i]`` is batch i of the pass that `epoch` names, in any order, again and again, and from the end."""
    train = dataset.sequence(batch_size=BATCH, shuffle=shuffle, verbose=False)
    expected = golden(dataset, 0, shuffle)
    assert len(train) == BATCHES
    indices: list[Any] = [3, 3, 0, 10, 4, 5, 6, 2, -1, -BATCHES, np.int64(7)]
    for index in indices:
        assert rows_of(train[index]) == expected[index]
    assert [rows_of(train[index]) for index in range(BATCHES)] == expected
    for index in (BATCHES, -BATCHES - 1):
        with pytest.raises(IndexError, match="out of range for 11 batches \\(valid: -11 to 10\\)"):
            train[index]
    assert train.epoch == 0 and train.stats()["steps"] == 0
    train.on_epoch_end()
    assert train.epoch == 1
    assert [rows_of(train[index]) for index in range(BATCHES)] == golden(dataset, 1, shuffle)
    train.set_epoch(5)
    assert rows_of(train[-2]) == golden(dataset, 5, shuffle)[-2]
    train.close()


def test_looks_in_order_are_read_ahead(dataset: h5feed.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going through a pass by number takes a few requests, not one for each batch."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    client = dataset._client
    asked: list[Any] = []
    body = client.body

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return body(*args, **options)

    monkeypatch.setattr(client, "body", counted)
    assert [rows_of(train[index]) for index in range(BATCHES)] == golden(dataset, 0)
    assert len(asked) < BATCHES
    train.close()


def test_loops_of_ones_own(dataset: h5feed.Dataset) -> None:
    """``iter`` and ``next`` go over the pass that `epoch` names, each for itself; left early, they cost nothing."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    first, second = iter(train), iter(train)
    interleaved = [(rows_of(one), rows_of(other)) for one, other in zip(first, second, strict=True)]
    assert interleaved == [(rows, rows) for rows in golden(dataset, 0)]
    assert train.epoch == 1
    assert rows_of(next(iter(train))) == rows_of(next(train)) == golden(dataset, 1)[0]
    assert rows_of(next(train)) == golden(dataset, 1)[1] and train.epoch == 1
    model, rows = witnessed()
    model.fit(train, epochs=1, verbose=0)
    assert rows == [row for batch in golden(dataset, 1) for row in batch]
    # Passes follow each other without end.
    assert [rows_of(next(train)) for _ in range(BATCHES + 2)] == [*golden(dataset, 2), *golden(dataset, 3)[:2]]
    # Whoever ends the pass of a loop that has come to its end does not skip one.
    for epoch in (3, 4):
        assert [rows_of(batch) for batch in train] == golden(dataset, epoch)
        train.on_epoch_end()
        assert train.epoch == epoch + 1
    next(train)
    train.on_epoch_end()
    assert train.epoch == 6 and rows_of(next(train)) == golden(dataset, 6)[0]
    train.close()


def test_a_look_at_what_was_resumed(dataset: h5feed.Dataset) -> None:
    """A look at a pass that is to be taken up in the middle takes nothing from its rest."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    begun = [rows_of(next(train)) for _ in range(4)]
    resumed = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    resumed.load_state_dict(train.state_dict())
    expected = golden(dataset, 0)
    assert rows_of(next(iter(resumed))) == rows_of(next(resumed)) == expected[4]
    assert rows_of(resumed[1]) == expected[1]
    model, rows = witnessed()
    model.fit(resumed, epochs=2, verbose=0)
    assert list(itertools.chain(*begun)) + rows == [
        row for e in (0, 1) for batch in golden(dataset, e) for row in batch
    ]
    for one in (train, resumed):
        one.close()


def by_number(train: Any) -> None:
    for index in (3, -1, 0, 7):
        assert rows_of(train[index]) in golden_passes[train.epoch]


def in_order(train: Any) -> None:
    for index in range(6):
        train[index]


def by_loops(train: Any) -> None:
    epoch = train.epoch
    next(iter(train))
    next(train)
    for _ in zip(range(3), train, strict=False):
        pass
    assert sorted(row for batch in train for row in rows_of(batch)) == EVERY
    for _ in range(2 * BATCHES):
        next(train)
    train.on_epoch_end()
    train.on_epoch_begin()
    assert train.epoch == epoch


def by_predicting(train: Any) -> None:
    # Not in each of a hundred hooks.
    if next(hooks) % 7 == 0:
        np.testing.assert_array_equal(probe().predict(train, verbose=0)[:, 0].astype(int), train.row_ids)
        probe().evaluate(train, verbose=0, steps=2)


def by_asking(train: Any) -> None:
    assert len(train) == BATCHES and train.samples == ROWS and train.num_batches == BATCHES
    assert train.workers == 1 and not train.use_multiprocessing
    repr(train), train.state_dict(), train.classes, train.stats()


hooks = itertools.count()
probe = functools.cache(identity)
golden_passes: dict[int, list[list[int]]] = {}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("look", [by_number, in_order, by_loops, by_predicting, by_asking])
def test_looks_in_the_middle_of_training(
    dataset: h5feed.Dataset, look: Callable[[Any], None], thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a callback or another thread looks at: each row once per epoch, in the golden order."""
    if look is by_predicting and thread and keras.backend.backend() == "jax":
        pytest.skip("Keras on JAX cannot run two models in two threads")
    for epoch in range(5):
        golden_passes[epoch] = golden(dataset, epoch)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            look(train)
        except BaseException as error:
            errors.append(error)

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            return once if name.startswith("on_") and looking else super().__getattribute__(name)

    def once(*args: Any, **options: Any) -> None:
        looking.clear()
        try:
            if thread:
                other = threading.Thread(target=run)
                other.start()
                other.join()
            else:
                run()
        finally:
            looking.append(True)

    looking = [True]
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    model, rows = witnessed()
    model.fit(train, validation_data=train, epochs=2, verbose=0, callbacks=[Look()])
    assert not errors, errors[0]
    assert rows == [row for epoch in (0, 1) for batch in golden_passes[epoch] for row in batch]
    assert train.epoch == 2
    train.close()


def test_looks_while_evaluating(dataset: h5feed.Dataset) -> None:
    """Looks from callbacks of ``evaluate`` and ``predict`` are of the training order, and predictions stay aligned."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    expected = golden(dataset, 0)
    seen: list[bool] = []

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            for index in (batch, -1 - batch, 5):
                seen.append(rows_of(train[index]) == expected[index])
            seen.append(rows_of(next(iter(train))) == expected[0])
            if batch == 4:
                identity().predict(train, verbose=0, steps=3)

        on_test_batch_end = on_predict_batch_end

    model = identity()
    for _ in range(2):
        predicted = model.predict(train, verbose=0, callbacks=[Look()])
        np.testing.assert_array_equal(predicted[:, 0].astype(int), train.row_ids)
        assert train.row_ids.tolist() == EVERY
    model.evaluate(train, verbose=0, callbacks=[Look()])
    assert len(seen) == 3 * BATCHES * 4 and all(seen)
    assert train.epoch == 0
    train.close()


def test_a_subclass_that_mixes_batches(dataset: h5feed.Dataset) -> None:
    """Its batch of training is the one of its turn, however often it asks for that; what it asks for else is a look."""

    class Mixed(KerasSequence):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            other = super().__getitem__((index + 5) % len(self))
            assert len(rows_of(other)) in (BATCH, ROWS % BATCH)
            found = super().__getitem__(index)
            assert rows_of(found) == rows_of(super().__getitem__(index))
            return found

    train = Mixed(dataset, "all", batch_size=BATCH, shuffle=True, verbose=False)
    model, rows = witnessed()
    model.fit(train, epochs=2, verbose=0)
    assert rows == [row for epoch in (0, 1) for batch in golden(dataset, epoch) for row in batch]
    np.testing.assert_array_equal(identity().predict(train, verbose=0)[:, 0].astype(int), EVERY)
    train.close()


def test_other_threads_look_at_once(dataset: h5feed.Dataset) -> None:
    """Threads that look at the same time are each given what they asked for."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    expected, wrong = golden(dataset, 0), []

    def look(seed: int) -> None:
        for index in np.random.default_rng(seed).permutation(BATCHES):
            if rows_of(train[index]) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    train.close()
