"""Data of a training workload of MLPerf Storage: random bytes in samples of its sizes, as an HDF5 file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from statistics import NormalDist

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.bench.workloads import SAMPLES, Workload
from h5feed.errors import BadParameter, TooLarge
from h5feed.wire import OFFSETS

from .settings import Settings

_SEED = 42

_WRITE_BYTES = 64 << 20
"""Random bytes that are made and written at a time."""

_HEAD_BYTES = 1 << 20
"""More than what the file has beside its samples and their offsets."""


def write_workload(workload: Workload, samples: int, path: Path) -> str:
    """Write the file, and return what to know about it.

    The sizes are the quantiles of a normal distribution with the mean and spread of the workload, in random order, so
    that their mean is right for any number of samples. No sample has less than one byte. Samples of different size are
    one flat array with offsets.

    Raises
    ------
    BadParameter
        There are fewer samples than one accelerator needs for a step, or the file exists.
    TooLarge
        The disk has no room for them.
    """
    if samples < workload.batch_size:
        raise BadParameter(f"--samples {samples}: one accelerator takes {workload.batch_size} at each step")
    sizes = _sizes(workload, samples)
    nbytes = int(sizes.sum())
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    needed, left = nbytes + 8 * samples + _HEAD_BYTES, shutil.disk_usage(folder).free
    if needed > left:
        raise TooLarge(f"{path.name} needs {needed:,} bytes, but {folder} has {left:,} left: use fewer --samples")
    if path.exists():
        raise BadParameter(f"{path} exists: choose another name, or delete it")
    part = path.with_name(f"{path.name}.part")
    try:
        with h5py.File(part, "w") as file:
            file.attrs.update({"workload": workload.name, "source": f"mlcommons/storage, {workload.source}"})
            if workload.spread:
                flat = file.create_dataset(SAMPLES, (nbytes,), np.uint8)
                file[SAMPLES + OFFSETS] = np.concatenate([[0], np.cumsum(sizes)])
            else:
                flat = file.create_dataset(SAMPLES, (samples, int(sizes[0])), np.uint8)
            _fill(flat, nbytes)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    largest = f"{sizes.max() / 1e6:,.1f} MB"
    said = f"{path}: {samples:,} samples of {workload.name}, {nbytes / 1e9:,.2f} GB, the largest {largest}"
    limit: int = Settings.model_fields["max_body_bytes"].default
    if sizes.max() + _HEAD_BYTES > limit:
        wanted = -(-(int(sizes.max()) + _HEAD_BYTES) // (1 << 20)) << 20
        settings = f"H5FEED_MAX_BODY_BYTES={wanted} H5FEED_INFLIGHT_BYTES={4 * wanted}"
        said += f"\nthe largest exceed the default limit of a response: serve with {settings}"
    return said


def _sizes(workload: Workload, samples: int) -> npt.NDArray[np.int64]:
    """Bytes of each sample, (samples,) int64."""
    if not workload.spread:
        return np.full(samples, round(workload.sample_bytes), np.int64)
    normal = NormalDist(workload.sample_bytes, workload.spread)
    quantiles = [normal.inv_cdf((number + 0.5) / samples) for number in range(samples)]
    return np.random.default_rng(_SEED).permutation(np.maximum(np.rint(quantiles), 1).astype(np.int64))


def _fill(array: h5py.Dataset, nbytes: int) -> None:
    """Fill an array of bytes with random ones, which no disk can compress."""
    random = np.random.default_rng(_SEED)
    row_bytes = nbytes // len(array)
    together = max(1, _WRITE_BYTES // row_bytes)
    for begin in range(0, len(array), together):
        end = min(begin + together, len(array))
        array[begin:end] = np.frombuffer(random.bytes((end - begin) * row_bytes), np.uint8).reshape(
            -1, *array.shape[1:]
        )
