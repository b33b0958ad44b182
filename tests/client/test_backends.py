"""The Sequence on the backend that KERAS_BACKEND names: what a model sees must not depend on it.

``make test-backends`` runs this once for each backend. What a model is trained on is recorded by a layer of it, so that
nothing a backend fetches ahead, or fetches and drops, is taken for training.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.keras import StateBackup

from tests.support.recording_model import witnessed
from tests.support.server_process import ServerProcess

BACKEND = keras.backend.backend()
ROWS = 23
BATCH = 4
BATCHES = 6
EVERY = list(range(ROWS))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    """A dataset whose input is the row's own id, so that a model sees which rows it is given."""
    folder = tmp_path_factory.mktemp("ids")
    with h5py.File(folder / "ids.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype=np.float32)[:, None] + np.array([[0.0, 0.0]], np.float32)
        file["y"] = np.arange(ROWS) % 3
    with h5py.File(folder / "pictures.h5", "w") as file:
        file["image"] = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), np.uint8)
        file["label"] = np.arange(ROWS) % 3
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["ids"]
    server.stop()


@pytest.fixture(scope="module")
def pictures(dataset: h5feed.Dataset) -> h5feed.Dataset:
    return h5feed.Feed(dataset._client)["pictures"]


def golden(dataset: h5feed.Dataset, epoch: int, **options: Any) -> list[int]:
    """The rows of a pass, as the server orders them: the same for every backend."""
    batches = dataset.batches(batch_size=BATCH, epoch=epoch, **options)
    return [row for batch in batches for row in batch.rows.tolist()]


class Stop(keras.callbacks.Callback):  # type: ignore[misc]
    """Interrupts training after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self._left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


@pytest.mark.sampled
@pytest.mark.parametrize(("steps", "epochs"), [(None, 2), (2, 6), (4, 4)])
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_once_per_pass(
    dataset: h5feed.Dataset, shuffle: bool, validate: bool, interrupted: bool, steps: int | None, epochs: int
) -> None:
    """Whatever the options: passes hold each row once, in the golden order, which is new each pass when shuffled."""
    train = dataset.sequence(batch_size=BATCH, shuffle=shuffle, verbose=False)
    val = dataset.sequence(batch_size=BATCH, limit=10, verbose=False) if validate else None
    model, rows = witnessed()
    first = 0
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            model.fit(train, validation_data=val, epochs=1, verbose=0, callbacks=[Stop(3)])
        assert rows == golden(dataset, 0, shuffle=shuffle)[: 3 * BATCH]
        rows.clear()
        first = 1
    # Keras cuts an epoch short where the batches end: 4 steps, 2 steps, 4, 2.
    model.fit(train, validation_data=val, epochs=epochs, steps_per_epoch=steps, verbose=0)
    found = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    assert [sorted(one) for one in found] == [EVERY] * 2
    assert found == [golden(dataset, first + number, shuffle=shuffle) for number in range(2)]
    assert len({tuple(one) for one in found}) == (2 if shuffle else 1)
    assert train.epoch == first + 2
    train.close()


def test_initial_epoch(dataset: h5feed.Dataset) -> None:
    """fit(initial_epoch=k) trains on epoch k's order, also where epochs are steps of a pass."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    model, rows = witnessed()
    model.fit(train, initial_epoch=4, epochs=6, verbose=0)
    assert rows == golden(dataset, 4, shuffle=True) + golden(dataset, 5, shuffle=True)
    rows.clear()
    model.fit(train, initial_epoch=4, epochs=8, steps_per_epoch=2, verbose=0)
    # Epochs of a third of a pass: the fourth begins after one third of pass 1.
    assert rows == (golden(dataset, 1, shuffle=True) + golden(dataset, 2, shuffle=True))[2 * BATCH :][: len(rows)]
    assert len(rows) == ROWS - 2 * BATCH + 4 * BATCH
    rows.clear()
    train.set_epoch(7)
    model.fit(train, epochs=1, verbose=0)
    assert rows == golden(dataset, 7, shuffle=True)
    train.close()


def test_predictions_align(dataset: h5feed.Dataset) -> None:
    """predict and evaluate take ascending rows, each once, over and over, and cost training nothing."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inputs * 1.0)
    train = dataset.sequence(batch_size=BATCH, shuffle=True, last="pad", verbose=False)
    for _ in range(2):
        predicted = model.predict(train, verbose=0)
        np.testing.assert_array_equal(predicted[:, 0].astype(int), train.row_ids)
        np.testing.assert_array_equal(train.classes, train.row_ids % 3)
    assert train.epoch == 0 and train.row_ids[:ROWS].tolist() == EVERY
    unlabelled = dataset.sequence(batch_size=BATCH, class_mode=None, verbose=False)
    np.testing.assert_array_equal(model.predict(unlabelled, verbose=0)[:, 0].astype(int), EVERY)
    model, _ = witnessed()
    val = dataset.sequence(batch_size=BATCH, verbose=False)
    assert len({tuple(model.evaluate(val, verbose=0, return_dict=True).items()) for _ in range(2)}) == 1
    # Rows that pad the tail weigh nothing.
    assert model.evaluate(train, verbose=0)[1] == pytest.approx(model.evaluate(val, verbose=0)[1], abs=1e-6)


def test_weights_and_train_on_batch(dataset: h5feed.Dataset) -> None:
    """class_weight, a loop over train_on_batch, and `next` see the passes that fit would."""
    train = dataset.sequence(batch_size=BATCH, shuffle=True, verbose=False)
    model, rows = witnessed()
    model.fit(train, epochs=1, verbose=0, class_weight=train.class_weight)
    for x, y in train:
        model.train_on_batch(x, y)
    for _ in range(BATCHES):
        model.train_on_batch(*next(train))
    assert rows == [row for epoch in range(3) for row in golden(dataset, epoch, shuffle=True)]
    train.close()


def test_arrays_are_the_backends_own(pictures: h5feed.Dataset) -> None:
    """torch is given tensors of the batch's own memory, the others numpy; images stay uint8."""
    train = pictures.sequence(batch_size=BATCH, verbose=False)
    x, y = train[0]
    if BACKEND == "torch":
        import torch

        assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dtype == torch.uint8
    else:
        assert isinstance(x, np.ndarray) and x.dtype == np.uint8
    train.close()


@pytest.mark.parametrize("transform", ["layers", "function"])
def test_augmentation(pictures: h5feed.Dataset, transform: str) -> None:
    """Augmented batches train, and are the same for the same batch of the same pass, whatever came before."""
    augment: Any = keras.Sequential([keras.layers.RandomFlip(), keras.layers.RandomRotation(0.1)])
    if transform == "function":
        augment = lambda x, y, rng: (x[:, :, :: rng.choice([-1, 1])], y)  # noqa: E731
    train = pictures.sequence(batch_size=BATCH, shuffle=True, transform=augment, rescale=1 / 255, verbose=False)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(train, epochs=1, verbose=0)
    assert train.epoch == 1
    train.set_epoch(0)
    first = [np.asarray(keras.ops.convert_to_numpy(x)) for x, _ in train]
    train.set_epoch(0)
    for before, (x, _) in zip(first, train, strict=True):
        np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(x))
    train.close()


@pytest.mark.parametrize("crash_at", [7, 13])
def test_a_resumed_run_is_the_run(dataset: h5feed.Dataset, tmp_path: Path, crash_at: int) -> None:
    """Crashed in mid-epoch and taken up from the backup, training sees the very batches that it would have seen."""

    def run(*callbacks: Any) -> tuple[Any, list[int]]:
        train = dataset.sequence(
            batch_size=BATCH, shuffle=True, verbose=False, transform=lambda x, y, rng: (x + 0.4 * rng.random(), y)
        )
        model, rows = witnessed()
        backup = [
            keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=5),
            StateBackup(train, tmp_path / "backup" / "feed.json", save_freq=5),
        ]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(train, epochs=3, verbose=0, callbacks=[*(backup if callbacks else []), *callbacks])
        train.close()
        return model, rows

    whole, expected = run()
    _, before = run(Stop(crash_at))
    saved = crash_at // 5 * 5
    state = json.loads((tmp_path / "backup" / "feed.json").read_text())
    assert (state["epoch"], state["delivered"]) == divmod(saved, BATCHES)
    resumed, after = run(keras.callbacks.Callback())
    assert expected == [
        *golden(dataset, 0, shuffle=True),
        *golden(dataset, 1, shuffle=True),
        *golden(dataset, 2, shuffle=True),
    ]
    trained = before[: (saved // BATCHES) * ROWS + (saved % BATCHES) * BATCH]
    assert trained + after == expected
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "backup" / "feed.json").exists()


def test_failures_surface_at_once(dataset: h5feed.Dataset) -> None:
    """An error in a batch ends fit with that error; the next fit works."""

    def fails(x: Any, y: Any) -> Any:
        if armed:
            raise ValueError("a transform that fails")
        return x, y

    armed: list[bool] = []
    train = dataset.sequence(batch_size=BATCH, transform=fails, verbose=False)
    model, rows = witnessed()
    model.fit(train, epochs=1, verbose=0)
    armed.append(True)
    with pytest.raises(Exception, match="a transform that fails"):
        model.fit(train, epochs=1, verbose=0)
    armed.clear()
    # The variables of a model whose first step failed are lost to it on JAX.
    model, rows = witnessed()
    model.fit(train, epochs=1, verbose=0)
    assert rows == EVERY
    train.close()


def test_workers_are_ours(dataset: h5feed.Dataset) -> None:
    """Whatever workers a script passes, no pool of Keras is made and no row is lost (keras issues 20425, 23283)."""
    before = set(threading.enumerate())
    train = dataset.sequence(
        batch_size=BATCH, shuffle=True, workers=4, use_multiprocessing=True, max_queue_size=3, verbose=False
    )
    model, rows = witnessed()
    model.fit(train, epochs=3, verbose=0, validation_data=dataset.sequence(batch_size=BATCH, workers=2, verbose=False))
    assert rows == [row for epoch in range(3) for row in golden(dataset, epoch, shuffle=True)]
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    train.close()
