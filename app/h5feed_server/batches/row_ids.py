"""Builds bodies that say of which rows samples are made, without the values of these rows.

Clients that keep rows themselves need no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from h5feed.wire import CROP, EPISODE, ITEMS, OFFSETS, ROWS, WEIGHT, Body, Tensor, rows_of_other

from ..splits.windows import Windows
from .bodies import body_of
from .plan import OtherBodies

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_INT64 = np.dtype("<i8")


@dataclass(frozen=True)
class RowIdsPlan(OtherBodies):
    """A plan whose bodies have row ids only.

    Parameters
    ----------
    plan : BatchPlan
    windows : callable
        Returns the samples, if these are windows of rows.
    """

    windows: Callable[[], Windows]

    one_block = False

    @property
    def ragged(self) -> bool:
        """Whether the size of a body is known when it is filled: packed rows have different numbers of rows."""
        return self.plan.order.packed is not None

    @cached_property
    def full(self) -> Body:
        """Body of every batch except the last; of packed rows, one of usual size."""
        size = self.plan.grid.batch_size
        if self.plan.order.packed is None:
            return self._body(size)
        packed = self.plan.order.packed()
        return self._body(-(-size * len(packed.rows) // max(1, packed.count)), size)

    def nbytes(self, start: int, stop: int) -> int:
        """Same as that of `BatchPlan`."""
        grid = self.plan.grid
        grid.check_range(start, stop)
        tail = self.full.nbytes if self.ragged else self._body(grid.size(stop - 1)).nbytes
        return (stop - start - 1) * self.full.nbytes + tail

    def filled(self, start: int, stop: int, lease: Callable[[int], Bytes]) -> Bytes:
        """Batches start … stop-1, back to back, in a leased buffer.

        Raises
        ------
        BatchOutOfRange
        """
        rows, real, starts = self.plan.all_rows(start, stop)
        if self.ragged:
            return self._packed(start, stop, rows, real, lease)
        columns = {ROWS: rows, **self._others(rows)}
        if self.plan.padded:
            columns[WEIGHT] = real.astype("<f4")
        if starts is not None:
            columns[CROP] = starts
        size, last = self.plan.grid.batch_size, self.plan.grid.size(stop - 1)
        tail = self._body(last)
        buffer = lease(self.nbytes(start, stop))
        begin, first = 0, 0
        runs = [(self.full, start, stop - 1 - start, size)] if stop - 1 > start else []
        for body, index, count, of_each in (*runs, (tail, stop - 1, 1, last)):
            end, until = begin + count * body.nbytes, first + count * of_each
            for name, out in body.place_many(buffer[begin:end], index, count).items():
                out[...] = columns[name][first:until].reshape(out.shape)
            begin, first = end, until
        return buffer

    def _others(self, rows: Int64s) -> dict[str, Int64s]:
        """What else says of which rows samples, (k,), are made, by name of the tensor, (k, …)."""
        found: dict[str, Int64s] = {}
        if self._has_episodes:
            found[EPISODE] = self.windows().bounds(rows)
        if self.plan.joined is not None:
            partners = self.plan.joined.partners_of(rows)
            found |= {rows_of_other(name): own for name, own in partners.items()}
        return found

    @property
    def _has_episodes(self) -> bool:
        spec = self.plan.order.spec
        return spec.has_windows and spec.ends != "drop"

    def _body(self, rows: int, packed_rows: int | None = None) -> Body:
        plan = self.plan
        extra = plan.extra(rows)
        if packed_rows is not None:
            extra += [Tensor(ROWS + OFFSETS, _INT64, (packed_rows + 1,)), Tensor(ITEMS, _INT64, (rows, 2))]
        if self._has_episodes:
            extra.append(Tensor(EPISODE, _INT64, (rows, 2)))
        if plan.joined is not None:
            extra += [Tensor(rows_of_other(name), _INT64, (rows,)) for name in plan.joined.by_key]
        return body_of(plan.dataset, [], rows, plan.about, extra, {})

    def _packed(
        self, start: int, stop: int, numbers: Int64s, real: npt.NDArray[np.bool_], lease: Callable[[int], Bytes]
    ) -> Bytes:
        """The same of packed rows, which are numbered."""
        plan, begin = self.plan, 0
        found: list[tuple[Body, int, dict[str, npt.NDArray[np.generic]]]] = []
        for index in range(start, stop):
            own = slice(begin, begin + plan.grid.size(index))
            packed = plan.order.unpacked(numbers[own])
            columns: dict[str, npt.NDArray[np.generic]] = {
                ROWS: packed.rows,
                ROWS + OFFSETS: packed.offsets,
                ITEMS: np.stack([packed.begins, packed.lengths], axis=1),
                **self._others(packed.rows),
            }
            if plan.padded:
                columns[WEIGHT] = np.repeat(real[own].astype("<f4"), np.diff(packed.offsets))
            found.append((self._body(len(packed.rows), len(packed.offsets) - 1), index, columns))
            begin = own.stop
        buffer = lease(sum(body.nbytes for body, _, _ in found))
        begin = 0
        for body, index, columns in found:
            for name, out in body.place(buffer[begin : begin + body.nbytes], index).items():
                out[...] = columns[name]
            begin += body.nbytes
        return buffer
