"""The guide from ImageDataGenerator is run, block by block."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5py
import keras
import numpy as np
import pytest
from conftest import ServerProcess

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "from-imagedatagenerator.md"
NAMES = ["cat", "dog", "fox"]


def make_model(classes: int, loss: str = "categorical_crossentropy") -> Any:
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax")]
    )
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def test_the_guide(
    serve: Callable[..., ServerProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every block, from the top to the bottom, over the same pictures as files and as HDF5."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(150) % 3)
    # Kinds differ in their brightness.
    images = (random.integers(0, 60, (150, 32, 32, 3)) + 90 * labels[:, None, None, None]).astype(np.uint8)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "photos" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(tmp_path / "photos" / NAMES[label] / f"{row:03}.png", image, scale=False)
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "photos.h5", tmp_path / "data" / "photos.h5"):
        with h5py.File(path, "w") as file:
            file["images"], file["labels"] = images, labels
            file["labels"].attrs["class_names"] = NAMES
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("H5FEED_URL", serve(tmp_path / "data").url)
    namespace: dict[str, Any] = {"__name__": "guide", "keras": keras, "make_model": make_model}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(compile(block, f"{GUIDE.name}: {block.splitlines()[0]}", "exec"), namespace)
    assert namespace["train"].class_indices == {"cat": 0, "dog": 1, "fox": 2}
    assert sorted({*namespace["train"].row_ids} & {*namespace["val"].row_ids}) == []
    printed = capfd.readouterr().out
    assert "Found 135 images belonging to 3 classes." in printed  # of the generator
    assert "Found 120 images belonging to 3 classes (as one-hot rows)." in printed
    assert len(namespace["wrong"]) < 15
    assert not Path("backup").exists()
    namespace["train"].close()
    namespace["photos"]._client.close()
