"""Which server owns which rows, so that the caches of several servers hold different parts of a dataset.

Rows are divided into blocks, and each block goes to the server with the highest hash of the server's name and the
block's number (rendezvous hashing: D. Thaler and C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates",
1998). All clients that know the servers by the same names agree on the owners, without talking to each other. If a
server is missing, only its blocks move: each to the server with the next highest hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadParameter
from ..order import hashed
from ..suggestions import did_you_mean

PLACEMENTS = ("cache",)
"""Values of ``placement``."""

LEAST_ROWS, LEAST_CHUNKS = 64, 8
"""A block has at least this many rows, and consists of at least this many chunks. In datasets of several files, chunks
need not begin where blocks do. Those at the edges of blocks then have two owners, at most one in `LEAST_CHUNKS`."""


def check_placement(placement: Any) -> None:
    """Raise `BadParameter` if this is no value of ``placement``."""
    if placement is not None and placement not in PLACEMENTS:
        raise BadParameter(f"placement={placement!r} is not known: {did_you_mean(str(placement), PLACEMENTS)}")


def rows_of_block(chunk_rows: int) -> int:
    """Number of rows of a block, for data of which `chunk_rows` rows are stored and decoded together."""
    return chunk_rows * max(LEAST_CHUNKS if chunk_rows > 1 else 1, -(-LEAST_ROWS // chunk_rows))


def owners_of(blocks: npt.NDArray[np.int64], servers: Sequence[str], data: str) -> npt.NDArray[np.intp]:
    """The owners of blocks.

    Parameters
    ----------
    blocks : (k,) int64
        Numbers of blocks.
    servers : sequence of str
        Names of the servers that can be asked.
    data : str
        What the blocks belong to.

    Returns
    -------
    (k,) intp
        Indices of `servers`. They do not depend on the order of the servers.
    """
    # scores: (servers, k)
    scores = np.stack([hashed(blocks, hashlib.blake2b(f"{name}\0{data}".encode()).digest()) for name in servers])
    highest: npt.NDArray[np.intp] = np.argmax(scores, axis=0)
    return highest
