"""The index of ranges against a dictionary, and the bound on what it holds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from h5feed_server.storage.objects import range_cache, range_index
from h5feed_server.storage.objects.range_cache import RangeCache
from h5feed_server.storage.objects.range_index import RangeIndex


def test_it_is_like_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for ranges that begin at the same byte, after removals, and with other checksums."""
    monkeypatch.setattr(range_index, "_RECENT", 16)
    draw = random.Random(0)
    index, expected = RangeIndex(), dict[tuple[int, int], int]()
    for _ in range(20_000):
        piece = draw.randrange(500), draw.randrange(1, 4)
        if draw.random() < 0.2:
            index.remove(piece)
            expected.pop(piece, None)
        else:
            checksum = draw.randrange(1 << 32)
            index.add(piece, checksum)
            expected[piece] = checksum
    everything = [(offset, size) for offset in range(-1, 501) for size in range(1, 5)]
    assert index.checksums(everything) == [expected.get(piece) for piece in everything]
    assert {piece: index.get(piece) for piece in everything if index.get(piece) is not None} == expected
    assert len(expected) <= len(index) <= 1500 * 3


def test_a_version_has_at_most_so_many_ranges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(range_cache, "MOST_RANGES", 50)
    cache = RangeCache(tmp_path, 1 << 30)
    pieces = [(100 * number, 10) for number in range(80)]
    for offset, nbytes in pieces:
        cache.keep(b"version1", offset, np.full(nbytes, offset % 251, np.uint8))
    assert cache.held(b"version1", pieces) == set(pieces[:50])
    assert not cache.has_room and "more than 50 ranges" in caplog.text
    # Another process, and another version.
    again = RangeCache(tmp_path, 1 << 30)
    assert again.held(b"version1", pieces) == set(pieces[:50])
    again.keep(b"version2", 0, np.zeros(10, np.uint8))
    assert again.has_room
    found = again.find(b"version1", *pieces[49])
    assert found is not None and found.tolist() == [4900 % 251] * 10
