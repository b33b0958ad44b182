"""Builds bodies that describe where rows are stored, instead of containing them: see `h5feed.stored.pieces`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout, ChunkTable
from h5feed.stored.local_file import FileSource
from h5feed.stored.pieces import (
    BYTES,
    CHUNK_CACHE_BYTES,
    MAX_CHUNK_BYTES,
    PREFIX,
    FieldPieces,
    NamedFile,
    Pieces,
    chunk_bytes,
    dump_pieces,
)
from h5feed.wire import CROP, ROWS, WEIGHT, WORTHWHILE, Body, Tensor

from .bodies import Lists, body_of, lengths_of, lists_of, read_fields
from .compression import WORK_BYTES, compress, is_raw, refusal
from .plan import OtherBodies
from .sampled import SampledField

SMALL_ROW_BYTES = 4096
"""Clients do not read rows up to this size from files: reading each one would take longer than receiving it, and the
server has most of them in memory."""

_MOST_PLACES = 1 << 22
"""Maximum number of rows of a field to describe at once: each takes 8 bytes, however small it is."""

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class _Sent(NamedTuple):
    """Chunks of one file whose stored bytes are sent: their offsets and sizes in the file, (n,) int64."""

    file: FileSource
    offsets: Int64s
    sizes: Int64s


class _Undescribed(Exception):
    """A field does not come as pieces, for the reason given."""


@dataclass(frozen=True)
class PiecesPlan(OtherBodies):
    """A plan whose bodies contain pieces.

    Parameters
    ----------
    plan : BatchPlan
    root : Path
        The data folder.
    named : bool
        Refer to files by name where possible. Otherwise, all stored bytes are in the body.
    unnamed : str
        What precedes the reasons why fields are not described, if files are not named although the client wants that.
    compresses : bool
        Compress rows that are not stored in compressed chunks, if that makes them smaller: see `compression`.
    """

    root: Path
    named: bool
    unnamed: str
    compresses: bool = False

    ragged = True
    """The size of a body is known when it is filled."""

    one_block = True

    @property
    def full(self) -> Body:
        """Body of an ordinary batch."""
        return self.plan.full

    def nbytes(self, start: int, stop: int) -> int:
        """An estimate. Raises the same errors as that of `BatchPlan`."""
        return self.plan.nbytes(start, stop)

    def filled(self, start: int, stop: int, lease: Callable[[int], Bytes]) -> Bytes:
        """One body with batches start … stop-1, in a leased buffer.

        Raises
        ------
        BatchOutOfRange, TooLarge, BadParameter
        """
        plan = self.plan
        plan.fetch_ahead(start, stop)
        rows, real, starts = plan.all_rows(start, stop)
        pieces, sent = self._describe(rows)
        stored = sum(int(one.sizes.sum()) for one in sent)
        lists = lists_of(plan.reader, self._whole(pieces), rows, plan.cuts)
        body, tables = self._body(pieces, len(rows), stored, lists)
        if body.nbytes > plan.max_bytes:
            raise TooLarge(
                f"batches {start} … {stop - 1} have {body.nbytes} bytes, more than the limit of {plan.max_bytes} per "
                "response (H5FEED_MAX_BODY_BYTES): request fewer batches at once"
            )
        to_compress = [field for field in self._whole(pieces) if _is_raw(field)] if self.compresses else []
        if to_compress:
            # Compressed rows are never longer than what the same body would contain otherwise.
            leased = lease(WORK_BYTES + body.nbytes)
            pieces, used = self._compressed(pieces, to_compress, rows, stored, leased)
            body, tables = self._body(pieces, len(rows), stored + used, lists)
            if used:
                # Move them before anything else is written to the buffer. Source and target may overlap.
                begin, view = body.begin(BYTES) + stored, memoryview(leased)
                view[begin : begin + used] = view[WORK_BYTES : WORK_BYTES + used]
            buffer = leased[: body.nbytes]
        else:
            buffer = lease(body.nbytes)
        placed = body.place(buffer, start)
        placed[ROWS][...] = rows
        if plan.padded:
            placed[WEIGHT][...] = real
        for field in self._masked(pieces):
            field.put_mask(rows, placed[field.mask_name])
        if starts is not None:
            placed[CROP][...] = starts
        for name, table in tables.items():
            placed[name][...] = table
        read_fields(plan.reader, self._whole(pieces), rows, lists, placed, starts)
        if stored:
            _read_stored(sent, placed[BYTES])
        return buffer

    def _whole(self, pieces: Pieces) -> list[SampledField]:
        """Fields that come as ordinary tensors."""
        return [field for field in self.plan.fields if field.name not in pieces.fields]

    def _masked(self, pieces: Pieces) -> list[SampledField]:
        """Fields that come as pieces and have a mask, which is an ordinary tensor."""
        return [field for field in self.plan.fields if field.name in pieces.fields and field.has_mask]

    def _body(self, pieces: Pieces, rows: int, nbytes: int, lists: Lists) -> tuple[Body, Mapping[str, Int64s]]:
        """The layout of a body with this many bytes of pieces, and its tables."""
        plan = self.plan
        about, tables = dump_pieces(pieces)
        whole = self._whole(pieces)
        if any(field.name.startswith(PREFIX) for field in whole):
            raise BadParameter(f"body=pieces: a field may not have a name that begins with {PREFIX}")
        extra = plan.extra(rows)
        extra += [Tensor(name, table.dtype, table.shape) for name, table in tables.items()]
        extra += [Tensor(field.mask_name, np.dtype("|b1"), (rows, *field.extra)) for field in self._masked(pieces)]
        if nbytes:
            extra.append(Tensor(BYTES, np.dtype("|u1"), (nbytes,)))
        return body_of(plan.dataset, whole, rows, {**plan.about, "pieces": about}, extra, lengths_of(lists)), tables

    def _compressed(
        self, pieces: Pieces, fields: Sequence[SampledField], rows: Int64s, stored: int, leased: Bytes
    ) -> tuple[Pieces, int]:
        """Add those of `fields` that compression makes smaller. Returns all pieces, and the number of compressed bytes,
        which begin at `WORK_BYTES` of `leased`. In the body, they follow `stored` bytes of stored chunks."""
        described, reasons, used = dict(pieces.fields), dict(pieces.reasons), 0
        work, out = leased[:WORK_BYTES], leased[WORK_BYTES:]
        for field in fields:
            refused = refusal(field.column, len(rows))
            if refused is not None:
                reasons[field.name] = refused
                continue
            packed = compress(self.plan.reader, field.column, field.name, rows, out[used:], work, WORTHWHILE)
            if packed is None:
                nbytes = len(rows) * field.column.row_bytes
                reasons[field.name] = f"compression makes {nbytes:,} bytes less than {WORTHWHILE} times smaller"
                continue
            table = packed.array.chunks
            assert table is not None
            array = replace(packed.array, chunks=replace(table, offsets=table.offsets + stored + used))
            segment = Segment(field.column.segments[0].source, array)
            described[field.name] = FieldPieces([(segment, None)], np.arange(len(rows)))
            del reasons[field.name]
            used += packed.nbytes
        return Pieces(described, pieces.files, reasons), used

    def _describe(self, rows: Int64s) -> tuple[Pieces, list[_Sent]]:
        fields: dict[str, FieldPieces] = {}
        files: dict[str, tuple[int, NamedFile]] = {}
        reasons: dict[str, str] = {}
        sent: list[_Sent] = []
        for field in self.plan.fields:
            try:
                fields[field.name] = self._field(field, rows, files, sent)
            except _Undescribed as reason:
                reasons[field.name] = f"{self.unnamed}{reason}"
        return Pieces(fields, [file for _, file in files.values()], reasons), sent

    def _field(
        self, field: SampledField, rows: Int64s, files: dict[str, tuple[int, NamedFile]], sent: list[_Sent]
    ) -> FieldPieces:
        """Describe a field, and add the files it names and the bytes to be sent for it.

        Raises
        ------
        _Undescribed
        """
        if field.crop is not None:
            raise _Undescribed("rows are cropped, which the server does")
        column = field.column
        if len(rows) * field.rows_per_sample > _MOST_PLACES:
            raise _Undescribed(f"more than {_MOST_PLACES:,} rows at once")
        if column.is_ragged or column.images is not None:
            raise _Undescribed("rows differ in length" if column.is_ragged else "images that the server decodes")
        own = field.flat_rows(rows)
        touched = list(column.divide(own))
        for segment, _, _ in touched:
            _check_described(segment)
        names = self._names(touched) if self.named else None
        if names is not None and column.row_bytes <= SMALL_ROW_BYTES:
            raise _Undescribed(f"rows of up to {SMALL_ROW_BYTES:,} bytes are faster to send")
        if names is not None and self._is_decoded_again(column, touched):
            raise _Undescribed("chunks hold several rows, and the server decodes each chunk once for several batches")
        described = [_reduced(segment, local) for segment, _, local in touched]
        if names is None:
            described = _in_the_body(described, len(own) * column.row_bytes, sent)
        segments: list[tuple[Segment, int | None]] = []
        for number, segment in enumerate(described):
            file = None
            if names is not None:
                name = names[number]
                file, _ = files.setdefault(name, (len(files), NamedFile(name, segment.file.identity)))
            segments.append((segment, file))
        as_samples = field.row_map is None and len(column.segments) == 1
        return FieldPieces(segments, None if as_samples else _renumbered(touched, own))

    def _is_decoded_again(self, column: Column, touched: list[tuple[Segment, Int64s | None, Int64s]]) -> bool:
        """Whether a client would decode the same chunks for many batches: the order spreads the rows of each over all
        batches, and they do not fit into its cache, which is smaller than the server's."""
        spec = self.plan.order.spec
        if spec.window is not None or not (spec.shuffle or spec.draws) or column.nbytes <= CHUNK_CACHE_BYTES:
            return False
        arrays = [segment.array for segment, _, _ in touched]
        return any(array.filters and array.chunk_shape and array.chunk_shape[0] > 1 for array in arrays)

    @cached_property
    def _by_path(self) -> Mapping[str, str]:
        """Names of the files of the dataset, by path."""
        return {str(self.root / name): name for name in self.dataset.files}

    def _names(self, touched: list[tuple[Segment, Int64s | None, Int64s]]) -> list[str] | None:
        """Names of the files of some segments; None if one of them cannot be named."""
        files = [segment.file for segment, _, _ in touched]
        names = [self._by_path.get(file.path) if file.is_lent else None for file in files]
        return None if None in names else [name for name in names if name is not None]


def _is_raw(field: SampledField) -> bool:
    return field.row_map is None and field.crop is None and is_raw(field.column)


def _check_described(segment: Segment) -> None:
    array = segment.array
    if array.by_h5py:
        raise _Undescribed("only h5py can read the array")
    if segment.transposed or array.inline is not None:
        raise _Undescribed("rows are not stored one after the other")
    if chunk_bytes(array) > MAX_CHUNK_BYTES:
        raise _Undescribed(f"chunks of {chunk_bytes(array):,} bytes, more than {MAX_CHUNK_BYTES:,}")


def _reduced(segment: Segment, rows: Int64s) -> Segment:
    """The segment with only those chunks in its table that hold some of the rows."""
    array = segment.array
    bare: dict[str, Any] = {"attributes": {}, "enum_names": None, "text": None, "stored_bytes": 0}
    if array.chunks is not None and array.chunk_shape is not None:
        table, cells = array.chunks, array.cells
        first = np.unique(rows // array.chunk_shape[0]) * cells
        numbers = (first[:, None] + np.arange(cells, dtype=np.int64)).reshape(-1)
        entries = table.find(numbers)
        entries = entries[entries >= 0]
        bare["chunks"] = ChunkTable(
            table.numbers[entries], table.offsets[entries], table.sizes[entries], table.masks[entries]
        )
    return replace(segment, array=replace(array, **bare), about=None)


def _in_the_body(described: list[Segment], nbytes: int, sent: list[_Sent]) -> list[Segment]:
    """The segments with offsets into the stored bytes of a body, which are added to `sent`.

    Raises
    ------
    _Undescribed
        The rows themselves, of `nbytes`, are not much longer.
    """
    tables = [_table(segment.array) for segment in described]
    stored = sum(int(table.sizes.sum()) for table in tables)
    if stored * WORTHWHILE > nbytes:
        raise _Undescribed(f"rows of {nbytes:,} bytes are stored in chunks of {stored:,} bytes")
    begin = sum(int(one.sizes.sum()) for one in sent)
    placed = []
    for segment, table in zip(described, tables, strict=True):
        ends = begin + np.cumsum(table.sizes)
        sent.append(_Sent(segment.file, table.offsets, table.sizes))
        chunks = replace(table, offsets=ends - table.sizes)
        begin = int(ends[-1]) if len(ends) else begin
        placed.append(replace(segment, array=replace(segment.array, chunks=chunks)))
    return placed


def _table(array: ArrayLayout) -> ChunkTable:
    if array.chunks is None or not array.filters:
        raise _Undescribed("not stored in compressed chunks")
    if (array.chunks.sizes > 2 * chunk_bytes(array) + 4096).any():
        raise _Undescribed("the size of a chunk in the file is impossible")
    return array.chunks


def _renumbered(touched: list[tuple[Segment, Int64s | None, Int64s]], rows: Int64s) -> Int64s:
    """Rows counted over the touched segments only, (n,) int64."""
    renumbered = np.empty(len(rows), np.int64)
    begin = 0
    for segment, places, local in touched:
        renumbered[slice(None) if places is None else places] = begin + local
        begin += segment.rows
    return renumbered


def _read_stored(sent: list[_Sent], out: Bytes) -> None:
    begin = 0
    for one in sent:
        # A source that answers late joins them itself, and finds those that it has fetched already.
        late = one.file.answers_late
        offsets, sizes = (one.offsets, one.sizes) if late else _runs(one.offsets, one.sizes)
        one.file.read_rows(offsets, sizes, out, begin + np.cumsum(sizes) - sizes)
        begin += int(sizes.sum())


def _runs(offsets: Int64s, sizes: Int64s) -> tuple[Int64s, Int64s]:
    """Offsets and sizes, of which those that follow each other in the file are joined."""
    if not len(offsets):
        return offsets, sizes
    begins = np.flatnonzero(np.concatenate([[True], offsets[1:] != offsets[:-1] + sizes[:-1]]))
    ends = np.concatenate([begins[1:], [len(offsets)]]) - 1
    return offsets[begins], offsets[ends] + sizes[ends] - offsets[begins]
