"""A Keras whose inside is another than ours: renamed, or dealing the batches of an epoch to several processes.

``make test-backends`` runs this once for each backend.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.errors import FeedError
from h5feed.keras import StateBackup, internals
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

from tests.support.recording_model import identity, witnessed
from tests.support.server_process import ServerProcess

ROWS, BATCH = 43, 4
SECONDS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """Serves `ids`, whose input is the row's own id."""
    folder = tmp_path_factory.mktemp("ids")
    with h5py.File(folder / "ids.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype=np.float32)[:, None] + np.array([[0.0, 0.0]], np.float32)
        file["y"] = np.arange(ROWS) % 3
    return serve_module(folder)


@pytest.fixture
def dataset(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["ids"]


RENAMING = """
import importlib.abc, importlib.machinery, json, re, sys
url, names = sys.argv[1], json.loads(sys.argv[2])

class Renaming(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_source(fullname)
        for old, new in names.items():
            source = re.sub(old, new, source)
        return compile(source, self.path, "exec")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if not name.startswith(("keras.src.trainers", "keras.src.backend.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = Renaming(spec.loader.name, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder())
import h5feed, h5feed.keras, keras
import numpy as np
from tests.support.recording_model import identity, rows_of, witnessed

train = h5feed.connect(url, deadline=60)["ids"].sequence(batch_size=4, shuffle=True, verbose=False)
model = identity()
told = {"row_ids": train.row_ids.tolist(), "refused": ""}
told["predicted"] = [model.predict(train, verbose=0)[:, 0].astype(int).tolist() for _ in range(2)]
told["loss"] = model.evaluate(train, verbose=0)
told["look"] = [rows_of(train[index]) for index in (3, -1)]
model, rows = witnessed()
try:
    model.fit(train, epochs=2, verbose=0)
except h5feed.FeedError as error:
    told["refused"] = str(error)
told["trained"] = rows
print(json.dumps(told))
"""

PRIVATE = (
    *("_finite_generator", "_infinite_generator", "_get_iterator", "_standardize_batch", "_within_epoch"),
    *("_symbolic_build", "_maybe_symbolic_build", "_enumerate_iterator", "py_dataset", "_current_iterator"),
)


@pytest.mark.parametrize(
    ("names", "trains"),
    [
        pytest.param({rf"\b{name}\b": f"another{name}" for name in PRIVATE}, True, id="what we do not need"),
        pytest.param({r"\b_num_batches\b": "_batch_count"}, False, id="what training needs"),
        pytest.param(
            {r"\bself\.py_dataset\.workers\b": "1", r"\bself\.py_dataset\.use_multiprocessing\b": "False"},
            False,
            id="what the adapter asks",
            marks=pytest.mark.slow,
        ),
        pytest.param({r"\bEpochIterator\b": "IteratorOfEpochs"}, False, id="a class", marks=pytest.mark.slow),
    ],
)
def test_renamed(server: ServerProcess, dataset: h5feed.Dataset, names: dict[str, str], trains: bool) -> None:
    """Predictions are aligned and looks are right whatever has another name; training is right too, or refused."""
    command = [sys.executable, "-c", RENAMING, server.url, json.dumps(names)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    golden = [[b.rows.tolist() for b in dataset.batches(batch_size=BATCH, shuffle=True, epoch=e)] for e in range(2)]
    assert told["row_ids"] == list(range(ROWS)) and told["predicted"] == [told["row_ids"]] * 2
    assert told["look"] == [golden[0][3], golden[0][-1]]
    if trains:
        assert told["trained"] == [row for batches in golden for batch in batches for row in batch]
    else:
        assert "this h5feed cannot train with Keras" in told["refused"] and not told["trained"]
        assert "pip install 'keras>=" in told["refused"] and "evaluate() and predict() work" in told["refused"]


def test_this_keras_is_known() -> None:
    """There is nothing to refuse."""
    assert internals.FAULT == ""


def dealing(rank: int, ranks: int, in_halves: bool, tells: bool) -> type:
    """An adapter that deals the batches of an epoch to ranks, each of which draws them in the same order."""

    class Dealing(PyDatasetAdapter):  # type: ignore[misc]
        epochs = 0

        def _finite_generator(self) -> Iterator[Any]:
            indices = list(range(self.py_dataset.num_batches))
            if self.shuffle:
                random.Random(self.epochs).shuffle(indices)
            half = -(-len(indices) // ranks)
            dealt = indices[rank * half :][:half] if in_halves else indices[rank::ranks]
            for index in dealt:
                yield self._standardize_batch(self.py_dataset[index])

        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            self.epochs += 1

        @property
        def num_batches(self) -> int:
            batches: int = self.py_dataset.num_batches
            return -(-(batches - rank) // ranks) if tells else batches

    return Dealing


@pytest.mark.sampled(1)
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize(
    ("shuffle", "in_halves", "tells"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_dealt_batches(
    dataset: h5feed.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shuffle: bool,
    permuted: bool,
    in_halves: bool,
    tells: bool,
) -> None:
    """However Keras deals the batches of an epoch to two ranks: each row once over both, epoch after epoch."""
    seen: list[list[list[int]]] = []
    for rank in range(2):
        monkeypatch.setattr(data_adapters, "PyDatasetAdapter", dealing(rank, 2, in_halves, tells))
        train = dataset.sequence(batch_size=BATCH, shuffle=shuffle, verbose=False)
        model, rows = witnessed()
        epochs: list[list[int]] = []

        class Cut(keras.callbacks.Callback):  # type: ignore[misc]
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                epochs.append(rows.copy())  # noqa: B023
                rows.clear()  # noqa: B023

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model.fit(train, epochs=3, verbose=0, shuffle=permuted, callbacks=[Cut()])
        assert any("Set auto_shard_dataset=False" in str(one.message) for one in warned)
        assert train.epoch == 3
        seen.append(epochs)
        with pytest.raises(FeedError, match="auto_shard_dataset=False"):
            model.fit(train, epochs=1, verbose=0, callbacks=[StateBackup(train, tmp_path / "feed.json", 2)])
        train.close()
    for epoch in range(3):
        ranks = [epochs[epoch] for epochs in seen]
        assert sorted(itertools.chain(*ranks)) == list(range(ROWS))
        # Of ranks that are dealt halves in turn, neither has all of the beginning.
        golden = [b.rows.tolist() for b in dataset.batches(batch_size=BATCH, shuffle=shuffle, epoch=epoch)]
        taken = [ranks[0][start : start + BATCH] for start in range(0, len(ranks[0]), BATCH)]
        if not permuted and not in_halves:
            assert taken == golden[::2]


def test_shards_are_not_dealt_again(dataset: h5feed.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the batches of a shard would be half of the rows: that is refused."""
    monkeypatch.setattr(data_adapters, "PyDatasetAdapter", dealing(0, 2, False, True))
    train = dataset.sequence(batch_size=BATCH, shuffle=True, shard=0, shards=2, verbose=False)
    model, rows = witnessed()
    with pytest.raises(FeedError, match=r"sharded twice. Set auto_shard_dataset=False"):
        model.fit(train, epochs=1, verbose=0)
    assert not rows
    train.close()


def test_the_state_of_chance_is_left_alone(dataset: h5feed.Dataset) -> None:
    """Trying out what an adapter asks for draws nothing from the generator that Keras shuffles with."""
    test = dataset.sequence(batch_size=BATCH, verbose=False)
    random.seed(3)
    expected = random.getstate()
    identity().predict(test, verbose=0)
    assert random.getstate() == expected
    test.close()
