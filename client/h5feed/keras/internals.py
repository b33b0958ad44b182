"""Everything that relies on Keras internals, with a check that they still work as expected.

Keras 3.10 and later pass a dataset to a ``PyDatasetAdapter``, one per call of ``fit``, ``evaluate`` or ``predict``. Its
generator runs over the batches, and an ``EpochIterator`` cuts these runs into epochs. The adapter gets a
`h5feed.keras.call.Call` instead of the sequence, which distinguishes its requests from those of other callers. This is
enough to evaluate and predict. Training also needs what `rehearsed` checks.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, Literal, cast

import keras
import numpy as np

Method = Literal["fit", "evaluate", "predict"]

_METHODS = ("fit", "evaluate", "predict")

_TRIED = ("3.10", "3.15")
"""The oldest and newest Keras release in which `rehearsed` is known to find no fault."""


DEALT = "Keras distributes the batches of each pass to the data shards, so this process gets only some of them"
ADVICE = "Set auto_shard_dataset=False on the distribution, and shard='auto' here"


def is_of_keras(frame: FrameType | None) -> bool:
    """Whether the frame belongs to a Keras function."""
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("keras.")


def _method_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not (frame.f_code.co_name in _METHODS and is_of_keras(frame)):
        frame = frame.f_back
    return frame


def running_method(frame: FrameType | None) -> Method | None:
    """The innermost ``fit``, ``evaluate`` or ``predict`` of a Keras model on the stack."""
    found = _method_frame(frame)
    return None if found is None else cast(Method, found.f_code.co_name)


def initial_epoch(frame: FrameType | None) -> int:
    """The ``initial_epoch`` of the running method, including one set by `BackupAndRestore`."""
    found = _method_frame(frame)
    return int(found.f_locals.get("initial_epoch") or 0) if found is not None else 0


class UnderWay:
    """A running Keras method. Tells later, from any thread, whether it still runs."""

    def __init__(self, frame: FrameType | None) -> None:
        found = _method_frame(frame)
        # A reference to the frame would keep its local variables alive.
        self._thread, self._frame = threading.get_ident(), id(found)

    def __bool__(self) -> bool:
        frame = sys._current_frames().get(self._thread)
        while frame is not None and not (id(frame) == self._frame and frame.f_code.co_name in _METHODS):
            frame = frame.f_back
        return frame is not None


def _first_argument(frame: FrameType) -> Any:
    code: CodeType = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def holder_of(dataset: Any, frame: FrameType | None) -> tuple[Any, str] | None:
    """The Keras object that runs in this frame and holds `dataset`, and the name of the attribute that holds it."""
    if frame is None or not is_of_keras(frame):
        return None
    holder = _first_argument(frame)
    for name, value in getattr(holder, "__dict__", {}).items():
        if value is dataset:
            return holder, name
    return None


def is_run(frame: FrameType) -> bool:
    """Whether the frame is a generator, which runs over the batches, and not a caller that only counts them."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def epoch_iterator(adapter: Any, frame: FrameType | None) -> Any:
    """The ``EpochIterator`` that called `adapter`; None if there is none."""
    while frame is not None and is_of_keras(frame):
        holder = _first_argument(frame)
        if getattr(holder, "data_adapter", None) is adapter:
            return holder
        frame = frame.f_back
    return None


def steps_per_epoch(iterator: Any) -> int | None:
    """The number of steps per epoch; None if an epoch is a whole pass."""
    return getattr(iterator, "steps_per_epoch", None)


def batches_ahead(iterator: Any) -> int:
    """Batches that Keras takes before it waits for the first step: those of one execution, with JAX one more."""
    # The first execution is compiled once all its batches are there.
    return int(getattr(iterator, "steps_per_execution", 1)) + int(keras.backend.backend() == "jax")


def is_amid_run(iterator: Any) -> bool:
    """Whether the last epoch ended, after its steps, in the middle of a run."""
    return bool(getattr(iterator, "_steps_seen", 0))


def tell_batches(iterator: Any, batches: int) -> None:
    """Set the number of batches in the run that an ``EpochIterator`` starts."""
    iterator._num_batches = batches


def tell_steps(frame: FrameType, steps: int) -> None:
    """Set the number of steps in an epoch for the callbacks of the running method, of which one shows progress."""
    found = _method_frame(frame)
    callbacks = None if found is None else found.f_locals.get("callbacks")
    for callback in getattr(callbacks, "callbacks", ()):
        if isinstance(getattr(callback, "params", None), dict):
            callback.params["steps"] = steps
        if isinstance(callback, keras.callbacks.ProgbarLogger):
            callback.target = steps
            if callback.progbar is not None:
                callback.progbar.target = steps


def trial_run(adapter: Any) -> Iterator[Any] | None:
    """A run over the batches in the order that `adapter` requests them; None if it has none to try."""
    run = getattr(adapter, "get_numpy_iterator", None)
    return None if run is None else iter(run())


class _Rehearsal(keras.utils.PyDataset):  # type: ignore[misc]
    """Three batches, of which a run is told to take two; records the calls in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._adapter: Any = None
        super().__init__()

    @property
    def workers(self) -> int:
        found = holder_of(self, sys._getframe(1))
        if found is not None:
            self._adapter = found[0]
            self.told.append("an adapter")
        return 1

    @property
    def num_batches(self) -> int:
        if not is_run(sys._getframe(1)):
            return 3
        self.told.append("a run")
        return 2

    def __getitem__(self, index: int) -> Any:
        self.told.append("a batch")
        return (np.zeros((1, 1), np.float32),)

    def on_epoch_begin(self) -> None:
        iterator = epoch_iterator(self._adapter, sys._getframe(1))
        names = vars(iterator) if iterator is not None else {}
        can_try = hasattr(self._adapter, "get_numpy_iterator")
        if can_try and names.get("_num_batches") == 3 and "_steps_seen" in names:
            tell_batches(iterator, 2)
            self.told.append("an epoch")

    def on_epoch_end(self) -> None:
        self.told.append("its end")


def rehearsed() -> str:
    """How this Keras differs from what training needs; empty if it does not."""
    try:
        from keras.src.trainers.epoch_iterator import EpochIterator
    except ImportError as error:
        return str(error)
    dataset = _Rehearsal()
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        iterator = EpochIterator(x=dataset)
        iterator.reset()
        for _ in iterator:
            pass
    except Exception as error:
        return f"its EpochIterator failed: {error}"
    finally:
        keras.distribution.set_distribution(distribution)
    expected = ["an adapter", "its end", "an epoch", "a run", "a batch", "a batch", "its end"]
    if dataset.told != expected:
        return f"its EpochIterator made the calls {', '.join(dataset.told)}, expected {', '.join(expected)}"
    fit = inspect.unwrap(keras.Model.fit)
    # A replaced fit() calls the original.
    if str(fit.__module__).startswith("keras.") and "reset" not in fit.__code__.co_names:
        return "its fit() no longer signals when the model has been built"
    return ""


FAULT = rehearsed()
"""How this Keras differs from what training needs, checked on import."""


def refusal() -> str:
    """The error message if training is not possible."""
    first, last = _TRIED
    fault = FAULT or "its data adapter does not accept a replacement for the dataset"
    return (
        f"this h5feed cannot train with Keras {keras.version()}: {fault}. Rows would be seen twice or never. "
        "Indexing, evaluate() and predict() work. To train, install a supported Keras, "
        f"`pip install 'keras>={first},<={last}.*'`, or a newer h5feed; or use dataset.loader() and train_on_batch()"
    )
