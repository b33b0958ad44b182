"""What is printed: the machine, a table, and one line a figure for programs to read."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import h5py

from .measure import Measured, best

_COLUMNS = "{:<29}{:<11}{:>8}{:>8}{:>18}{:>12}{:>12}"


def print_table(measured: Sequence[Measured], peaks: Mapping[str, Sequence[int]], rounds: int) -> None:
    """Print everything; the last lines are ``RATIO <name> <value>``, the better variant of each figure.

    Parameters
    ----------
    peaks : mapping of str to sequence of int
        Variant of the server to the peak memory of each worker, in bytes.
    """
    print_machine()
    print(
        f"medians of {rounds} rounds; ours and theirs are rows/s (transport: MB/s); * marks targets that are reached\n"
    )
    print(_COLUMNS.format("figure", "server", "ratio", "target", "range", "ours", "theirs"))
    for one in measured:
        scale = 1e-6 if one.figure.name.startswith("transport") else 1
        print(
            _COLUMNS.format(
                one.figure.name,
                one.variant,
                f"{one.ratio:.2f}{'*' if one.is_reached else ' '}",
                f"{one.figure.target:g}",
                f"{one.low:.2f} … {one.high:.2f}",
                f"{one.ours * scale:,.0f}",
                f"{one.theirs * scale:,.0f}",
            )
        )
    for variant, workers in peaks.items():
        if workers:
            each = ", ".join(f"{peak / 2**20:.0f} MiB" for peak in workers)
            print(f"peak memory of each worker while serving contiguous batches, {variant}: {each}")
    print()
    for name, ones in groupby(measured, lambda one: one.figure.name):
        print(f"RATIO {name} {best(list(ones)).ratio:.3f}")


def print_machine() -> None:
    """Print what it was measured on, and with which versions."""
    print(f"{os.cpu_count()} cores, {_processor()}; {platform.system()} {platform.machine()}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "uvicorn", "httpx", "imagecodecs"))
    hdf5 = f"h5py {h5py.version.version} (HDF5 {h5py.version.hdf5_version})"
    print(f"Python {platform.python_version()}, {hdf5}, {versions}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown processor"
