"""Building train.hdf5, val.hdf5 and test.hdf5 of JPEGs, against the recipe that most people begin with.

Both are commands, from the start of the process to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import h5feed
import h5py
import numpy as np
from sklearn.datasets import load_sample_images

from .data import Files
from .measure import Figure, Rates

IMAGES = 3000
"""JPEGs of 500×375, quality 90: parts of scikit-learn's two photographs, brightened and mirrored differently."""

SIZE = 256
_HELD = IMAGES // 10
_QUALITY = 90
_ROUNDS = 3
"""The recipe writes 4.7 GB a round."""

_MEAN_LEVELS = 1.0
"""By how much channel means may differ: both resize in their own way."""

FIGURES = (
    Figure("build_vs_recipe", {"all cores": "ours"}, {"all cores": "recipe"}, 6.0),
    Figure("build_files_smaller_than_recipe", {"uint8": "our bytes"}, {"uint8": "recipe's bytes"}, 1 / 0.13),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Images per second of both; and the reciprocals of the bytes of their files."""
    rates: dict[str, list[float]] = {name: [] for name in ("ours", "recipe", "our bytes", "recipe's bytes")}
    # Not in the folder of the others, whose servers would inspect and hash all that is built.
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent) as name:
        source = Path(name) / "pets"
        mean = _make_images(source)
        print(f"           {IMAGES} JPEGs of {mean:,.0f} bytes on average", flush=True)
        for _ in range(min(rounds, _ROUNDS)):
            recipe, ours = Path(name) / "recipe", Path(name) / "ours"
            held = str(_HELD)
            program = str(Path(__file__).with_name("build_recipe.py"))
            rates["recipe"].append(_rate([program, str(source), str(recipe), str(SIZE), held]))
            splits = ["--val", held, "--test", held, "--split-files", "--mean-json", str(Path(name) / "mean.json")]
            command = ["-m", "h5feed_server.cli", "build", str(source), "-o", str(ours), "--size", str(SIZE), *splits]
            rates["ours"].append(_rate(command))
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


def _rate(command: list[str]) -> float:
    """Images per second of a Python program."""
    # What is still to be written back would be written while we measure.
    os.sync()
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return IMAGES / (time.perf_counter() - began)


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
