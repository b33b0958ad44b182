"""A process that writes an HDF5 file step by step: with SWMR, without, or killed in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]

WIDTH = 6

_PROGRAM = """
import sys
import time
import h5py
from tests.support.hdf5_writer import create, labels, values

path, mode, swmr, options = sys.argv[1], sys.argv[2], sys.argv[3] == "swmr", eval(sys.argv[4])
file = h5py.File(path, mode, libver=options.pop("libver", "latest"))
x, y = create(file, **options) if mode == "w" else (file["x"], file["y"])
if swmr:
    file.swmr_mode = True


def append(rows):
    first = len(x)
    for field, made in ((x, values), (y, labels)):
        field.resize(first + rows, 0)
        field[first:] = made(first, first + rows)


print("open", flush=True)
for line in sys.stdin:
    command, *numbers = line.split()
    numbers = [int(number) for number in numbers]
    if command == "append":
        append(numbers[0])
    elif command == "stream":
        print("done", flush=True)
        while True:
            append(1 + len(x) % 37)
            x.flush()
            y.flush()
            time.sleep(0.01)
    elif command == "rewrite":
        x[numbers[0]] = -1
    elif command == "flush":
        for field in (x, y)[: numbers[0] if numbers else 2]:
            field.flush()
    elif command == "close":
        file.close()
    print("done", flush=True)
"""


def values(first: int, end: int) -> npt.NDArray[np.int32]:
    """Rows first … end-1 of `x`."""
    return values_of(np.arange(first, end))


def values_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """These rows of `x`: every number tells its row and place."""
    return ((rows[:, None] * WIDTH + np.arange(WIDTH)) * 7 + 1).astype(np.int32)


def labels(first: int, end: int) -> npt.NDArray[np.int64]:
    """Rows first … end-1 of `y`."""
    return np.arange(first, end, dtype=np.int64) % 5


def create(file: Any, height: int = 16, compression: str | None = None, height_of_y: int = 10) -> tuple[Any, Any]:
    """Empty arrays `x` and `y` in chunks of so many rows."""
    x = file.create_dataset("x", (0, WIDTH), "<i4", maxshape=(None, WIDTH), chunks=(height, 4), compression=compression)
    y = file.create_dataset("y", (0,), "<i8", maxshape=(None,), chunks=(height_of_y,), compression=compression)
    return x, y


class Hdf5Writer:
    """Has a file open until it is told to close it. Each call returns when it is done.

    Parameters
    ----------
    path : Path
    mode : str
        See `h5py.File`.
    swmr : bool
    options : dict
        Of `create`, and ``libver``.
    """

    def __init__(self, path: Path, mode: str = "w", *, swmr: bool = True, **options: Any) -> None:
        arguments = [str(path), mode, "swmr" if swmr else "alone", repr(options)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._answer() == "open"

    def __call__(self, *commands: str) -> None:
        """``append N``, ``rewrite ROW``, ``flush``, ``flush 1`` (only `x`), ``close``; ``stream``: append and flush
        until it is killed."""
        for command in commands:
            assert self.process.stdin is not None
            print(command, file=self.process.stdin, flush=True)
            assert self._answer() == "done", command

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """Close the file and end the process."""
        if self.process.poll() is None:
            self("close")
            self.process.communicate()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
