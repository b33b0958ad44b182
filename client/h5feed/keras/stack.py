"""What Keras is doing when it calls a dataset: there is no other way to tell than to look up the stack.

Keras 3.10 and later hand a dataset to a ``PyDatasetAdapter``, one for each call of ``fit``, ``evaluate`` or
``predict``, whose ``_finite_generator`` runs over it once; an ``EpochIterator`` cuts these runs into epochs. On
TensorFlow the generator runs in a thread of tf.data, ahead of the loop, and batches are looked at before, for their
shapes.
"""

from __future__ import annotations

from types import FrameType
from typing import Any, Literal

Mode = Literal["build", "fit", "evaluate", "predict"]

GENERATOR = "_finite_generator"
"""The function of the adapter that asks for a run's batches; first of all it asks how many there are."""

LOOK = "get_tf_dataset"
"""The function of the adapter that looks at the first batches."""

_METHODS: dict[str, Mode] = {
    "_symbolic_build": "build",
    "_maybe_symbolic_build": "build",
    "fit": "fit",
    "evaluate": "evaluate",
    "predict": "predict",
}
"""Methods of a Keras model that iterate over a dataset."""


def keras_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost function of Keras on the stack: methods of a subclass of the user's own may lie between."""
    while frame is not None and not (
        # Before Python 3.12 a comprehension has a frame of its own.
        str(frame.f_globals.get("__name__", "")).startswith("keras.") and frame.f_code.co_name != "<listcomp>"
    ):
        frame = frame.f_back
    return frame


def method_frame(frame: FrameType | None) -> FrameType | None:
    """The frame of the innermost method of a Keras model on the stack, or None for a loop of the user's own."""
    while (frame := keras_frame(frame)) is not None:
        if frame.f_code.co_name in _METHODS:
            return frame
        frame = frame.f_back
    return None


def running_method(frame: FrameType | None) -> Mode | None:
    """Which method that is."""
    found = method_frame(frame)
    return None if found is None else _METHODS[found.f_code.co_name]


def initial_epoch(frame: FrameType | None) -> int:
    """The ``initial_epoch`` of the running ``fit``, one that `BackupAndRestore` has set included."""
    found = method_frame(frame)
    return int(found.f_locals.get("initial_epoch") or 0) if found is not None else 0


def epoch_iterator(frame: FrameType | None) -> Any:
    """The ``EpochIterator`` that has called the adapter whose frame this is."""
    caller = None if frame is None else frame.f_back
    found = None if caller is None else caller.f_locals.get("self")
    return found if hasattr(found, "_num_batches") else None
