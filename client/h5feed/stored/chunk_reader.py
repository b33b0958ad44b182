"""Reads rows of chunked arrays, from cached chunk rows or from chunks that are decoded for this read only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .chunk_rows import ChunkRows, grouped, parts_of
from .decoder_pool import Decoders
from .layout import ArrayLayout
from .ranges import ListParts
from .scratch import SCRATCH_BYTES, Bytes
from .source import Source

Int64s = npt.NDArray[np.int64]


class ChunkReader:
    """Reads rows out of chunks.

    Parameters
    ----------
    decoders : Decoders
    chunk_rows : ChunkRows
        Caches decoded chunks of many rows.
    """

    def __init__(self, decoders: Decoders, chunk_rows: ChunkRows) -> None:
        self._decoders = decoders
        self._chunk_rows = chunk_rows

    def read(self, source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes) -> None:
        """Read rows as they are stored into ``target[places]``, or into all of `target` in order if `places` is None.

        Parameters
        ----------
        source : Source
        array : ArrayLayout
        rows, places : (k,) int64
        target : (n, row bytes) uint8
        """
        assert array.chunk_shape is not None
        height, *widths = array.chunk_shape
        if array.filters and height == 1 and tuple(widths) == array.sample_shape:
            self._read_single_rows(source, array, rows, places, target)
            return
        if self._chunk_rows.keeps(array):
            self._chunk_rows.read(source, array, rows, places, target)
            return

        def work(remaining: Iterator[_ChunkJob]) -> None:
            for job in remaining:
                self._read_chunk(source, array, job, target)

        self._decoders.share(_chunk_jobs(array, rows, places), work)

    def read_lists(self, source: Source, array: ArrayLayout, parts: ListParts, places: Int64s, target: Bytes) -> None:
        """Read parts of lists from a flat array with filters. Each chunk is decoded once.

        Parameters
        ----------
        source : Source
        array : ArrayLayout
        parts : ListParts
        places : (n,) int64
            Where each part begins in `target`, in items.
        target : (m,) uint8
        """
        assert array.chunk_shape is not None
        if not len(places):
            return
        height, itemsize = array.chunk_shape[0], array.row_bytes
        order, numbers, bounds = grouped(parts.chunks)

        def work(remaining: Iterator[tuple[int, tuple[int, int]]]) -> None:
            for number, (start, stop) in remaining:
                held = self._chunk_rows.chunk_row(source, array, number)
                picked = order[start:stop]
                begins = ((parts.begins[picked] - number * height) * itemsize).tolist()
                ends = ((parts.ends[picked] - number * height) * itemsize).tolist()
                for place, begin, end in zip((places[picked] * itemsize).tolist(), begins, ends, strict=True):
                    target[place : place + end - begin] = held[begin:end]

        self._decoders.share(zip(numbers.tolist(), pairwise(bounds), strict=True), work)

    def _read_single_rows(
        self, source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes
    ) -> None:
        """Read rows that are one chunk each, and decode them directly into their places."""
        assert array.chunks is not None
        table, itemsize = array.chunks, np.dtype(array.dtype).itemsize
        entries = table.find(rows)
        where = np.arange(len(rows)) if places is None else places
        if len(missing := np.flatnonzero(entries < 0)):
            target[where[missing]] = fill_row(array)
            there = np.flatnonzero(entries >= 0)
            entries, where = entries[there], where[there]
        jobs = zip(
            table.offsets[entries].tolist(),
            table.sizes[entries].tolist(),
            table.masks[entries].tolist(),
            where.tolist(),
            strict=True,
        )

        def work(remaining: Iterator[tuple[int, int, int, int]]) -> None:
            with source.reading() as fd:
                for offset, size, mask, place in remaining:
                    self._decoders.chunk(source, fd, array, (offset, size, mask), itemsize, target[place])

        self._decoders.share(jobs, work)

    def _read_chunk(self, source: Source, array: ArrayLayout, job: _ChunkJob, target: Bytes) -> None:
        """Put the rows of one chunk in their places."""
        assert array.chunks is not None and array.chunk_shape is not None
        itemsize = np.dtype(array.dtype).itemsize
        if job.entry < 0:
            _place_fill(array, job, target)
            return
        offset, mask = int(array.chunks.offsets[job.entry]), int(array.chunks.masks[job.entry])
        plain = all(mask >> i & 1 for i in range(len(array.filters)))
        if plain and job.whole_rows:
            # An unfiltered chunk holds rows as the batch does: read only the rows requested, without scratch memory.
            if _follow_each_other(job.rows_in_chunk) and _follow_each_other(job.places):
                first = int(job.places[0])
                run = target[first : first + len(job.places)].reshape(-1)
                with source.reading() as fd:
                    source.fill(fd, offset + int(job.rows_in_chunk[0]) * array.row_bytes, memoryview(run))
                return
            sizes = np.full(len(job.places), array.row_bytes, np.int64)
            offsets = job.rows_in_chunk * array.row_bytes + offset
            source.read_rows(offsets, sizes, target.reshape(-1), job.places * array.row_bytes)
            return
        nbytes = math.prod(array.chunk_shape) * itemsize
        place = (offset, int(array.chunks.sizes[job.entry]), mask)
        if job.in_place:
            first = int(job.places[0])
            decoded = target[first : first + len(job.places)].reshape(-1)
            with source.reading() as fd:
                self._decoders.chunk(source, fd, array, place, itemsize, decoded)
            return
        if plain and nbytes > SCRATCH_BYTES:
            self._read_plain_parts(source, array, job, offset, target)
            return
        with self._decoders.room_for(nbytes), source.reading() as fd:
            decoded = self._decoders.scratch("decoded", nbytes)
            self._decoders.chunk(source, fd, array, place, itemsize, decoded)
            # (rows in chunk, *trailing chunk shape, itemsize)
            chunk = decoded.reshape(*array.chunk_shape, itemsize)
            placed: Any = (job.places, *job.inside)
            taken: Any = (job.rows_in_chunk, *job.inside_chunk)
            _view(array, target)[placed] = chunk[taken]

    def _read_plain_parts(self, source: Source, array: ArrayLayout, job: _ChunkJob, offset: int, target: Bytes) -> None:
        """Read parts of rows from an unfiltered chunk at `offset`, one by one, because the chunk may be large."""
        assert array.chunk_shape is not None
        widths, itemsize = array.chunk_shape[1:], np.dtype(array.dtype).itemsize
        nbytes = math.prod(widths) * itemsize
        with self._decoders.room_for(nbytes), source.reading() as fd:
            scratch = self._decoders.scratch("decoded", nbytes)
            part, view = scratch.reshape(*widths, itemsize), _view(array, target)
            for place, row in zip(job.places.tolist(), job.rows_in_chunk.tolist(), strict=True):
                source.fill(fd, offset + row * nbytes, memoryview(scratch))
                view[(place, *job.inside)] = part[job.inside_chunk]


class _ChunkJob(NamedTuple):
    """The rows of a batch that one chunk holds.

    Attributes
    ----------
    entry : int
        Index into the chunk table; -1: never written.
    places : (k,) int64
        Where the rows go in the batch.
    rows_in_chunk : (k,) int64
        Where the rows are in the chunk.
    inside, inside_chunk : tuple of slice
        The chunk's part of a sample, in the sample and in the chunk.
    whole_rows : bool
        The chunk holds whole rows and nothing else.
    in_place : bool
        The decoded chunk is identical to a run of rows of the batch, so it can be decoded directly into it.
    """

    entry: int
    places: Int64s
    rows_in_chunk: Int64s
    inside: tuple[slice, ...]
    inside_chunk: tuple[slice, ...]
    whole_rows: bool
    in_place: bool


def fill_row(array: ArrayLayout) -> Bytes:
    """A row that was never written, (row bytes,) uint8."""
    return np.tile(np.frombuffer(array.fill, np.uint8), math.prod(array.sample_shape))


def _chunk_jobs(array: ArrayLayout, rows: Int64s, places_of: Int64s | None) -> Iterator[_ChunkJob]:
    assert array.chunks is not None and array.chunk_shape is not None
    height, *widths = array.chunk_shape
    parts = parts_of(array)
    per_row = len(parts)
    whole_rows = tuple(widths) == array.sample_shape
    order, firsts, bounds = grouped(rows // height)
    # entries: (groups, cells)
    numbers = firsts[:, None] * per_row + np.arange(per_row, dtype=np.int64)[None, :]
    entries: Any = array.chunks.find(numbers.reshape(-1)).reshape(numbers.shape).tolist()
    within_chunk = rows % height
    for group, (start, stop) in enumerate(pairwise(bounds)):
        picked = order[start:stop]
        within = within_chunk[picked]
        places = picked if places_of is None else places_of[picked]
        in_place = whole_rows and stop - start == height
        if in_place and height > 1:
            in_place = bool((np.diff(places) == 1).all() and (np.diff(within) == 1).all())
        for part, (inside, inside_chunk) in enumerate(parts):
            yield _ChunkJob(entries[group][part], places, within, inside, inside_chunk, whole_rows, in_place)


def _follow_each_other(numbers: Int64s) -> bool:
    # The rows of a shuffled batch already differ in the first comparison.
    return len(numbers) > 1 and bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all())


def _view(array: ArrayLayout, target: Bytes) -> Bytes:
    """`target` as (k, *sample, itemsize)."""
    return target.reshape(len(target), *array.sample_shape, np.dtype(array.dtype).itemsize)


def _place_fill(array: ArrayLayout, job: _ChunkJob, target: Bytes) -> None:
    placed: Any = (job.places, *job.inside)
    _view(array, target)[placed] = np.frombuffer(array.fill, np.uint8)
