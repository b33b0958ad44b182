"""Digests of the content of files, which revisions are made of. Copies on other machines have the same digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from h5feed.errors import RevisionChanged
from h5feed.stored.local_file import Identity

_BLOCK = 4 << 20
"""Bytes of a block. Blocks are hashed in parallel, then their digests are hashed in order."""

_SAMPLES = 256
"""Number of evenly spaced blocks that are hashed of a file above the limit."""


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
    blocks = -(-identity.size // _BLOCK)
    in_full = identity.size <= limit
    chosen: Sequence[int] = (
        range(blocks) if in_full else np.linspace(0, blocks - 1, min(_SAMPLES, blocks)).astype(int).tolist()
    )
    digest = hashlib.blake2b(f"{identity.size} {'full' if in_full else 'sampled'}".encode())
    if not in_full:
        digest.update(layout)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if len(chosen) == 1:
            # A small file: starting threads would take longer.
            digest.update(_block_digest(fd, chosen[0]))
            chosen = ()
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "h5feed-digest") as threads:
            # In rounds, so that a large file does not queue a task for each block at once.
            for first in range(0, len(chosen), 64):
                for part in threads.map(lambda block: _block_digest(fd, block), chosen[first : first + 64]):
                    digest.update(part)
                if Identity.of(os.fstat(fd)) != identity:
                    break
        if Identity.of(os.fstat(fd)) != identity:
            raise RevisionChanged("the file changed while it was read")
    finally:
        os.close(fd)
    return digest.digest()


def _block_digest(fd: int, block: int) -> bytes:
    return hashlib.blake2b(os.pread(fd, _BLOCK, block * _BLOCK)).digest()
