"""Reads what rows of an array in a store need in a few steps, before libhdf5 asks for it piece by piece."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.stored.codecs import decode_chunk
from h5feed.stored.layout import Filter
from h5feed.stored.scratch import Bytes
from h5py import h5d, h5p

from .piped_file import PipedFile
from .stored_types import disk_bytes, is_ragged

_MOST_CHUNKS = 4096
"""Chunks that are looked up."""

_MOST_CHUNK_BYTES = 16 << 20
"""Upper bound on a chunk of references that is decoded."""

_HEAP_BYTES = 4096
"""Smallest size of a collection of the global heap."""

_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])
"""What an array of lists or text has for each element: where its items are in the global heap."""

Int64s = npt.NDArray[np.int64]


def read_ahead(file: PipedFile, dataset: h5py.Dataset, rows: Int64s) -> None:
    """Read the chunks of rows; of lists and text, also the parts of the global heap that they are in.

    Parameters
    ----------
    file : PipedFile
        The file of the array.
    dataset : h5py.Dataset
    rows : (k,) int64
    """
    # This is a guess: what cannot be foreseen is read when libhdf5 asks for it.
    with contextlib.suppress(Exception):
        properties = dataset.id.get_create_plist()
        kind, layout = dataset.id.get_type(), properties.get_layout()
        address_bytes, _ = dataset.file.id.get_create_plist().get_sizes()
        nbytes = disk_bytes(kind, address_bytes)
        wanted = np.unique(rows)
        if nbytes is None or not len(wanted):
            return
        if layout == h5d.CONTIGUOUS:
            width = nbytes * math.prod(dataset.shape[1:])
            begins = dataset.id.get_offset() + wanted * width
            file.fetch((begin, width) for begin in begins.tolist())
            elements: Iterable[Bytes] = (np.frombuffer(file.at(begin, width), np.uint8) for begin in begins.tolist())
        elif layout == h5d.CHUNKED:
            chunks = list(itertools.islice(_chunks(dataset, wanted), _MOST_CHUNKS))
            file.fetch((chunk.byte_offset, chunk.size) for chunk in chunks)
            elements = _decoded(file, dataset, properties, chunks, wanted, nbytes)
        else:
            return
        if is_ragged(kind) and nbytes == _REFERENCE.itemsize:
            _read_heaps(file, elements)


def _chunks(dataset: h5py.Dataset, wanted: Int64s) -> Iterator[h5d.StoreInfo]:
    """Those of these rows that were written."""
    high, *wide = dataset.chunks
    first = np.unique(wanted // high) * high
    others = (range(0, extent, width) for extent, width in zip(dataset.shape[1:], wide, strict=True))
    for place in itertools.product(first.tolist(), *others):
        chunk = dataset.id.get_chunk_info_by_coord(place)
        if chunk.byte_offset is not None:
            yield chunk


def _decoded(
    file: PipedFile,
    dataset: h5py.Dataset,
    properties: h5p.PropDCID,
    chunks: list[h5d.StoreInfo],
    wanted: Int64s,
    nbytes: int,
) -> Iterator[Bytes]:
    """The stored elements of rows, chunk by chunk."""
    size = math.prod(dataset.chunks) * nbytes
    if size > _MOST_CHUNK_BYTES:
        return
    filters = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    steps = [Filter(code, "", tuple(options)) for code, _, options, _ in filters]
    for chunk in chunks:
        content = np.empty(size, np.uint8)
        decode_chunk(file.at(chunk.byte_offset, chunk.size), steps, chunk.filter_mask, nbytes, content)
        first = chunk.chunk_offset[0]
        here = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + dataset.chunks[0])]
        yield content.reshape(dataset.chunks[0], -1)[here - first].reshape(-1)


def _read_heaps(file: PipedFile, elements: Iterable[Bytes]) -> None:
    references = np.concatenate([np.frombuffer(one, _REFERENCE) for one in elements])
    heaps = (file.base + np.unique(references["heap"][references["length"] > 0])).tolist()
    file.fetch((heap, min(_HEAP_BYTES, file.size - heap)) for heap in heaps)
    # The size of a collection is in its header.
    sizes = (int.from_bytes(file.at(heap + 8, 8), "little") for heap in heaps)
    file.fetch(zip(heaps, sizes, strict=True))
