"""Building train.hdf5, val.hdf5 and test.hdf5 of JPEGs, against the recipe that most people begin with."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import h5feed
import h5py
import numpy as np
import numpy.typing as npt
from h5feed_server.builder import BuildOptions, build
from sklearn.datasets import load_sample_images
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder

from .data import Files
from .measure import Figure, Rates

IMAGES = 3000
"""JPEGs of 500×375, quality 90: parts of scikit-learn's two photographs, brightened and mirrored differently."""

SIZE = 256
_HELD = IMAGES // 10
_QUALITY = 90
_BUFFERED = 1000
"""Images that the recipe collects before it writes them."""

_ROUNDS = 1
"""The recipe writes 4.7 GB a round."""

_MEAN_LEVELS = 1.0
"""By how much channel means may differ: both resize in their own way."""

FIGURES = (
    Figure("build_vs_recipe", {"all cores": "ours"}, {"all cores": "recipe"}, 4.0),
    Figure("build_files_smaller_than_recipe", {"uint8": "our bytes"}, {"uint8": "recipe's bytes"}, 1 / 0.13),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Images per second of both; and the reciprocals of the bytes of their files."""
    rates: dict[str, list[float]] = {name: [] for name in ("ours", "recipe", "our bytes", "recipe's bytes")}
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder) as name:
        source = Path(name) / "pets"
        mean = _make_images(source)
        print(f"           {IMAGES} JPEGs of {mean:,.0f} bytes on average", flush=True)
        for _ in range(min(rounds, _ROUNDS)):
            recipe, ours = Path(name) / "recipe", Path(name) / "ours"
            # What is still to be written back would be written while we measure.
            os.sync()
            began = time.perf_counter()
            _recipe(source, recipe)
            rates["recipe"].append(IMAGES / (time.perf_counter() - began))
            os.sync()
            began = time.perf_counter()
            options = BuildOptions(
                (SIZE, SIZE), val=_HELD, test=_HELD, split_files=True, mean_json=Path(name) / "mean.json"
            )
            build(source, ours, options)
            rates["ours"].append(IMAGES / (time.perf_counter() - began))
            rates["recipe's bytes"].append(1 / _bytes(recipe))
            rates["our bytes"].append(1 / _bytes(ours))
            _check(recipe, ours, Path(name) / "mean.json")
            shutil.rmtree(recipe)
            shutil.rmtree(ours)
    return rates


def _make_images(source: Path) -> float:
    """Write the JPEGs of two classes; returns their bytes in the mean."""
    photographs = [np.ascontiguousarray(image[..., ::-1]) for image in load_sample_images().images]

    def write(number: int) -> int:
        random = np.random.default_rng(number)
        whole = photographs[number % 2]
        top, left = random.integers(0, whole.shape[0] - 375), random.integers(0, whole.shape[1] - 500)
        image = whole[top : top + 375, left : left + 500]
        image = cv2.convertScaleAbs(image[:, ::-1] if number % 4 > 1 else image, alpha=random.uniform(0.7, 1.1))
        file = source / ("cat", "dog")[number % 2] / f"{number:05d}.jpg"
        cv2.imwrite(str(file), image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        return file.stat().st_size

    for label in ("cat", "dog"):
        (source / label).mkdir(parents=True)
    with ThreadPoolExecutor() as threads:
        return float(np.mean(list(threads.map(write, range(IMAGES)))))


def _recipe(source: Path, out: Path) -> None:
    """One core, image by image, as float64: read, resize, crop, collect, write; splits by scikit-learn."""
    out.mkdir()
    paths = sorted(str(path) for path in source.rglob("*.jpg"))
    labels = LabelEncoder().fit_transform([Path(path).parent.name for path in paths])
    rest, test, rest_labels, test_labels = train_test_split(
        paths, labels, test_size=_HELD, stratify=labels, random_state=42
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=_HELD, stratify=rest_labels, random_state=42
    )
    means: list[tuple[float, ...]] = []
    for split, own, own_labels in (
        ("train", train, train_labels),
        ("val", val, val_labels),
        ("test", test, test_labels),
    ):
        writer = _Writer(out / f"{split}.hdf5", len(own))
        for path, label in zip(own, own_labels, strict=True):
            image = _aspect_aware(np.asarray(cv2.imread(path), np.uint8))
            if split == "train":
                means.append(cv2.mean(image)[:3])
            writer.add(image, label)
        writer.close()
    blue, green, red = np.mean(means, axis=0)
    (out / "mean.json").write_text(json.dumps({"R": red, "G": green, "B": blue}))


def _aspect_aware(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The shorter side to size, then the centre."""
    height, width = image.shape[:2]
    scale = SIZE / min(height, width)
    resized = cv2.resize(
        image, (max(SIZE, int(width * scale)), max(SIZE, int(height * scale))), interpolation=cv2.INTER_AREA
    )
    top, left = (resized.shape[0] - SIZE) // 2, (resized.shape[1] - SIZE) // 2
    cropped = resized[top : top + SIZE, left : left + SIZE]
    return np.asarray(cv2.resize(cropped, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)


class _Writer:
    """Collects rows and writes them a thousand at a time."""

    def __init__(self, path: Path, rows: int) -> None:
        self._file = h5py.File(path, "w")
        self._images = self._file.create_dataset("images", (rows, SIZE, SIZE, 3), dtype="float")
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


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.hdf5"))


def _check(recipe: Path, ours: Path, mean_json: Path) -> None:
    """As many rows of each class in every split, and means that agree."""
    for split in ("train", "val", "test"):
        with h5py.File(recipe / f"{split}.hdf5") as theirs, h5py.File(ours / f"{split}.hdf5") as own:
            assert theirs["images"].shape == own["images"].shape
            np.testing.assert_array_equal(np.bincount(theirs["labels"][:]), np.bincount(own["labels"][:]))
    theirs_of, own_of = json.loads((recipe / "mean.json").read_text()), json.loads(mean_json.read_text())
    for key in "RGB":
        assert abs(theirs_of[key] - own_of[key]) < _MEAN_LEVELS, f"means of {key} differ: {theirs_of} and {own_of}"
