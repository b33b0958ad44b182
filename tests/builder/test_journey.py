"""From a folder of JPEGs to a trained model, over HTTP, and the same without a server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5feed
import keras
import numpy as np
import pytest
from h5feed_server.builder import BuildOptions, ImageSpec, build, decode_image
from sklearn.model_selection import train_test_split

SIZE, BATCH, EPOCHS = (32, 32), 16, 3


def _augmented(x: Any, y: Any) -> tuple[Any, Any]:
    """Mirrored and shifted in brightness, by numbers that the pixels themselves seed."""
    seed = hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(seed, "little"))
    flipped = random.random(len(x)) < 0.5
    x = np.where(flipped[:, None, None, None], x[:, :, ::-1], x) / np.float32(255)
    return x + random.normal(0, 0.05, (len(x), 1, 1, 1)).astype(np.float32), y


class _Local(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of images that are decoded where the model is trained, in an order that is given."""

    def __init__(self, files: list[Path], labels: Any, orders: list[list[Any]]) -> None:
        super().__init__()
        self._files, self._labels, self._orders = files, labels, orders
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._orders[0])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = self._orders[self.epoch][index]
        return _augmented(_decoded(self._files, rows), self._labels[rows])


def _decoded(files: list[Path], rows: Any) -> Any:
    return np.stack([decode_image(files[row].read_bytes(), ImageSpec(SIZE)).pixels for row in rows])


def _model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((*SIZE, 3)),
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.timeout(300)
def test_from_a_folder_of_jpegs_to_a_trained_model(pets: Path, tmp_path: Path, serve: Any) -> None:
    """Batches are identical to those of local loading through the same decoder, and so are the curves of the loss."""
    build(pets, tmp_path / "data" / "pets.h5", BuildOptions(SIZE, val=24, test=24))
    files = sorted(pets.rglob("*.jpg"))
    classes = sorted({file.parent.name for file in files})
    labels = np.array([classes.index(file.parent.name) for file in files])
    rest, test = train_test_split(np.arange(120), test_size=24, stratify=labels, random_state=42)
    train, val = (
        np.sort(rows) for rows in train_test_split(rest, test_size=24, stratify=labels[rest], random_state=42)
    )
    test = np.sort(test)
    # Rows of the file, in its order, to the images of the folder.
    image_of = np.concatenate([train, val, test])
    shuffled: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "seed": 5}
    plain: dict[str, Any] = {"batch_size": BATCH, "rescale": 1 / 255}
    orders: list[list[Any]] = []
    with h5feed.connect(serve(tmp_path / "data").url, deadline=60) as feed:
        served = feed["pets"]
        assert served.class_names == classes
        for epoch in range(EPOCHS):
            orders.append([])
            for batch in served.batches("train", epoch=epoch, **shuffled):
                orders[-1].append(image_of[batch.rows])
                np.testing.assert_array_equal(batch["images"], _decoded(files, orders[-1][-1]))
                np.testing.assert_array_equal(batch["labels"], labels[orders[-1][-1]])
            assert sorted(np.concatenate(orders[-1])) == train.tolist()
        model = _model()
        weights = model.get_weights()
        sequence = served.sequence("train", transform=_augmented, **shuffled)
        told = model.fit(sequence, validation_data=served.sequence("val", **plain), epochs=EPOCHS, verbose=0).history
        scores = model.evaluate(served.sequence("test", **plain), verbose=0)
        predictions = model.predict(served.sequence("test", **plain), verbose=0)
        sequence.close()
    twin, local = _model(), _Local(files, labels, orders)
    twin.set_weights(weights)
    held, unseen = (_decoded(files, rows) * np.float32(1 / 255) for rows in (val, test))
    for epoch in range(EPOCHS):
        local.epoch = epoch
        own = twin.fit(
            local, validation_data=(held, labels[val]), validation_batch_size=BATCH, shuffle=False, verbose=0
        ).history
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            np.testing.assert_allclose(own[name][0], told[name][epoch], rtol=1e-5, err_msg=f"{name} of epoch {epoch}")
    np.testing.assert_allclose(scores, twin.evaluate(unseen, labels[test], batch_size=BATCH, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(predictions, twin.predict(unseen, batch_size=BATCH, verbose=0), rtol=1e-4)
