"""The same rows without a server: h5py in its two ways, and decoding alone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.stored.codecs import decode_chunk
from h5feed.stored.layout import load_layout
from h5feed_server.storage.hdf5.inspector import Inspector

from .measure import Turn


def by_row(images: h5py.Dataset, batch_size: int, batches: int) -> Turn:
    """One `read_direct` a row, into a batch that is used again and again."""
    batch = np.zeros((batch_size, *images.shape[1:]), images.dtype)
    orders = _orders(len(images))

    def turn() -> int:
        order = next(orders)[: batches * batch_size].tolist()
        for number, row in enumerate(order):
            images.read_direct(batch, np.s_[row], np.s_[number % batch_size])
        return len(order)

    return turn


def by_selection(images: h5py.Dataset, batch_size: int, batches: int) -> Turn:
    """``images[rows]``, which wants the rows sorted, and back into their order: the short way of h5py."""
    batch = np.zeros((batch_size, *images.shape[1:]), images.dtype)
    orders = _orders(len(images))

    def turn() -> int:
        order = next(orders)[: batches * batch_size]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            sorting = np.argsort(rows)
            batch[sorting] = images[rows[sorting]]
        return len(order)

    return turn


def decoding(path: Path, threads: ThreadPoolExecutor, workers: int) -> Turn:
    """Chunks of one image each from the file and through libdeflate, on all cores; nothing is sent anywhere."""
    with h5py.File(path) as file:
        images = file["images"]
        stored = _stored_chunks(images)
        shape = images.shape[1:]
    # Open as long as the process lives: one file, one figure.
    descriptor = os.open(path, os.O_RDONLY)
    largest = max(nbytes for _, nbytes in stored)
    scratch = [np.zeros(largest, np.uint8) for _ in range(workers)]
    decoded = [np.zeros(int(np.prod(shape)), np.uint8) for _ in range(workers)]
    orders = _orders(len(stored))

    def turn() -> int:
        order = next(orders).tolist()

        def work(number: int) -> int:
            out: Any = decoded[number]
            for row in order[number::workers]:
                offset, nbytes = stored[row]
                chunk: Any = scratch[number][:nbytes]
                os.preadv(descriptor, (chunk,), offset)
                imagecodecs.deflate_decode(chunk, out=out)
            return len(order[number::workers])

        return sum(threads.map(work, range(workers)))

    return turn


def decoding_all(path: Path, threads: ThreadPoolExecutor) -> Turn:
    """Every chunk of ``images`` once, in any order, through our codecs on all cores; nothing is sent anywhere."""
    with Inspector(60.0) as inspector:
        layout = load_layout(inspector.inspect(str(path)))
    images = next(array for array in layout.arrays if array.path == "images")
    assert images.chunks is not None and images.chunk_shape is not None
    nbytes = int(np.prod(images.chunk_shape)) * np.dtype(images.dtype).itemsize
    descriptor = os.open(path, os.O_RDONLY)
    chunks = list(zip(images.chunks.offsets.tolist(), images.chunks.sizes.tolist(), strict=True))
    largest = max(size for _, size in chunks)
    cores = os.cpu_count() or 1
    scratch = [(np.zeros(largest, np.uint8), np.zeros(nbytes, np.uint8)) for _ in range(cores)]

    def turn() -> int:
        remaining = iter(chunks)

        def work(number: int) -> None:
            stored, out = scratch[number]
            for offset, size in remaining:
                os.preadv(descriptor, (memoryview(stored)[:size],), offset)
                decode_chunk(stored[:size], images.filters, 0, np.dtype(images.dtype).itemsize, out)

        list(threads.map(work, range(cores)))
        return images.rows

    return turn


def _stored_chunks(images: h5py.Dataset) -> list[tuple[int, int]]:
    """Offset and bytes of the chunk of every row."""
    found = {}

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        found[chunk.chunk_offset[0]] = (chunk.byte_offset, chunk.size)

    images.id.chunk_iter(note)
    return [found[row] for row in range(len(images))]


def _orders(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """A shuffled order of all rows for every epoch."""
    for epoch in itertools.count():
        yield np.random.default_rng(epoch).permutation(rows)
