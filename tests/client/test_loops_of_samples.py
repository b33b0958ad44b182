"""Every kind of sample in every loop: what a loop hands out is what `batches` returns, on each backend.

``make test-backends`` runs this once for each backend of Keras, and with torch and TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

ROWS = 41
BATCH = 8
LENGTHS = 1 + np.arange(ROWS) * 7 % 13

Batches = list[tuple[Any, ...]]

KINDS: dict[str, dict[str, Any]] = {
    "windows": {"x": ["image", "state"], "y": "state_next", "offsets": {"image": [-1, 0], "state_next": ("state", 2)}},
    "padded windows": {"x": ["state", "state.mask"], "offsets": {"state": range(-2, 3)}, "ends": "pad"},
    "crops": {"x": "image", "y": "mask", "crop": (4, 4), "crop_fields": ["image", "mask"]},
    "joins": {"x": ["state", "captions/vector"], "join": "captions:number=number"},
    "padded lists": {"x": ["tokens", "tokens.mask"], "pad": "tokens", "max_length": 9, "truncate": "end"},
    "buckets": {"x": "tokens", "pad": "tokens", "pad_to": [8, 16], "bucket": 16},
    "packed lists": {"x": ["tokens", "segment_ids", "positions"], "pack": 32, "last": "pad"},
    "weights": {"x": "state", "weights": np.arange(ROWS) % 4},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    folder, random = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    with h5py.File(folder / "rows.h5", "w") as file:
        file["image"] = random.integers(0, 256, (ROWS, 8, 8, 3), np.uint8)
        file["mask"] = random.integers(0, 2, (ROWS, 8, 8, 1), np.uint8)
        file["state"] = random.random((ROWS, 2), np.float32)
        file["label"] = np.arange(ROWS) % 3
        file["number"] = np.arange(ROWS) * 10
        file["tokens"] = random.integers(1, 99, LENGTHS.sum(), np.int32)
        file["tokens.offsets"] = np.concatenate([[0], np.cumsum(LENGTHS)])
    with h5py.File(folder / "captions.h5", "w") as file:
        file["number"] = np.arange(ROWS)[::-1] * 10
        file["vector"] = random.random((ROWS, 5), np.float32)
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["rows"]
    assert server.stop() == 0


def _sequence(dataset: h5feed.Dataset, **options: Any) -> Callable[[], Batches]:
    sequence = dataset.sequence(verbose=False, **options)

    def one_pass() -> Batches:
        found = [sequence[index] for index in range(len(sequence))]
        sequence.on_epoch_end()
        return found

    return one_pass


def _loader(dataset: h5feed.Dataset, **options: Any) -> Callable[[], Batches]:
    loader = dataset.loader(**options)
    return lambda: list(loader)


def _torch(dataset: h5feed.Dataset, **options: Any) -> Callable[[], Batches]:
    torch = pytest.importorskip("torch")
    batches = dataset.torch(**options)
    return lambda: list(torch.utils.data.DataLoader(batches, batch_size=None))


def _torch_workers(dataset: h5feed.Dataset, **options: Any) -> Callable[[], Batches]:
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(
        dataset.torch(**options), batch_size=None, num_workers=2, persistent_workers=True
    )
    return lambda: list(loader)


def _tf_data(dataset: h5feed.Dataset, **options: Any) -> Callable[[], Batches]:
    pytest.importorskip("tensorflow")
    batches = dataset.tf_data(**options)
    return lambda: list(batches)


LOOPS = {made.__name__.strip("_"): made for made in (_sequence, _loader, _torch, _torch_workers, _tf_data)}


def _flat(value: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays of a batch, in order; names and nesting left out."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [array for one in value.values() for array in _flat(one)]
    if isinstance(value, (tuple, list)):
        return [array for one in value for array in _flat(one)]
    return [np.array(keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_loops_hand_out_what_batches_returns(dataset: h5feed.Dataset, kind: str, loop: str) -> None:
    """Two passes, shuffled: the same arrays in the same order."""
    options = {"y": [], "batch_size": BATCH, "shuffle": True, "seed": 3, **KINDS[kind]}
    one_pass = LOOPS[loop](dataset, **options)
    names = [name for part in (options["x"], options["y"]) for name in ([part] if isinstance(part, str) else part)]
    made_here = {"segment_ids", "positions"}
    fields = [name for name in names if name not in made_here and not name.endswith(".mask")]
    order = {name: value for name, value in options.items() if name not in ("x", "y")}
    for epoch in range(2):
        expected = [
            [batch[name] for name in names] + ([] if batch.weight is None else [batch.weight])
            for batch in dataset.batches(fields=fields, epoch=epoch, **order)
        ]
        found = [_flat(batch) for batch in one_pass()]
        assert len(found) == len(expected) > 1
        for arrays, wanted in zip(found, expected, strict=True):
            assert len(arrays) == len(wanted)
            for array, one in zip(arrays, wanted, strict=True):
                assert array.dtype == one.dtype and np.array_equal(array, one)


def test_a_model_trains_on_a_mixture(dataset: h5feed.Dataset) -> None:
    """Of windows, on the backend of this run, and in the order of the mixture."""
    mixture = h5feed.mix({"a": dataset, "b": dataset}, weights=[3, 1])
    train = mixture.sequence(
        x="state", y="label", offsets={"state": range(3)}, batch_size=BATCH, shuffle=True, verbose=False
    )
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(train, epochs=2, verbose=0).history["loss"]
    assert len(history) == 2 and np.isfinite(history).all()
