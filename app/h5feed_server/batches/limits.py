"""Limits on the responses: their bytes, their rows, and the parts of chunks that they are read from."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from h5feed.errors import TooLarge
from h5feed.stored.crop_reader import can_be_sliced, is_cut, pieces_of_box
from h5feed.wire import Body

from ..settings import Settings
from .bodies import too_many_bytes
from .plan import BatchPlan
from .sampled import SampledField

MAX_PIECES = 1 << 20
"""Maximum number of parts of chunks per response: each part takes time, however small it is."""


class Limits:
    """What one response may have, by the settings."""

    def __init__(self, settings: Settings) -> None:
        self._max_rows, self._max_bytes = settings.max_rows, settings.max_body_bytes

    def limited(self, plan: BatchPlan, batch_size: int) -> BatchPlan:
        """The plan with the limits on the rows of a body.

        Raises
        ------
        TooLarge
            Not even a single row may be sent, or the order of so many rows would take too much memory.
        """
        self.check_count(batch_size)

        def refusal(rows: int, estimated: bool = False) -> TooLarge | None:
            try:
                if estimated or not plan.ragged:
                    self.check_bytes(rows, plan.body_of_rows(rows))
                self.check_pieces(rows, plan.fields)
            except TooLarge as error:
                return error
            return None

        def most(estimated: bool) -> int:
            return bisect_left(range(1, batch_size + 1), True, key=lambda rows: refusal(rows, estimated) is not None)

        whole, guessed = refusal(batch_size), refusal(batch_size, estimated=True)
        if guessed is not None and plan.order.packed is not None:
            # Parts of a packed batch are not sent.
            raise guessed
        if guessed is None:
            return plan
        if (single := refusal(1)) is not None:
            raise single
        return replace(
            plan,
            max_rows=most(estimated=False),
            part_rows=max(1, most(estimated=True)),
            refusal=whole.detail if whole else "",
        )

    def check_count(self, rows: int) -> None:
        """Refuse more rows than one response may have.

        Raises
        ------
        TooLarge
        """
        if rows > self._max_rows:
            raise TooLarge(f"{rows} rows are more than the limit of {self._max_rows} per response (H5FEED_MAX_ROWS)")

    def check_bytes(self, rows: int, body: Body) -> None:
        limit = self._max_bytes
        if body.nbytes > limit:
            raise too_many_bytes(rows, body.nbytes, limit)

    def check_pieces(self, samples: int, fields: Sequence[SampledField]) -> None:
        """Check what so many samples cost beside their bytes."""
        limit = self._max_bytes
        self.check_count(samples)
        for field in fields:
            rows = samples * field.rows_per_sample
            self.check_count(rows)
            if field.crop is not None and self._check_crop_pieces(rows, field):
                continue
            for segment in field.column.segments:
                array = segment.array
                if segment.transposed and can_be_sliced(segment):
                    self._check_box_pieces(rows, field.name, pieces_of_box(segment.as_row, segment.row_lengths))
                    continue
                if rows * array.cells > MAX_PIECES:
                    raise TooLarge(
                        f"{rows} rows of {field.name!r} lie in {rows * array.cells} parts of chunks, more than the "
                        f"limit of {MAX_PIECES} per response: request at most "
                        f"{max(1, MAX_PIECES // array.cells)} rows at once"
                    )
                if rows * array.stored_row_bytes > 2 * limit:
                    raise TooLarge(
                        f"{rows} records that contain {field.name!r} have {rows * array.stored_row_bytes} bytes, more "
                        f"than the limit of {2 * limit} read per response (twice H5FEED_MAX_BODY_BYTES): request "
                        "fewer rows at once"
                    )
                table = array.shape[:1] if array.record else array.shape
                if array.chunk_shape is None or (not array.filters and array.chunk_shape[1:] == table[1:]):
                    continue
                itemsize = array.record[0] if array.record else np.dtype(array.dtype).itemsize
                chunk = math.prod(array.chunk_shape) * itemsize
                if chunk > limit:
                    raise TooLarge(
                        f"the chunks of {field.name!r} have {chunk} bytes, more than the limit of {limit} "
                        "(H5FEED_MAX_BODY_BYTES)"
                    )

    def _check_crop_pieces(self, rows: int, field: SampledField) -> bool:
        """Check what parts of so many rows of a field cost; returns False if whole rows are read for them."""
        assert field.crop is not None
        if field.column.images is not None or not all(map(is_cut, field.column.segments)):
            return False
        each = max(pieces_of_box(segment.array, field.crop) for segment in field.column.segments)
        self._check_box_pieces(rows, field.name, each)
        return True

    def _check_box_pieces(self, rows: int, name: str, each: int) -> None:
        """Check that so many rows, which lie in at most `each` pieces, are not too many."""
        if rows * each > MAX_PIECES:
            raise TooLarge(
                f"{rows} rows of {name!r} lie in {rows * each} parts of chunks or ranges, more than the limit "
                f"of {MAX_PIECES} per response: request at most {max(1, MAX_PIECES // each)} at once"
            )
