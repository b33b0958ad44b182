"""Targets that are pictures, and data sets without a label, under real Keras (JAX backend) and a real server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

ROWS = 24

random = np.random.default_rng(7)

IMAGES = random.random((ROWS, 8, 8, 3)).astype("<f4")
MASKS = random.integers(0, 4, (ROWS, 8, 8), dtype=np.uint8)
SMALL = random.random((ROWS, 1, 11, 11)).astype("<f4")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("targets")
    with h5py.File(folder / "segmentation.h5", "w") as file:
        file["image"], file["mask"] = IMAGES, MASKS
    with h5py.File(folder / "super_resolution.h5", "w") as file:
        file["data"], file["label"] = SMALL, 2 * SMALL
    with h5py.File(folder / "robot.h5", "w") as file:
        file["image"], file["actions"] = IMAGES, random.random((ROWS, 7))
    with h5py.File(folder / "passengers.h5", "w") as file:
        kind = np.dtype([("age", "<i8"), ("fare", "<f8", (2,)), ("survived", "<i8")])
        file["features"] = random.random((ROWS, 5))
        file["table"] = np.zeros(ROWS, kind)
    with h5py.File(folder / "tasks.h5", "w") as file:
        file["x"], file["fine_labels"] = random.random((ROWS, 5)), np.arange(ROWS) % 6
        file["coarse_labels"] = np.arange(ROWS) % 2
    for name, types in (("odd_label", ("f8", "i8", "f8", "f8")), ("odd_input", ("i8", "i8", "u1", "f8"))):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for number, place in enumerate(("train/y", "test/y", "train/x", "test/x")):
                shape = (ROWS, 3) if place.endswith("x") else ROWS
                file[place] = np.ones(shape, types[number])
    return serve_module(folder)


def _fitted(model: Any, sequence: Any) -> Any:
    return model.fit(sequence, epochs=2, verbose=0).history["loss"]


def test_segmentation(feed: h5feed.Feed) -> None:
    """Masks are the targets as they are stored, and a model learns them class by pixel."""
    train = feed["segmentation"].sequence(batch_size=8, verbose=False)
    x, y = train[0]
    np.testing.assert_array_equal(x, IMAGES[:8])
    np.testing.assert_array_equal(y, MASKS[:8])
    assert y.dtype == np.uint8
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 1, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    assert np.isfinite(_fitted(model, train)).all()


def test_super_resolution(feed: h5feed.Feed) -> None:
    """data and label of one shape: the label is the target."""
    train = feed["super_resolution"].sequence(batch_size=8, verbose=False)
    x, y = train[0]
    np.testing.assert_array_equal(y, 2 * x)
    model = keras.Sequential([keras.Input((1, 11, 11)), keras.layers.Conv2D(11, 3, padding="same")])
    model.compile("adam", "mse")
    assert np.isfinite(_fitted(model, train)).all()


def test_pictures_are_no_classes(feed: h5feed.Feed, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed counts no classes of masks, and class modes that need some say what to take."""
    feed["segmentation"].sequence(batch_size=8)
    assert capsys.readouterr().out == "Found 24 images.\n"
    with pytest.raises(h5feed.errors.BadParameter, match="class_mode='raw'"):
        feed["segmentation"].sequence(class_mode="categorical", verbose=False)


def test_no_label_is_said(feed: h5feed.Feed, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no field says that it is the label, it is said, with what could be one and how to name it."""
    dataset = feed["passengers"]
    assert len(dataset.sequence(batch_size=8)[0]) == 1
    said = capsys.readouterr().out
    assert "Found 24 rows, but 'passengers' has no label field" in said
    assert "y='table.survived'" in said and 'roles = { "table.age" = "label" }' in said
    assert said.endswith(" if this is intended.\n")
    wanted: dict[str, Any]
    for wanted in ({"y": []}, {"class_mode": None}, {"class_mode": "input"}, {"y": "table.survived"}):
        dataset.sequence(batch_size=8, **wanted)
        assert "no field" not in capsys.readouterr().out


def test_an_input_may_become_the_target(feed: h5feed.Feed, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two inputs, the one that was not chosen can be the target."""
    feed["robot"].sequence(batch_size=8, x="image")
    assert "choose one with y='actions'" in capsys.readouterr().out


def test_two_labels_are_said(feed: h5feed.Feed, capsys: pytest.CaptureFixture[str]) -> None:
    """Where y is a dict, the line that says what was found names its fields."""
    train = feed["tasks"].sequence(batch_size=8)
    assert sorted(train[0][1]) == ["coarse_labels", "fine_labels"]
    assert "with 2 labels ('coarse_labels', 'fine_labels')" in capsys.readouterr().out
    feed["tasks"].sequence(batch_size=8, y="fine_labels")
    assert capsys.readouterr().out.startswith("Found 24 rows belonging to 6 classes")


def test_fields_that_cannot_be_served_are_said(feed: h5feed.Feed, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the label or the input is refused, it is named with the reason, by whatever way it is asked for."""
    feed["odd_label"].sequence("train", batch_size=8)
    said = capsys.readouterr().out
    assert "the label field of 'odd_label' cannot be served ('y': its pieces differ: float64[], int64[]" in said
    with pytest.raises(h5feed.errors.BadParameter, match=r"no input field.*'x': its pieces differ"):
        feed["odd_input"].sequence("train", batch_size=8)
    for options in ({"y": "y"}, {"x": "y", "y": []}):
        with pytest.raises(h5feed.errors.UnsupportedField, match=r"'y'.*its pieces differ"):
            feed["odd_label"].sequence("train", batch_size=8, **options)
