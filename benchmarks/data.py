"""The files that are measured: big images contiguous, the same gzipped one chunk an image, and many small ones."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

KEPT = Path(__file__).parent / "data"
"""Where files stay that are kept for the next time."""

IMAGE = (256, 256, 3)
"""Shape of a big image, uint8: 196,608 bytes."""

BATCH = 64
"""Big images in a batch: 12.6 MB."""

CONTIGUOUS_ROWS = 6400
"""1.26 GB: far more than any cache of a processor, and little enough for the page cache."""

COMPRESSED_ROWS = 1200

THUMBNAIL = (64, 64, 3)
"""Shape of an image of middling size, uint8: 12,288 bytes."""

THUMBNAIL_ROWS = 20_000
"""246 MB."""

SMALL = (28, 28)
SMALL_ROWS = 60_000
SMALL_BATCH = 32

CLASSES = 10
_PIECE = 256
"""Rows written at a time."""


@dataclass(frozen=True)
class Files:
    """Where the files lie; each has the fields ``images`` and ``labels``."""

    folder: Path

    @property
    def contiguous(self) -> Path:
        return self.folder / "contiguous.h5"

    @property
    def compressed(self) -> Path:
        return self.folder / "compressed.h5"

    @property
    def thumbnails(self) -> Path:
        return self.folder / "thumbnails.h5"

    @property
    def small(self) -> Path:
        return self.folder / "small.h5"


def make_files(folder: Path, say: Callable[[str], None]) -> Files:
    """Write the files that are not there yet."""
    files = Files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, write in (
        (files.contiguous, _write_contiguous),
        (files.compressed, _write_compressed),
        (files.small, _write_small),
        (files.thumbnails, _write_thumbnails),
    ):
        if path.exists():
            continue
        say(f"writing {path.name}")
        unfinished = path.with_suffix(".tmp")
        write(unfinished)
        # What is still to be written back would be written while we measure.
        descriptor = os.open(unfinished, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        unfinished.rename(path)
    return files


def _write_contiguous(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        images = file.create_dataset("images", (CONTIGUOUS_ROWS, *IMAGE), np.uint8)
        for start in range(0, CONTIGUOUS_ROWS, _PIECE):
            images[start : start + _PIECE] = _noise(start, (min(_PIECE, CONTIGUOUS_ROWS - start), *IMAGE))
        _write_labels(file, CONTIGUOUS_ROWS)


def _write_compressed(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file, ThreadPoolExecutor(os.cpu_count()) as threads:
        images = file.create_dataset(
            "images", (COMPRESSED_ROWS, *IMAGE), np.uint8, chunks=(1, *IMAGE), compression="gzip", compression_opts=4
        )
        # h5py would compress one after the other.
        for row, chunk in enumerate(threads.map(_compressed_image, range(COMPRESSED_ROWS))):
            images.id.write_direct_chunk((row, 0, 0, 0), chunk)
        _write_labels(file, COMPRESSED_ROWS)


def _write_small(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("images", data=_noise(0, (SMALL_ROWS, *SMALL)))
        _write_labels(file, SMALL_ROWS)


def _write_thumbnails(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("images", data=_noise(0, (THUMBNAIL_ROWS, *THUMBNAIL)))
        _write_labels(file, THUMBNAIL_ROWS)


def _write_labels(file: h5py.File, rows: int) -> None:
    file.create_dataset("labels", data=np.random.default_rng(1).integers(0, CLASSES, rows, np.int64))


def _noise(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def _compressed_image(row: int) -> bytes:
    # Four random bits of eight: deflate halves it, by its Huffman codes alone.
    image = _noise(row, IMAGE) & 0x0F
    # A black margin, as of a letterboxed film: with it, gzip halves the image.
    image[: IMAGE[0] // 8] = 0
    return zlib.compress(image.data, 4)
