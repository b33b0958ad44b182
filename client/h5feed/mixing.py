"""Which source each sample of a mixture comes from, and which of the samples of that source it is.

Both follow from the weights, the seed and the number of the sample alone, so any part of an epoch can be computed by
itself. Samples are assigned in blocks of 1,000. At the end of each block, the number of samples of every source is
within one of its weight times all samples so far; inside a block, the sources are shuffled.

That such numbers exist for any weights is Tijdeman's theorem ("The chairman assignment problem", 1980). They are found
by serving the earliest deadline first: the next sample of a source may not come before its share begins to be more than
it has, and must come before it would lack a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from .order import hashed, order_key
from .runs import consecutive

BLOCK = 1000
"""Samples after which the numbers of samples are exact."""

PARTS = 1 << 32
"""Weights that are not integers are rounded to multiples of 1/PARTS, so that every machine computes the same."""

_MOST_KEPT = 64
"""Maximum number of different weights whose counts are kept."""

Stop = Literal["first", "all"]

Int64s = npt.NDArray[np.int64]
Parts = tuple[int, ...]
"""Weights of the sources: integers, relative to their sum."""


def parts_of(weights: Sequence[float]) -> Parts:
    """Weights as integers: as they are if they are integers, else rounded."""
    if all(float(weight).is_integer() for weight in weights):
        return tuple(int(weight) for weight in weights)
    total = sum(weights)
    return tuple(max(1, round(weight / total * PARTS)) if weight else 0 for weight in weights)


def tempered(sizes: Sequence[int], temperature: float) -> Parts:
    """Weights in proportion to ``size ** (1 / temperature)``."""
    if temperature == 1:
        return tuple(sizes)
    largest = max(sizes)
    return parts_of([(size / largest) ** (1 / temperature) for size in sizes])


class Shares:
    """The number of samples of each source among the first ones of an epoch, by weight.

    Numbers are computed block after block, and kept: they are the same in all epochs with these weights.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._whole = parts, sum(parts)
        self._counts: list[Parts] = [(0,) * len(parts)]

    def before(self, block: int) -> Parts:
        """Numbers before a block."""
        counts = self._counts
        if block >= len(counts):
            # Threads may do this at the same time: each computes the same list.
            counts = counts[:]
            for number in range(len(counts), max(block + 1, 2 * len(counts))):
                counts.append(self._after(counts[-1], number * BLOCK))
            self._counts = counts
        return counts[block]

    def at(self, total: int) -> Parts:
        """Numbers among the first `total` samples, the last of an epoch or of a block."""
        block, more = divmod(total, BLOCK)
        counts = self.before(block)
        return self._after(counts, total) if more else counts

    def _after(self, before: Parts, total: int) -> Parts:
        whole = self._whole
        quotas = [total * part for part in self._parts]
        counts = [max(had, quota // whole) for had, quota in zip(before, quotas, strict=True)]
        missing = total - sum(counts)
        if missing:
            # A source whose share is not used up may get one more. Its deadline: the sample when it would lack one.
            waiting = [
                (-(-(count + 1) * whole // self._parts[source]), source)
                for source, count in enumerate(counts)
                if count * whole < quotas[source]
            ]
            for _, source in sorted(waiting)[:missing]:
                counts[source] += 1
        return tuple(counts)


@dataclass(frozen=True)
class Mixing:
    """The assignment of the samples of all epochs.

    Attributes
    ----------
    sizes : tuple of int
        Samples of each source in one pass over it, 1 or more.
    units : int
        Units of an epoch.
    unit : int
        Number of consecutive samples that come from one source: 1, or a whole batch.
    parts : callable or tuple of int
        The weights, or a function that returns them for an epoch. None: the sources take turns.
    stop : str or None
        What ends an epoch: see `h5feed.mix`. If it is set, each epoch starts with new passes over its sources; else an
        epoch continues where the previous one ended.
    seed : int
    """

    sizes: Parts
    units: int
    unit: int
    parts: Parts | Callable[[int], Parts] | None
    stop: Stop | None
    seed: int
    _shares: dict[Parts, Shares] = field(default_factory=dict, compare=False, repr=False)
    _begun: dict[int, Parts] = field(default_factory=dict, compare=False, repr=False)
    """Samples of each source before an epoch, if the weights change."""

    @property
    def rows(self) -> int:
        """Samples of an epoch."""
        return self.units * self.unit

    def assigned(self, epoch: int, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Where the samples at some positions of an epoch come from.

        Returns
        -------
        sources : (k,) int64
        places : (k,) int64
            Their places in all passes over that source: pass ``place // size``, position ``place % size``.
        """
        numbers, within = np.divmod(positions, self.unit)
        if self.parts is None:
            ranks, sources = np.divmod(numbers, len(self.sizes))
        else:
            sources, ranks = self._by_weight(self._parts_of(epoch), epoch, numbers)
        return sources, np.array(self._starts(epoch), np.int64)[sources] + ranks * self.unit + within

    def counts(self, epoch: int) -> Parts:
        """Units of each source in an epoch."""
        if self.parts is None:
            each, more = divmod(self.units, len(self.sizes))
            return tuple(each + (source < more) for source in range(len(self.sizes)))
        return self._shares_of(self._parts_of(epoch)).at(self.units)

    def _by_weight(self, parts: Parts, epoch: int, numbers: Int64s) -> tuple[Int64s, Int64s]:
        """Source of each unit, and which of the units of that source it is."""
        sources, ranks = np.empty_like(numbers), np.empty_like(numbers)
        blocks, of_each = np.unique(numbers // BLOCK, return_inverse=True)
        groups = np.split(np.argsort(of_each, kind="stable"), np.cumsum(np.bincount(of_each))[:-1])
        for block, inside in zip(blocks.tolist(), groups, strict=True):
            places = numbers[inside] - block * BLOCK
            of_block, before = self._block(parts, epoch, block)
            sources[inside] = of_block[places]
            # ranks of the block: those of equal sources ascend
            ascending = np.argsort(of_block, kind="stable")
            sizes = np.bincount(of_block, minlength=len(parts))
            within = np.empty_like(of_block)
            within[ascending] = consecutive(0, sizes)
            ranks[inside] = within[places] + before[of_block[places]]
        return sources, ranks

    def _block(self, parts: Parts, epoch: int, block: int) -> tuple[Int64s, Int64s]:
        """The source of each unit of a block, (units,), and the units of each source before it, (sources,)."""
        shares, end = self._shares_of(parts), min((block + 1) * BLOCK, self.units)
        before = np.array(shares.before(block), np.int64)
        ordered = np.repeat(np.arange(len(parts)), np.array(shares.at(end), np.int64) - before)
        key = order_key(self.seed, epoch, f"mixture {block}")
        return ordered[np.argsort(hashed(np.arange(len(ordered)), key), kind="stable")], before

    def _shares_of(self, parts: Parts) -> Shares:
        shares = self._shares.get(parts)
        if shares is None:
            if len(self._shares) >= _MOST_KEPT:
                self._shares.clear()
            shares = self._shares[parts] = Shares(parts)
        return shares

    def _parts_of(self, epoch: int) -> Parts:
        assert self.parts is not None
        return self.parts(epoch) if callable(self.parts) else self.parts

    def _starts(self, epoch: int) -> Parts:
        """The place of the first sample of each source in an epoch."""
        if callable(self.parts):
            return self._used_before(epoch)
        samples = [count * self.unit for count in self._counts_of_all]
        if self.stop is None:
            return tuple(epoch * used for used in samples)
        return tuple(epoch * -(-used // size) * size for used, size in zip(samples, self.sizes, strict=True))

    def _used_before(self, epoch: int) -> Parts:
        """Samples of each source in all epochs before this one."""
        known = next((number for number in range(epoch, 0, -1) if number in self._begun), 0)
        used = self._begun.get(known, (0,) * len(self.sizes))
        for number in range(known, epoch):
            counts = self.counts(number)
            used = tuple(before + count * self.unit for before, count in zip(used, counts, strict=True))
            self._begun[number + 1] = used
        return used

    @cached_property
    def _counts_of_all(self) -> Parts:
        """The units of each source in any epoch, if the weights do not change."""
        return self.counts(0)


def units_of(sizes: Parts, parts: Parts | None, unit: int, stop: Stop) -> int:
    """Units of an epoch that ends when the `first` source, or when `all` sources, have delivered all their samples.

    With ``"first"``, no source is used up before the end of the epoch, so none of its samples comes twice. Incomplete
    units at the end of a source are not used. With ``"all"``, every sample comes at least once.
    """
    whole = [size // unit if stop == "first" else -(-size // unit) for size in sizes]
    if parts is None:
        count = len(sizes)
        ends = [units * count + source if stop == "first" else (units - 1) * count + source + 1
                for source, units in enumerate(whole)]  # fmt: skip
    elif stop == "first":
        ends = [units * sum(parts) // part for units, part in zip(whole, parts, strict=True)]
    else:
        ends = [-(-units * sum(parts) // part) for units, part in zip(whole, parts, strict=True)]
    return min(ends) if stop == "first" else max(ends)
