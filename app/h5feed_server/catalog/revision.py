"""Digests of the content of files, which revisions are made of. Copies on other machines have the same digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from h5feed.errors import RevisionChanged
from h5feed.stored.local_file import Identity

BLOCK = 4 << 20
"""Bytes of a block. Blocks are hashed in parallel, then their digests are hashed in order."""

_SAMPLES = 256
"""Number of evenly spaced blocks that are hashed of a file above the limit."""

_ROUND = 64
"""Blocks that are queued at once, so that a large file does not queue a task for each block."""


def bytes_hashed(size: int, limit: int) -> int:
    """Number of bytes of a file that are hashed: all up to `limit` bytes of size, else the samples."""
    return size if size <= limit else min(size, _SAMPLES * BLOCK)


def content_digest(path: str, identity: Identity, limit: int, layout: bytes) -> bytes:
    """Return the digest of a file's bytes; above `limit` bytes, of its size, layout and sampled blocks.

    Parameters
    ----------
    path : str
    identity : Identity
        Expected identity of the file.
    limit : int
    layout : bytes
        Serialised layout. Used above `limit` only.

    Raises
    ------
    RevisionChanged
        The file changed while it was read.
    OSError
        The file cannot be read.
    """
    # A single block: to hand it to a thread would take longer.
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "h5feed-digest") if identity.size > BLOCK else None
    with pool or contextlib.nullcontext():

        def hashed(fd: int, blocks: Sequence[int]) -> Iterable[bytes]:
            each = map if pool is None else pool.map
            return each(lambda block: block_digest(os.pread(fd, BLOCK, block * BLOCK)), blocks)

        return digest_in_rounds(path, identity, limit, layout, hashed, _ROUND)


def digest_in_rounds(
    path: str,
    identity: Identity,
    limit: int,
    layout: bytes,
    hashed: Callable[[int, Sequence[int]], Iterable[bytes]],
    at_once: int,
    begin: Callable[[int], None] = lambda nbytes: None,
) -> bytes:
    """Same as `content_digest`, with `at_once` blocks at a time.

    Parameters
    ----------
    hashed : callable
        ``hashed(fd, blocks)`` returns the digests of these blocks of the file.
    begin : callable
        Called before each round with the number of bytes that it will read. An error that it raises ends the work.
    """
    blocks = -(-identity.size // BLOCK)
    in_full = identity.size <= limit
    chosen: Sequence[int] = (
        range(blocks) if in_full else np.linspace(0, blocks - 1, min(_SAMPLES, blocks)).astype(int).tolist()
    )
    digest = begun_digest(identity.size, in_full=in_full)
    if not in_full:
        digest.update(layout)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for first in range(0, len(chosen), at_once):
            own = chosen[first : first + at_once]
            begin(sum(min(BLOCK, identity.size - block * BLOCK) for block in own))
            for part in hashed(fd, own):
                digest.update(part)
            if Identity.of(os.fstat(fd)) != identity:
                break
        if Identity.of(os.fstat(fd)) != identity:
            raise RevisionChanged("the file changed while it was read")
    finally:
        os.close(fd)
    return digest.digest()


def begun_digest(size: int, *, in_full: bool = True) -> hashlib.blake2b:
    """The digest of a file of this size, before that of its first block; or before the layout, if not `in_full`."""
    return hashlib.blake2b(f"{size} {'full' if in_full else 'sampled'}".encode())


def block_digest(block: bytes) -> bytes:
    """Digest of a block."""
    return hashlib.blake2b(block).digest()
