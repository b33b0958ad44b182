"""Forecast a time series with Keras: from 32 samples of an EEG of four channels, the sample four steps later.

The EEG comes with Matplotlib. Run it with ``python examples/forecast.py``. Besides h5feed and h5feed-server, it needs
``pip install keras jax matplotlib``. It writes the series to an HDF5 file and opens the folder. With a server of your
own, connect to its address instead: ``h5feed.connect("http://gpu-box:8000")``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import keras
import numpy as np
from matplotlib import cbook

WINDOW = 32
"""Samples that the model sees."""

AHEAD = 4
"""How many samples after the last of them it forecasts."""


def write_series(path: Path) -> None:
    """Write the EEG, (800 samples, 4 channels), to an HDF5 file."""
    with cbook.get_sample_data("eeg.dat") as file, h5py.File(path, "w") as out:
        out["eeg"] = np.frombuffer(file.read(), "<f8").reshape(-1, 4).astype("f4")


def main() -> tuple[float, float]:
    """Train a model. Returns its error and that of repeating the last sample, on the last quarter of the series."""
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder) / "brain.h5")
        with h5feed.connect(folder) as feed:
            brain = feed["brain"]
            # Offsets count from the first row of the window.
            options: dict[str, Any] = {
                "x": "eeg",
                "y": "later",
                "sequence_length": WINDOW,
                "offsets": {"later": ("eeg", WINDOW - 1 + AHEAD)},
                "val": 0.25,
                "batch_size": 32,
            }
            train = brain.sequence("train", shuffle=True, seed=0, **options)
            val = brain.sequence("val", **options)

            regularizer = keras.regularizers.L2(0.01)
            model = keras.Sequential(
                [keras.layers.Flatten(), keras.layers.Dense(4, kernel_regularizer=regularizer)],
            )
            model.compile(optimizer=keras.optimizers.Adam(0.003), loss="mse", metrics=["mse"])
            model.fit(train, validation_data=val, epochs=25, verbose=2)

            error = float(model.evaluate(val, verbose=0, return_dict=True)["mse"])
            repeated = float(np.mean([np.mean((x[:, -1] - y) ** 2) for x, y in val]))
            print(f"mean squared error: {error:.2f}; of repeating the last sample: {repeated:.2f}")
            return error, repeated


if __name__ == "__main__":
    main()
