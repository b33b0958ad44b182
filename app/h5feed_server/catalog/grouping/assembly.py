"""Assembles series with the same rows into a table, and adds fields that tell where each row comes from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from h5feed.stored.column import Column, Segment
from h5feed.stored.crop_reader import MAX_WHOLE_BYTES, can_be_sliced, read_for_box
from h5feed.stored.layout import MAX_CELLS, ArrayLayout
from h5feed.stored.local_file import FileSource

from ..roles import Role
from .names import natural
from .pieces import Path, Piece, Series, Table, TableField

_MOST_WASTED = 128
"""Rows along another axis than the first are served if at most so many times their bytes are read for each of them, or
if their array is small enough to be read as a whole. Loom has chunks of 64 × 64, which may reach beyond the edges."""

_MAX_INLINE_BYTES = 1 << 20
"""Fields that tell where rows come from are stored in memory up to this size. Larger ones are segments that consist of
the fill value only."""

CLASS_REASON = "the array, group or file is the class"
"""Reason for the role of a label whose classes are the names of pieces."""

_LABEL, _EPISODE, _FILE = "label", "episode", "file"


def assemble(path: Path, members: Sequence[Series], name: str | None = None) -> Table:
    """Return the table of series with the same shape.

    Parameters
    ----------
    path : tuple of str
        Path of their group.
    members : sequence of Series
    name : str, optional
        Name of the table in the group; default: it has the path of the group.
    """
    counts = sorted(((piece, count) for piece, count, _ in members[0].shape), key=lambda item: item[0].order)
    pieces, rows = [piece for piece, _ in counts], np.array([count for _, count in counts], np.int64)
    table = Table("/".join((*path, name) if name is not None else path), int(rows.sum()), [])
    begin = 0
    for piece, count in counts:
        if piece.split:
            runs = table.native.setdefault(piece.split, [])
            if runs and runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], begin + count)
            else:
                runs.append((begin, begin + count))
        begin += count
    for series in members:
        whole = [series.pieces[piece] for piece in pieces]
        segments = _of_one_length([part for segment in whole for part in segment.parts or (segment,)])
        problem = problem_of(segments)
        column = Column(tuple(segments if problem else _joined(segments)))
        table.fields.append(TableField(".".join(series.path[len(path) :]), column, problem, series.note))
    table.episodes = [(piece.episode[-1] if piece.episode else "", count) for piece, count in counts]
    if any(field.unreadable is None for field in table.fields):
        _add_origins(table, pieces, rows, members[0].first.file)
    return table


def problem_of(segments: Sequence[Segment]) -> str | None:
    """Why segments cannot form a column; None if they can."""
    kinds = {segment.wire for segment in segments}
    if len({(segment.has_lists, segment.offsets is None) for segment in segments}) > 1:
        if all(dtype.kind == "S" for dtype, _ in kinds):
            return "some of its pieces are text of a fixed length, others of variable length"
        return "some of its pieces are lists, others are not, or have no offsets"
    if len({None if one.indices is None else one.indices.wire[0] for one in segments}) > 1:
        return "the column indices of its sparse pieces have different types"
    if len({segment.array.is_bfloat16 for segment in segments}) > 1:
        return "some of its pieces are bfloat16, others are not"
    if len(kinds) > 1:
        shown = ", ".join(sorted(f"{dtype}{list(shape)}" for dtype, shape in kinds)[:3])
        return f"its pieces differ: {shown}. Write all of them with one type and row shape"
    if scattered := next(filter(_is_scattered, segments), None):
        axes = len(scattered.array.shape)
        which = "its last axis" if scattered.axis == axes - 1 else f"axis {scattered.axis} of {axes}"
        return (
            f"its rows are along {which}, so every row is scattered over the whole file: write it in chunks of few "
            "rows, or with the rows along the first axis"
        )
    return None


def _is_scattered(segment: Segment) -> bool:
    """Whether reading a row takes much longer than it should, because its elements are far apart."""
    if not segment.transposed or segment.array.nbytes <= MAX_WHOLE_BYTES:
        return False
    if not can_be_sliced(segment):
        return True
    if segment.as_row.cells > MAX_CELLS:
        return True
    row_bytes = np.dtype(segment.array.dtype).itemsize * math.prod(segment.row_lengths)
    return read_for_box(segment.as_row, segment.row_lengths) > _MOST_WASTED * row_bytes


def _of_one_length(segments: list[Segment]) -> list[Segment]:
    """The segments. If text has several lengths, all are served with the longest one, padded with zeros."""
    lengths = {dtype.itemsize for segment in segments for dtype, _ in [segment.wire] if dtype.kind == "S"}
    if len(lengths) < 2 or any(segment.has_lists or segment.wire[0].kind != "S" for segment in segments):
        return segments
    longest = f"|S{max(lengths)}"
    return [one if one.wire[0] == longest else replace(one, served_as=longest) for one in segments]


def _can_be_joined(segments: Sequence[Segment]) -> bool:
    """Whether segments are single values that are stored in the layout, with the same meaning."""
    arrays = [segment.array for segment in segments]
    if any(array.inline is None or array.record or array.shape != (1,) for array in arrays):
        return False
    first = arrays[0]
    text = first.dtype[1] == "S" and first.padding != "spacepad"
    alike = all(
        (one.padding, one.packing, one.enum_names, one.is_bfloat16)
        == (first.padding, first.packing, first.enum_names, first.is_bfloat16)
        for one in arrays
    )
    # Text of different widths can be joined, because it is padded with zeros.
    return alike and all(one.dtype == first.dtype or (text and one.dtype[1] == "S") for one in arrays)


def _joined(segments: Sequence[Segment]) -> Sequence[Segment]:
    """A single segment instead of many whose values are stored in the layout; else the same segments."""
    if len(segments) == 1 or not _can_be_joined(segments):
        return segments
    arrays = [segment.array for segment in segments]
    values = np.concatenate([np.frombuffer(array.inline or b"", array.dtype) for array in arrays])
    return [_constant(segments[0].file, arrays[0].path, values, arrays[0])]


def _add_origins(table: Table, pieces: Sequence[Piece], rows: npt.NDArray[np.int64], source: FileSource) -> None:
    """Add fields with the class, episode or file of each row, if there are any."""
    taken = {field.name for field in table.fields}

    def add(name: str, values: Sequence[str | int], role: Role) -> None:
        while name in taken:
            name += "_"
        taken.add(name)
        encoded = [value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value for value in values]
        segments = _repeated(source, name, np.array(encoded), rows)
        table.fields.append(TableField(name, Column(segments), None, None, role))

    if any(piece.kind for piece in pieces):
        names = sorted({piece.kind for piece in pieces}, key=lambda name: (natural(name), name))
        table.class_names = tuple(names)
        numbers = {name: number for number, name in enumerate(names)}
        add(_LABEL, [numbers[piece.kind] for piece in pieces], Role("label", CLASS_REASON))
    if any(piece.episode for piece in pieces):
        role = Role("other", "the name of the group that the row is in")
        add(_EPISODE, ["/".join(piece.episode) for piece in pieces], role)
    if any(piece.file for piece in pieces):
        is_row = bool((rows == 1).all())
        role = Role("other", f"the name of the file that the row {'is' if is_row else 'is in'}")
        add(_FILE, [piece.file for piece in pieces], role)


def _repeated(
    source: FileSource, name: str, values: npt.NDArray[np.generic], rows: npt.NDArray[np.int64]
) -> tuple[Segment, ...]:
    if int(rows.sum()) * values.itemsize <= _MAX_INLINE_BYTES or rows.max(initial=0) <= 1:
        return (_constant(source, name, np.repeat(values, rows)),)
    # Arrays that were never written: all their rows are the fill value.
    arrays = (
        ArrayLayout(f"{name}={value!r}", (int(count),), values.dtype.str, fill=value.tobytes())
        for value, count in zip(values, rows, strict=True)
    )
    return tuple(Segment(source, array) for array in arrays)


def _constant(
    source: FileSource, name: str, values: npt.NDArray[np.generic], like: ArrayLayout | None = None
) -> Segment:
    """A segment of values in memory, otherwise `like` an array. Its path includes a digest, because it keys caches."""
    data = values.tobytes()
    path = f"{name}#{hashlib.blake2b(data, digest_size=16).hexdigest()}"
    like = like or ArrayLayout(path, (), values.dtype.str)
    return Segment(source, replace(like, path=path, shape=values.shape, dtype=values.dtype.str, inline=data))
