"""The order of an epoch: a keyed permutation that needs no memory.

``permute(positions, n, key)`` maps positions 0 … n-1 one-to-one onto 0 … n-1. It can compute any few positions of a
billion rows alone. It is a Feistel network over two digits of mixed radix, a·b ≥ n, with cycle walking for the few
values in n … a·b-1 (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002; the digit sums are those of FE1,
Bellare et al., "Format-Preserving Encryption", 2009). The round function is the 64-bit finaliser of MurmurHash3, so the
order is well shuffled but not secret.

All functions are pure and vectorised. `ORDER_VERSION` changes whenever a result changes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import BadParameter, BatchOutOfRange

ORDER_VERSION = 1
"""Part of every revision, so that results of different algorithms never mix."""

ROUNDS = 8
"""Feistel rounds. Six pass the tests of the order's quality for n ≥ 16; eight leave a margin for tiny n."""

Last = Literal["keep", "drop", "pad"]

SPLIT_ALIASES = {"valid": "val", "validation": "val", "dev": "val"}
"""Names that requests may use for a split, and its name in answers."""

_U32 = np.uint64(32)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_U33 = np.uint64(33)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio: multiples of it are far apart."""


def order_key(seed: int, epoch: int, split: str) -> bytes:
    """The 64-byte key of the order of one epoch. A hash, so that seed 1 epoch 0 is unrelated to seed 0 epoch 1."""
    return hashlib.blake2b(f"h5feed order {ORDER_VERSION}\0{seed}\0{epoch}\0{split}".encode()).digest()


def permute(positions: npt.NDArray[np.int64], n: int, key: bytes) -> npt.NDArray[np.int64]:
    """Map positions of the epoch to members of the split.

    Parameters
    ----------
    positions : (k,) int64
        Each in 0 … n-1, in any order.
    n : int
        Size of the domain, below 2**62.
    key : bytes
        64 bytes from `order_key`.

    Returns
    -------
    (k,) int64
        Each in 0 … n-1. Over all positions, every value occurs exactly once.
    """
    if n <= 1:
        return np.zeros(len(positions), np.int64)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = np.frombuffer(key, "<u8").astype(np.uint64)
    # Digits of mixed radix: value = left * b + right, left < a, right < b, both below 2**31.
    values = _rounds(positions.astype(np.uint64), a, b, keys)
    limit = np.uint64(n)
    outside = np.flatnonzero(values >= limit)
    while outside.size:  # fewer than one in sqrt(n), and each walk ends because the network is a bijection
        walked = _rounds(values[outside], a, b, keys)
        values[outside] = walked
        outside = outside[walked >= limit]
    return values.view(np.int64)


def permute_each(
    positions: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], key: bytes, names: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Map each position by its own permutation. Many small permutations cost no more than a large one.

    Parameters
    ----------
    positions : (k,) int64
        Each in 0 … size - 1.
    sizes : (k,) int64
        Size of the domain of each position, 1 or more, below 2**52.
    key : bytes
        64 bytes from `order_key`.
    names : (k,) int64
        Selects the permutation: equal name and size give the same one.

    Returns
    -------
    (k,) int64
        Each in 0 … size - 1. Over all positions of one name and size, every value occurs exactly once.
    """
    limits = sizes.astype(np.uint64)
    a = np.sqrt(sizes - 1).astype(np.uint64) + np.uint64(1)
    b = (limits + a - np.uint64(1)) // a
    # keys: (ROUNDS, k)
    keys = _mixed(np.frombuffer(key, "<u8").astype(np.uint64)[:, None] + names.astype(np.uint64) * _GOLDEN)
    values = _rounds(positions.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(values >= limits)
    while outside.size:
        walked = _rounds(values[outside], a[outside], b[outside], keys[:, outside])
        values[outside] = walked
        outside = outside[walked >= limits[outside]]
    return values.view(np.int64)


def uniform(names: npt.NDArray[np.int64], key: bytes) -> npt.NDArray[np.float64]:
    """A number 0 ≤ u < 1 for each name, (k,) float64, determined by name and key."""
    return (hashed(names, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hashed(names: npt.NDArray[np.int64], key: bytes) -> npt.NDArray[np.uint64]:
    """A number for each name, (k,) uint64, determined by name and key. Different names have different numbers.

    The numbers of 0, 1, 2 … are those of the generator SplitMix64 (Steele, Lea and Flood, 2014), with the finaliser of
    MurmurHash3, which is a bijection.
    """
    return _mixed(np.frombuffer(key, "<u8")[0].astype(np.uint64) + names.astype(np.uint64) * _GOLDEN)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The complete finaliser of MurmurHash3, in place."""
    values ^= values >> _U33
    values *= _MIX_1
    values ^= values >> _U33
    values *= _MIX_2
    values ^= values >> _U33
    return values


def _rounds(
    values: npt.NDArray[np.uint64],
    a: int | npt.NDArray[np.uint64],
    b: int | npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    radix_a, radix_b = np.uint64(a), np.uint64(b)
    left, right = np.divmod(values, radix_b)
    scratch = np.empty_like(values)
    for number in range(0, ROUNDS, 2):
        _add_hash(left, right, radix_a, keys[number], scratch)
        _add_hash(right, left, radix_b, keys[number + 1], scratch)
    left *= radix_b
    left += right
    return left


def _add_hash(
    target: npt.NDArray[np.uint64],
    other: npt.NDArray[np.uint64],
    radix: np.uint64,
    key: np.uint64,
    h: npt.NDArray[np.uint64],
) -> None:
    """target = (target + hash(other, key)) mod radix, in place; `h` is scratch."""
    np.bitwise_xor(other, key, out=h)
    h *= _MIX_1
    h ^= h >> _U32
    h *= _MIX_2
    # The high half times the radix, shifted back: reduces to below the radix without a division (Lemire, 2019).
    h >>= _U32
    h *= radix
    h >>= _U32
    target += h
    np.subtract(target, radix, out=h)
    # A negative result wraps to a huge unsigned number, so the minimum is the sum modulo the radix.
    np.minimum(target, h, out=target)


@dataclass(frozen=True)
class BatchGrid:
    """The division of an epoch of `rows` rows into batches for `shards` readers.

    Step i covers ``order[i·b·S : (i+1)·b·S]``, and shard s gets the s-th run of b of these. The tail is kept as a
    smaller batch (one shard only), dropped, or padded with rows from the start of the order, which get weight 0.

    Raises
    ------
    BadParameter
        A number is out of range, or ``last="keep"`` with several shards.
    """

    rows: int
    batch_size: int
    shard: int = 0
    shards: int = 1
    last: Last = "keep"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise BadParameter(f"batch_size={self.batch_size} must be 1 or more")
        if self.shards < 1:
            raise BadParameter(f"shards={self.shards} must be 1 or more")
        if not 0 <= self.shard < self.shards:
            raise BadParameter(f"shard={self.shard} must be from 0 to shards-1 = {self.shards - 1}")
        if self.last == "keep" and self.shards > 1:
            raise BadParameter(
                f"last=keep with shards={self.shards} would give unequal numbers of rows: use last=drop or last=pad"
            )

    @property
    def step(self) -> int:
        """Rows per step, over all shards."""
        return self.batch_size * self.shards

    @property
    def batches(self) -> int:
        """Batches per epoch, the same for every shard."""
        return self.rows // self.step if self.last == "drop" else -(-self.rows // self.step)

    def size(self, index: int) -> int:
        """Rows in batch `index`. Every batch is full except the last one with ``last="keep"``.

        Raises
        ------
        BatchOutOfRange
        """
        if not 0 <= index < self.batches:
            valid = f" (valid: 0 to {self.batches - 1})" if self.batches else ""
            raise BatchOutOfRange(f"batch {index} is out of range for {self.batches} batches{valid}")
        if self.last == "keep":
            return min(self.batch_size, self.rows - index * self.step)
        return self.batch_size

    def check_range(self, start: int, stop: int) -> None:
        """Check that batches start … stop-1 exist.

        Raises
        ------
        BatchOutOfRange
        """
        if not 0 <= start < stop <= self.batches:
            valid = f"0 ≤ start < stop ≤ {self.batches}"
            raise BatchOutOfRange(f"batches {start} … {stop - 1} are out of range (valid: {valid})")

    def positions(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Positions in the epoch of batches start … stop-1, concatenated.

        Returns
        -------
        positions : (k,) int64
            Each in 0 … rows-1.
        real : (k,) bool
            False for the repeated rows of a padded tail.
        """
        # steps: (batches, 1); within: (1, batch_size)
        first = np.arange(start, stop, dtype=np.int64)[:, None] * self.step + self.shard * self.batch_size
        positions = (first + np.arange(self.batch_size, dtype=np.int64)[None, :]).reshape(-1)
        real = positions < self.rows
        if self.last == "keep":
            positions = positions[real]
            return positions, np.ones(len(positions), np.bool_)
        if not real.all():
            positions %= self.rows
        return positions, real
