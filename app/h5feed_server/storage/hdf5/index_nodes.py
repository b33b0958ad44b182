"""Nodes of HDF5's indices, and what they lead to: so that an index in a store is read level by level.

See sections III and IV of the HDF5 File Format Specification. Addresses are taken to have 8 bytes. What is returned is
a guess: the bytes may be others that begin like a node, and where a node does not say how it is divided, some of what
is taken for an address is something else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

_NODE_BYTES = 512
"""Bytes that are read of an object's header, whose length is not known in advance."""

_SYMBOLS_BYTES = 328
"""Size of a symbol node with HDF5's default number of entries. A longer one most likely lies in the same block."""

_CHUNKS_PER_NODE = 64
"""HDF5's default; only special files have another."""

_MOST_AXES = 33
"""Of a chunk, with that of the bytes of an element."""

_LONGEST = 1 << 20
"""Nodes are much shorter than this. What is longer are values."""

_UNDEFINED = 2**64 - 1

_MOST_NAME_BYTES = 1024

_HAS_KIND, _HAS_ORDER, _HAS_CHARSET = 8, 4, 16
"""Flags of a link. It has no kind if it leads to an object of the file."""


def led_to(node: memoryview) -> Sequence[tuple[int, int]]:
    """Offset and size of what a node leads to: nodes, headers of objects and names, but not chunks of arrays.

    Parameters
    ----------
    node : memoryview
        All its bytes; anything else is no node.
    """
    kind = bytes(node[:4])
    if len(node) > _LONGEST:
        return ()
    if kind == b"TREE" and len(node) > 24:
        return _children(node)
    if kind == b"SNOD" and len(node) > 8:
        (count,) = struct.unpack_from("<H", node, 6)
        count = min(count, (len(node) - 8) // 40)
        return [(struct.unpack_from("<Q", node, 16 + 40 * place)[0], _NODE_BYTES) for place in range(count)]
    if kind == b"HEAP" and len(node) >= 32:
        nbytes, _, address = struct.unpack_from("<QQQ", node, 8)
        return [(address, nbytes)]
    if kind in (b"EAIB", b"EASB"):
        # Of the chunks of an array that grows. What comes before the addresses depends on a header.
        count = (len(node) - 18) // 8
        found = struct.unpack_from(f"<{count}Q", node, len(node) - 4 - 8 * count)
        return [(address, _NODE_BYTES) for address in found if address != _UNDEFINED]
    if kind in (b"OHDR", b"OCHK", b"FHDB"):
        return [(address, _NODE_BYTES) for address in _links(bytes(node))]
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


def _links(node: bytes) -> Iterator[int]:
    """Addresses in the links of a group, which are somewhere in a header or heap."""
    place = node.find(1, 4)
    while 0 <= place < len(node) - 12:
        flags = node[place + 1]
        if not flags & ~0x1F and not flags & _HAS_KIND:
            begin = place + 2 + (8 if flags & _HAS_ORDER else 0) + (1 if flags & _HAS_CHARSET else 0)
            width = 1 << (flags & 3)
            end = begin + width + (length := int.from_bytes(node[begin : begin + width], "little"))
            name = node[begin + width : end]
            if 0 < length <= _MOST_NAME_BYTES and end + 8 <= len(node) and min(name) >= 32:
                yield int.from_bytes(node[end : end + 8], "little")
                place = end + 7
        place = node.find(1, place + 1)
