"""Nodes of HDF5's older indices, and what they lead to: so that an index in a store is read level by level.

The newer indices need no such help: the nodes of an array's chunks lie together, or are few. See section III of the
HDF5 File Format Specification. Addresses are taken to have 8 bytes. What is returned is a guess, because the bytes may
be others that begin like a node.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_NODE_BYTES = 512
"""Bytes that are read of an object's header, whose length is not known in advance."""

_SYMBOLS_BYTES = 328
"""Size of a symbol node with HDF5's default number of entries. A longer one most likely lies in the same block."""

_CHUNKS_PER_NODE = 64
"""HDF5's default; only special files have another."""

_MOST_AXES = 33
"""Of a chunk, with that of the bytes of an element."""


def led_to(node: memoryview) -> Sequence[tuple[int, int]]:
    """Offset and size of what a node leads to: nodes, headers of objects and names, but not chunks of arrays.

    Parameters
    ----------
    node : memoryview
        All its bytes; anything else is no node.
    """
    kind = bytes(node[:4])
    if kind == b"TREE" and len(node) > 24:
        return _children(node)
    if kind == b"SNOD" and len(node) > 8:
        (count,) = struct.unpack_from("<H", node, 6)
        count = min(count, (len(node) - 8) // 40)
        return [(struct.unpack_from("<Q", node, 16 + 40 * place)[0], _NODE_BYTES) for place in range(count)]
    if kind == b"HEAP" and len(node) >= 32:
        nbytes, _, address = struct.unpack_from("<QQQ", node, 8)
        return [(address, nbytes)]
    return ()


def _children(node: memoryview) -> Sequence[tuple[int, int]]:
    """Of a node of a version 1 B-tree, of a group or of the chunks of an array."""
    is_of_chunks, level, count = struct.unpack_from("<BBH", node, 4)
    if not is_of_chunks:
        key = 8
        nbytes = len(node) if level else _SYMBOLS_BYTES
    elif level:
        # A node has a key more than children, and a key has 8 bytes and 8 for each axis.
        key, rest = divmod(len(node) - 24 - 8 * _CHUNKS_PER_NODE, _CHUNKS_PER_NODE + 1)
        nbytes = len(node)
        if rest or key % 8 or not 16 < key <= 8 + 8 * _MOST_AXES:
            return ()
    else:
        return ()
    count = min(count, (len(node) - 24 - key) // (key + 8))
    return [(struct.unpack_from("<Q", node, 24 + key + place * (key + 8))[0], nbytes) for place in range(count)]
