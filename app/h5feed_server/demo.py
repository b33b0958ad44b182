"""The demo: real handwritten digits, packed into HDF5, served, and learned by a Keras model over HTTP."""

from __future__ import annotations

import contextlib
import filecmp
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
from h5feed.errors import ConnectionFailed

START_SECONDS = 60.0
"""How long the server may take to start."""

TARGET_ACCURACY = 0.95
TARGET_EPOCHS = 8
"""After so many epochs, the default, the test accuracy is at least `TARGET_ACCURACY`. After fewer, it may be lower."""

SPLITS: dict[str, Any] = {"val": 0.1, "test": 0.1}
_BATCH = 64


def pack_digits(path: Path) -> int:
    """Write scikit-learn's 1,797 handwritten digits (8×8 grey, UCI "Optical Recognition of Handwritten Digits") as
    an HDF5 file laid out for training; returns the rows."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    digits = load_digits()
    # (1797, 8, 8) float of 0 … 16 → (1797, 8, 8, 1) uint8 of 0 … 255, as images are
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[..., None]
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images)
        labels = file.create_dataset("labels", data=digits.target.astype(np.int64))
        labels.attrs["class_names"] = [str(name) for name in digits.target_names]
    return len(images)


@contextlib.contextmanager
def served(folder: Path, *, workers: int = 1, port: int = 0, cache_dir: Path | None = None) -> Iterator[str]:
    """A real server process over `folder`; yields its address and ends it.

    Raises
    ------
    ConnectionFailed
        It did not start within `START_SECONDS`.
    """
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(folder), "--port", str(port)]
    command += ["--workers", str(workers)]
    if cache_dir is not None:
        command += ["--cache-dir", str(cache_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if " at " not in line:
            raise ConnectionFailed(f"the server did not start within {START_SECONDS:g} s")
        yield line.rsplit(" at ", 1)[1].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _missing(error: ModuleNotFoundError) -> h5feed.FeedError:
    return h5feed.FeedError(f"the demo needs {error.name}: pip install 'h5feed-server[demo]'")


def run_demo(epochs: int, workers: int, keep: Path | None = None) -> int:
    """Pack, serve, train, report; returns the exit code: 1 where the test accuracy should have reached the target.

    The packed file stays in the folder `keep`, if there is one.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="h5feed-demo-") as name:
        folder = Path(name)
        rows = pack_digits(folder / "digits.h5")
        kept = Path("digits.h5") if keep is None else keep_file(folder / "digits.h5", keep)
        print(f"packed {rows:,} real handwritten digits into {kept}")
        with served(folder, workers=workers, cache_dir=folder / "cache") as url:
            print(f"serving it at {url}")
            accuracy = train(url, epochs)
    print(f"done in {time.monotonic() - began:.0f} s")
    print(f"next: h5feed-server serve {keep or 'FOLDER'}, then browse http://127.0.0.1:8000/")
    if is_too_low(accuracy, epochs):
        print(f"test accuracy is below {TARGET_ACCURACY}: something is wrong", file=sys.stderr)
        return 1
    return 0


def is_too_low(accuracy: float, epochs: int) -> bool:
    """Whether something is wrong if the test accuracy is this after so many epochs."""
    return epochs >= TARGET_EPOCHS and accuracy < TARGET_ACCURACY


def keep_file(packed: Path, folder: Path) -> Path:
    """Copy the packed file into `folder`, unless a file of that name is there, which stays; returns its path.

    Raises
    ------
    FeedError
        The folder cannot be written to.
    """
    path = folder / packed.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not filecmp.cmp(path, packed, shallow=False):
                print(f"{path} exists, but is not from this demo: it is not replaced", file=sys.stderr)
            return path
        # Whole or not there, for a server may be looking at that folder.
        whole = folder / f".{packed.name}.{os.getpid()}"
        shutil.copyfile(packed, whole)
        whole.replace(path)
    except OSError as error:
        raise h5feed.FeedError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def train(url: str, epochs: int) -> float:
    """Train on the digits that a server has; returns the accuracy on the test split."""
    try:
        import keras
    except ModuleNotFoundError as error:
        raise _missing(error) from None

    with h5feed.connect(url) as feed:
        digits = feed["digits"]
        train = digits.sequence("train", batch_size=_BATCH, shuffle=True, seed=1, verbose=False, **SPLITS)
        val = digits.sequence("val", batch_size=_BATCH, verbose=False, **SPLITS)
        test = digits.sequence("test", batch_size=_BATCH, verbose=False, **SPLITS)
        print(f"stratified splits: {train.samples} train, {val.samples} val, {test.samples} test")
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input(digits.fields["images"].shape),
                keras.layers.Rescaling(1 / 255),
                keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(),
                keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
        print(f"training a small CNN on the {keras.backend.backend()} backend, every batch over HTTP")
        began = time.monotonic()
        model.fit(train, validation_data=val, epochs=epochs)
        seconds = time.monotonic() - began
        waited = train.waited + val.waited
        _, accuracy = model.evaluate(test, verbose=0)
        images = epochs * (train.samples + val.samples)
        print(f"test accuracy   {accuracy:.3f}")
        print(f"images/s        {images / seconds:,.0f}")
        print(f"waited for data {waited / seconds:.1%} of the time ({waited:.2f} s of {seconds:.1f} s)")
        for sequence in (train, val, test):
            sequence.close()
    return float(accuracy)


def _in_containers(arguments: list[str]) -> int:
    """``pack FOLDER`` or ``train URL``: the two halves of the demo, which docker-compose.yml runs in containers."""
    kind, where = arguments
    if kind == "pack":
        folder = Path(where)
        with tempfile.TemporaryDirectory() as name:
            rows = pack_digits(Path(name) / "digits.h5")
            print(f"packed {rows:,} real handwritten digits into {keep_file(Path(name) / 'digits.h5', folder)}")
        return 0
    return 0 if train(where, int(os.environ.get("EPOCHS", "8"))) >= TARGET_ACCURACY else 1


if __name__ == "__main__":
    sys.exit(_in_containers(sys.argv[1:]))
