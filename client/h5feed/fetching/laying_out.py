"""Make arrays of few shapes from rows that differ in length: padded ones, or packed ones.

Lists arrive flat, without the padding, which would mostly be longer than they are.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..errors import BadAnswer, BadParameter
from ..net.trace import laid
from ..ragged import LENGTHS, MASK, POSITIONS, SEGMENT_IDS, Layout
from ..runs import consecutive
from ..wire import OFFSETS, ROWS
from .leased import leased

Int64s = npt.NDArray[np.int64]
_Kinds = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

_INT32, _BOOL = np.dtype(np.int32), np.dtype(np.bool_)


def laid_out_fetch(fetch: Fetch[Batch], layout: Layout, pool: BufferPool) -> Fetch[Batch]:
    """Wrap `fetch` to pad or pack its batches, in the calling thread."""

    def fetch_and_lay_out(block: Block, cancelled: threading.Event) -> list[Batch]:
        return [laid_out(batch, layout, pool) for batch in fetch(block, cancelled)]

    return fetch_and_lay_out


def laid_out(batch: Batch, layout: Layout, pool: BufferPool) -> Batch:
    """The batch with padded or packed arrays in place of flat ones.

    Raises
    ------
    BadParameter
        A row is longer than it may be.
    """
    return _packed(batch, layout, pool) if layout.pack is not None else _padded(batch, layout, pool)


def _padded(batch: Batch, layout: Layout, pool: BufferPool) -> Batch:
    flat = {name: _cut(batch, name, layout) for name in layout.fields}
    kinds: _Kinds = {}
    items = places = 0
    for name, (_, lengths) in flat.items():
        longest = int(np.argmax(lengths)) if len(lengths) else 0
        most = int(lengths[longest]) if len(lengths) else 0
        width = layout.width_of(name, most, int(batch.rows[longest]) if len(lengths) else 0)
        kinds[name] = layout.dtypes[name], (len(lengths), width)
        kinds[name + LENGTHS], kinds[name + MASK] = (_INT32, lengths.shape), (_BOOL, (len(lengths), width))
        items, places = items + int(lengths.sum()), places + len(lengths) * width
    arrays = leased(pool, kinds)
    for name, (values, lengths) in flat.items():
        arrays[name + LENGTHS][...] = lengths
        mask = arrays[name + MASK]
        np.less(np.arange(mask.shape[1]), lengths[:, None], out=mask)
        _fill(arrays[name], mask, values, layout.values[name])
    laid(items, places)
    fields: dict[str, npt.NDArray[Any]] = {}
    for name, array in batch.items():
        if name in flat:
            fields |= {own: arrays[own] for own in (name, name + LENGTHS, name + MASK)}
        elif name.removesuffix(OFFSETS) not in flat:
            fields[name] = array
    return batch.with_fields(fields)


def _cut(batch: Batch, name: str, layout: Layout) -> tuple[npt.NDArray[Any], Int64s]:
    """Items and lengths of a field. The server cuts rows, but not those that come from a cache."""
    items, offsets = batch[name], batch[name + OFFSETS]
    lengths = np.diff(offsets)
    most = layout.most.get(name)
    if most is None or not (lengths > most).any():
        return items, lengths
    if layout.truncate is None:
        place = int(np.argmax(lengths > most))
        raise BadParameter(
            f"max_length={most}: row {batch.rows[place]} of {name!r} has {lengths[place]} items: use truncate='start' "
            "or 'end' to keep that part of longer rows, or a larger max_length"
        )
    kept = np.minimum(lengths, most)
    firsts = offsets[:-1] if layout.truncate == "start" else offsets[1:] - kept
    return items[consecutive(firsts, kept)], kept


def _packed(batch: Batch, layout: Layout, pool: BufferPool) -> Batch:
    assert layout.pack is not None
    row_offsets = batch[ROWS + OFFSETS]
    counts = np.diff(row_offsets)
    if not len(counts) or (counts < 1).any():
        raise BadAnswer(f"batch {batch.index} has packed rows that hold no rows")
    shape = len(counts), layout.pack
    kinds: _Kinds = {name: (layout.dtypes[name], shape) for name in layout.fields}
    if kinds:
        kinds |= {SEGMENT_IDS: (_INT32, shape), POSITIONS: (_INT32, shape)}
    arrays = leased(pool, kinds)
    first: Int64s | None = None
    for name in layout.fields:
        offsets = batch[name + OFFSETS]
        if first is None:
            first = offsets
            # used: (k,), the items of each packed row
            used = np.diff(offsets[row_offsets])
            if (used > layout.pack).any():
                raise BadAnswer(f"batch {batch.index} has {used.max()} items in a packed row of {layout.pack}")
            mask = np.arange(layout.pack) < used[:, None]
            lengths = np.diff(offsets)
            numbers = np.arange(len(lengths)) - np.repeat(row_offsets[:-1], counts)
            _fill(arrays[SEGMENT_IDS], mask, np.repeat(numbers + 1, lengths), 0)
            _fill(arrays[POSITIONS], mask, np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths), 0)
            laid(int(offsets[-1]), mask.size)
        elif not np.array_equal(offsets, first):
            raise BadAnswer(f"batch {batch.index} has rows of {name!r} of other lengths than {layout.fields[0]!r}")
        _fill(arrays[name], mask, batch[name], layout.values[name])
    packed = batch.with_fields(arrays)
    packed.row_offsets = row_offsets
    if batch.weight is not None:
        packed.weight = batch.weight[row_offsets[:-1]]
    return packed


def _fill(out: npt.NDArray[Any], mask: npt.NDArray[np.bool_], items: npt.NDArray[Any], value: float) -> None:
    """Write items where `mask` is set, in order, and `value` elsewhere."""
    out[...] = value
    out[mask] = items
