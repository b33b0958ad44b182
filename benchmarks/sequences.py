"""Sequences of a robot's demonstrations, in a file as robomimic writes it: by the client, and by slices of h5py."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
from h5feed.options import OrderOptions

from .data import Files
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS
from .servers import h5feed_server

_ONE = "2 workers"
_DEMOS, _ROWS = 40, 200
_IMAGE = (84, 84, 3)
_BATCH = 16
_STACK, _LENGTH, _CHUNK = 2, 10, 16
"""Frames of a stack, observations of a sequence, and actions of a chunk."""
_BATCHES = 60
"""Batches of a turn."""

FIGURES = (Figure("sequence_vs_h5py", {_ONE: "windows"}, {_ONE: "slices"}, 3.0),)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Samples per second of shuffled sequences of images and actions."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        _write(folder / "robot.h5")
        stack.enter_context(h5feed_server(folder, 2, None, (), ("--uds", str(folder / "socket"))))
        dataset = stack.enter_context(h5feed.connect(f"unix://{folder / 'socket'}"))["robot"]
        file = stack.enter_context(h5py.File(folder / "robot.h5"))
        _check(dataset, file)
        return take_turns({"windows": _windows(dataset), "slices": _slices(file)}, rounds)


_OPTIONS: OrderOptions = {
    "fields": ["obs.image", "actions"],
    "offsets": {"obs.image": range(1 - _STACK, _LENGTH), "actions": range(_CHUNK)},
    "ends": "pad",
    "shuffle": True,
}


def _windows(dataset: h5feed.Dataset) -> Turn:
    epochs = itertools.count()

    def turn() -> int:
        options: OrderOptions = {**_OPTIONS, "epoch": next(epochs)}
        batches = dataset.batches(batch_size=_BATCH, connections=CONNECTIONS, **options)
        samples = 0
        with contextlib.closing(batches):
            for batch in itertools.islice(batches, _BATCHES):
                samples += len(batch.rows)
        return samples

    return turn


def _slices(file: h5py.File) -> Turn:
    """A straightforward loop: for each sample, one slice of each array, padded at the ends of the demonstration."""
    epochs = itertools.count()

    def turn() -> int:
        order = np.random.default_rng(next(epochs)).permutation(_DEMOS * _ROWS)[: _BATCH * _BATCHES]
        for start in range(0, len(order), _BATCH):
            samples = [divmod(row, _ROWS) for row in order[start : start + _BATCH].tolist()]
            np.stack([_slice(file[f"data/demo_{demo}/obs/image"], row, 1 - _STACK, _LENGTH) for demo, row in samples])
            np.stack([_slice(file[f"data/demo_{demo}/actions"], row, 0, _CHUNK) for demo, row in samples])
        return len(order)

    return turn


def _slice(array: h5py.Dataset, row: int, low: int, high: int) -> npt.NDArray[np.generic]:
    begin, end = max(0, row + low), min(len(array), row + high)
    found: npt.NDArray[np.generic] = array[begin:end]
    before, after = begin - (row + low), row + high - end
    if before or after:
        found = np.concatenate([np.repeat(found[:1], before, 0), found, np.repeat(found[-1:], after, 0)])
    return found


def _check(dataset: h5feed.Dataset, file: h5py.File) -> None:
    """What is measured must be right."""
    batch = dataset.batch(0, batch_size=64, **_OPTIONS)
    for place, row in enumerate(batch.rows.tolist()):
        demo, own = divmod(row, _ROWS)
        for name, low, high in (("obs/image", 1 - _STACK, _LENGTH), ("actions", 0, _CHUNK)):
            expected = _slice(file[f"data/demo_{demo}/{name}"], own, low, high)
            np.testing.assert_array_equal(batch[name.replace("/", ".")][place], expected)


def _write(path: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for demo in range(_DEMOS):
            group = file.create_group(f"data/demo_{demo}")
            group["obs/image"] = random.integers(0, 256, (_ROWS, *_IMAGE), np.uint8)
            group["obs/robot0_eef_pos"] = random.random((_ROWS, 3))
            group["actions"] = random.random((_ROWS, 7))
            group["rewards"] = random.random(_ROWS)
            group["dones"] = np.arange(_ROWS) == _ROWS - 1
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
