"""A Keras model that keeps the rows it is trained on, whatever a backend fetches ahead or fetches and drops."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


class Witness(keras.layers.Layer):  # type: ignore[misc]
    """Keeps the rows that a model is trained on."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        # A list would be replaced by one of Keras' own.
        self._keep = rows.extend

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self._keep(rows_of((x,)))
        return x


def rows_of(batch: Any) -> list[int]:
    """The rows of a batch whose input is the row's own id."""
    return [int(row) for row in np.asarray(keras.ops.convert_to_numpy(batch[0]))[:, 0]]


def witnessed() -> tuple[Any, list[int]]:
    """A model, and the rows that it is trained on, in order; not compiled, so that its layers see numbers."""
    rows: list[int] = []
    inputs = keras.Input((2,))
    # By a seed of its own: threads that a backend leaves behind draw from the global one.
    dense = keras.layers.Dense(3, activation="softmax", kernel_initializer=keras.initializers.GlorotUniform(seed=3))
    model = keras.Model(inputs, dense(Witness(rows)(inputs)))
    model.compile(
        keras.optimizers.SGD(1e-4),
        "sparse_categorical_crossentropy",
        weighted_metrics=["accuracy"],
        run_eagerly=True,
        jit_compile=False,
    )
    return model, rows


def identity() -> Any:
    """A model that predicts the rows it is given."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inputs * 1.0)
    model.compile(loss=lambda y_true, y_pred: keras.ops.mean(y_pred, axis=-1))
    return model
