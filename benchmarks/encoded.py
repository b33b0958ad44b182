"""Shuffled batches of images that are stored as JPEG, against Keras' own loader over the same JPEGs in a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import h5feed
import httpx
import numpy as np
from h5feed_server.builder import BuildOptions, build
from sklearn.datasets import load_sample_images

from .data import Files
from .measure import Figure, Rates, Turn, take_turns
from .served import WORKERS
from .servers import h5feed_server

IMAGES = 3000
"""JPEGs of 500×375 pixels, quality 90, of two classes: parts of scikit-learn's two photographs, enlarged four times, so
that they weigh about what photographs of that size on the web do."""

SIDE = 224
BATCH = 64
_QUALITY = 90

_RECIPE_ROW = 256 * 256 * 3 * 8 + 8
"""Bytes that the usual recipe writes for an image and its label: 256×256 pixels as float64."""

_PYTHONS = (Path(sys.executable), Path(__file__).parent.parent / ".venv-backends" / "bin" / "python")
"""Where TensorFlow may be; ``make test-backends`` puts it into the second one."""

FIGURES = (
    Figure("encoded_vs_keras_directory", {name: name for name in WORKERS}, dict.fromkeys(WORKERS, "keras"), 2.5),
    Figure("encoded_nothing_kept_vs_keras", {"1 worker": "nothing kept"}, {"1 worker": "keras"}, 1.2),
    Figure("encoded_wire_raw_vs_jpeg", {"1 worker": "jpeg bytes"}, {"1 worker": "raw bytes"}, 5.0),
    Figure("encoded_file_recipe_vs_jpeg", {"1 worker": "file bytes"}, {"1 worker": "recipe's bytes"}, 60.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Images per second of every contestant; and the reciprocals of bytes."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent)))
        mean = make_images(folder / "jpegs")
        print(f"           {IMAGES} JPEGs of {mean:,.0f} bytes on average", flush=True)
        served = folder / "served"
        build(folder / "jpegs", served / "jpegs.h5", BuildOptions((SIDE, SIDE), store="encoded"))
        contestants: dict[str, Turn] = {}
        for variant, workers in WORKERS.items():
            server = stack.enter_context(h5feed_server(served, workers))
            contestants[variant] = _turn(stack.enter_context(h5feed.connect(server.url, local=False))["jpegs"])
        bare = stack.enter_context(h5feed_server(served, 1, H5FEED_CHUNK_CACHE_BYTES="0"))
        contestants["nothing kept"] = _turn(stack.enter_context(h5feed.connect(bare.url, local=False))["jpegs"])
        python = next((python for python in _PYTHONS if _has_tensorflow(python)), None)
        if python is None:
            print(
                "           Keras' loader is skipped: it needs TensorFlow, which `make test-backends` installs",
                flush=True,
            )
        else:
            contestants["keras"] = stack.enter_context(_keras(python, folder / "jpegs"))
        rates = dict(take_turns(contestants, rounds))
        url = f"{server.url}/v1/datasets/jpegs/batches/0?batch_size={BATCH}&shuffle=true"
        sizes = {
            "raw bytes": len(httpx.get(url).content),
            "jpeg bytes": len(httpx.get(f"{url}&encoded=images").content),
            "file bytes": (served / "jpegs.h5").stat().st_size,
            "recipe's bytes": IMAGES * _RECIPE_ROW,
        }
        return {**rates, **{name: [1 / size] for name, size in sizes.items()}}


def _turn(dataset: h5feed.Dataset) -> Turn:
    epochs = iter(range(1 << 30))

    def turn() -> int:
        batches = dataset.batches(batch_size=BATCH, shuffle=True, epoch=next(epochs))
        return sum(len(batch["images"]) for batch in batches)

    return turn


@contextlib.contextmanager
def _keras(python: Path, folder: Path) -> Iterator[Turn]:
    command = [str(python), str(Path(__file__).with_name("keras_directory.py")), str(folder), str(SIDE), str(BATCH)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def turn() -> int:
        asked.write("\n")
        asked.flush()
        return int(answers.readline())

    try:
        yield turn
    finally:
        process.kill()
        process.wait()
        asked.close()
        answers.close()


def _has_tensorflow(python: Path) -> bool:
    if python == Path(sys.executable):
        return importlib.util.find_spec("tensorflow") is not None
    return any(python.parent.parent.glob("lib/python*/site-packages/tensorflow"))


def make_images(folder: Path) -> float:
    """Write the JPEGs; returns their bytes in the mean."""
    photographs = load_sample_images().images
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)

    def write(number: int) -> int:
        random = np.random.default_rng(number)
        whole = photographs[number % 2]
        top, left = random.integers(0, whole.shape[0] - 94), random.integers(0, whole.shape[1] - 125)
        image = cv2.resize(whole[top : top + 94, left : left + 125], (500, 375), interpolation=cv2.INTER_CUBIC)
        file = folder / ("cat", "dog")[number % 2] / f"{number:05d}.jpg"
        cv2.imwrite(str(file), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        return file.stat().st_size

    with ThreadPoolExecutor() as threads:
        return float(np.mean(list(threads.map(write, range(IMAGES)))))
