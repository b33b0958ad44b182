"""The recipe that most people begin with: ``python build_recipe.py SOURCE OUT SIZE HELD``.

It needs nothing of h5feed. HELD is the number of images of val, and of test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder

_BUFFERED = 1000
"""Images that are collected before they are written."""


def main(source: Path, out: Path, size: int, held: int) -> None:
    """One core, image by image, as float64: read, resize, crop, collect, write; splits by scikit-learn."""
    out.mkdir()
    paths = sorted(str(path) for path in source.rglob("*.jpg"))
    labels = LabelEncoder().fit_transform([Path(path).parent.name for path in paths])
    rest, test, rest_labels, test_labels = train_test_split(
        paths, labels, test_size=held, stratify=labels, random_state=42
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=held, stratify=rest_labels, random_state=42
    )
    means: list[tuple[float, ...]] = []
    for split, own, own_labels in (
        ("train", train, train_labels),
        ("val", val, val_labels),
        ("test", test, test_labels),
    ):
        writer = _Writer(out / f"{split}.hdf5", len(own), size)
        for path, label in zip(own, own_labels, strict=True):
            image = _aspect_aware(np.asarray(cv2.imread(path), np.uint8), size)
            if split == "train":
                means.append(cv2.mean(image)[:3])
            writer.add(image, label)
        writer.close()
    blue, green, red = np.mean(means, axis=0)
    (out / "mean.json").write_text(json.dumps({"R": red, "G": green, "B": blue}))


def _aspect_aware(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The shorter side to size, then the centre."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    resized = cv2.resize(
        image, (max(size, int(width * scale)), max(size, int(height * scale))), interpolation=cv2.INTER_AREA
    )
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    cropped = resized[top : top + size, left : left + size]
    return np.asarray(cv2.resize(cropped, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


class _Writer:
    """Collects rows and writes them a thousand at a time."""

    def __init__(self, path: Path, rows: int, size: int) -> None:
        self._file = h5py.File(path, "w")
        self._images = self._file.create_dataset("images", (rows, size, size, 3), dtype="float")
        self._labels = self._file.create_dataset("labels", (rows,), dtype="int")
        self._rows: list[Any] = []
        self._own: list[int] = []
        self._at = 0

    def add(self, image: npt.NDArray[np.uint8], label: int) -> None:
        self._rows.append(image)
        self._own.append(label)
        if len(self._rows) >= _BUFFERED:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        end = self._at + len(self._rows)
        self._images[self._at : end] = self._rows
        self._labels[self._at : end] = self._own
        self._at, self._rows, self._own = end, [], []


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
