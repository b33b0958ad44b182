"""Lays out and fills the bodies of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.wire import CROP, OFFSETS, ROWS, WEIGHT, Body, Tensor

from ..catalog.dataset import Dataset
from ..splits.packing import PackedRows
from ..storage.reader import Reader
from .cutting import Cut, Spans
from .sampled import SampledField

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NO_CUTS: Mapping[str, Cut] = {}


def too_many_bytes(rows: int, nbytes: int, limit: int) -> TooLarge:
    if rows == 1:
        return TooLarge(
            f"a single row has {nbytes} bytes, more than the limit of {limit} per response: start the server with a "
            "larger H5FEED_MAX_BODY_BYTES, or request fewer fields"
        )
    return TooLarge(
        f"{rows} rows have {nbytes} bytes, more than the limit of {limit} per response (H5FEED_MAX_BODY_BYTES): "
        f"request at most {max(1, limit // max(1, nbytes // max(1, rows)))} rows at once, or fewer fields"
    )


class Wanted(NamedTuple):
    """A batch to read: its index, its row ids, (n,) int64, and the weights of its rows, (n,) float32. If it has packed
    rows, also these; if rows are cropped, where their parts begin, (n, cropped axes) int64."""

    number: int
    rows: Int64s
    weight: npt.NDArray[np.float32] | None = None
    packed: PackedRows | None = None
    starts: Int64s | None = None

    @property
    def extra(self) -> list[Tensor]:
        """The tensors beside row ids and fields."""
        offsets = None if self.packed is None else self.packed.offsets
        named = ((WEIGHT, self.weight), (ROWS + OFFSETS, offsets), (CROP, self.starts))
        return [Tensor(name, array.dtype, array.shape) for name, array in named if array is not None]


def gathered(
    reader: Reader,
    dataset: Dataset,
    fields: Sequence[SampledField],
    wanted: Sequence[Wanted],
    about: Mapping[str, str],
    max_bytes: int,
    lease: Callable[[int], Bytes],
    cuts: Mapping[str, Cut] = NO_CUTS,
) -> Bytes:
    """Read bodies with ragged fields, back to back, into a leased buffer.

    The size of a body depends on the lengths of its ragged rows. If the lengths are not known in advance, these rows
    are read first.

    Raises
    ------
    TooLarge
        One of the bodies exceeds `max_bytes`.
    """
    lists = [lists_of(reader, fields, one.rows, cuts, one.packed) for one in wanted]
    bodies = []
    for one, own_lists in zip(wanted, lists, strict=True):
        bodies.append(body_of(dataset, fields, len(one.rows), about, one.extra, lengths_of(own_lists)))
        if bodies[-1].nbytes > max_bytes:
            raise too_many_bytes(len(one.rows), bodies[-1].nbytes, max_bytes)
    buffer = lease(sum(body.nbytes for body in bodies))
    begin = 0
    for one, own_lists, body in zip(wanted, lists, bodies, strict=True):
        tensors = body.place(buffer[begin : begin + body.nbytes], one.number)
        begin += body.nbytes
        tensors[ROWS][...] = one.rows
        if one.weight is not None:
            tensors[WEIGHT][...] = one.weight
        if one.packed is not None:
            tensors[ROWS + OFFSETS][...] = one.packed.offsets
        if one.starts is not None:
            tensors[CROP][...] = one.starts
        read_fields(reader, fields, one.rows, own_lists, tensors, one.starts)
    return buffer


class _List(NamedTuple):
    """A ragged field of some rows.

    Attributes
    ----------
    items : (n,) array or None
        None: they are not read yet.
    offsets : (k + 1,) int64
        Where those of each row begin.
    skipped : (k,) int64 or None
        How many items before those are left out; None: all items of the rows are there.
    """

    items: npt.NDArray[Any] | None
    offsets: Int64s
    skipped: Int64s | None = None


Lists = Mapping[str, _List]


def lists_of(
    reader: Reader,
    fields: Sequence[SampledField],
    rows: Int64s,
    cuts: Mapping[str, Cut] = NO_CUTS,
    packed: PackedRows | None = None,
) -> Lists:
    """Read the ragged fields whose offsets are not known without their items.

    Parameters
    ----------
    cuts : mapping of str to Cut
        Fields whose longer rows are cut.
    packed : PackedRows, optional
        Which items of the rows are wanted, in all fields.
    """
    lists: dict[str, _List] = {}
    shared: dict[str, Int64s | None] = {}
    for field in (field for field in fields if field.is_ragged):
        own = field.flat_rows(rows)
        # Values and column indices of sparse rows share them.
        if field.offsets_name not in shared:
            shared[field.offsets_name] = reader.list_offsets(field.column, own)
        known = shared[field.offsets_name]
        items, offsets = reader.read_ragged(field.column, own) if known is None else (None, known)
        spans = None
        if packed is not None:
            spans = Spans(packed.begins, packed.lengths)
        elif field.name in cuts:
            spans = cuts[field.name].spans(np.diff(offsets))
        if spans is None:
            lists[field.name] = _List(items, offsets)
        else:
            taken = None if items is None else spans.taken(items, offsets)
            lists[field.name] = _List(taken, spans.offsets, spans.skipped)
    return lists


def lengths_of(lists: Lists) -> dict[str, int]:
    """Number of items of each ragged field."""
    return {name: int(one.offsets[-1]) for name, one in lists.items()}


def read_fields(
    reader: Reader,
    fields: Sequence[SampledField],
    rows: Int64s,
    lists: Lists,
    tensors: Mapping[str, npt.NDArray[Any]],
    starts: Int64s | None = None,
) -> None:
    """Read rows of fields into the tensors of a body. `lists` is from `lists_of`, for the same fields and rows.
    `starts` is where the parts of the rows begin, if some fields are cropped."""
    for field in fields:
        out = tensors[field.name]
        if field.has_mask:
            field.put_mask(rows, tensors[field.mask_name])
        if not field.is_ragged:
            field.read(reader, rows, out, starts)
            continue
        items, offsets, skipped = lists[field.name]
        tensors[field.offsets_name][...] = offsets
        if items is None:
            reader.read_lists(field.column, field.flat_rows(rows), offsets, out, skipped)
        else:
            out[...] = items


def expected_items(reader: Reader, fields: Sequence[SampledField], rows: int) -> dict[str, int]:
    """Estimated number of items in `rows` rows of each ragged field."""
    return {
        field.name: rows * field.rows_per_sample * reader.typical_items(field.column)
        for field in fields
        if field.is_ragged
    }


def body_of(
    dataset: Dataset,
    fields: Sequence[SampledField],
    rows: int,
    about: Mapping[str, str],
    extra: Sequence[Tensor],
    lengths: Mapping[str, int],
) -> Body:
    """The layout of a body.

    Parameters
    ----------
    rows : int
        Number of rows.
    about : mapping of str to str
        Additional metadata.
    extra : sequence of Tensor
        Additional tensors.
    lengths : mapping of str to int
        Number of items of each ragged field.

    Raises
    ------
    BadParameter
        A field has a reserved name.
    """
    tensors = [Tensor(ROWS, np.dtype("<i8"), (rows,)), *extra]
    shared: set[str] = set()
    for field in fields:
        if field.is_ragged:
            dtype = np.dtype("|u1") if field.is_text else field.dtype
            tensors.append(Tensor(field.name, dtype, (lengths[field.name],)))
            # Values and column indices of sparse rows share them.
            if field.field.offsets is None or field.field.offsets not in shared:
                tensors.append(Tensor(field.offsets_name, np.dtype("<i8"), (rows * field.rows_per_sample + 1,)))
                shared.add(field.offsets_name)
        else:
            shape = (rows, *field.sample_shape)
            tensors.append(Tensor(field.name, field.dtype, shape, is_bfloat16=field.column.is_bfloat16))
        if field.has_mask:
            tensors.append(Tensor(field.mask_name, np.dtype("|b1"), (rows, *field.extra)))
    if len({"__metadata__", *(tensor.name for tensor in tensors)}) <= len(tensors):
        masks = [field.mask_name for field in fields if field.has_mask]
        raise BadParameter(f"a field may not be named {', '.join([ROWS, WEIGHT, CROP, *masks])} or __metadata__")
    return Body(tensors, {"dataset": dataset.name, "revision": dataset.revision, **about})
