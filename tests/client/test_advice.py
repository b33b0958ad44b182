"""What the statistics of a loop advise, by where its rows came from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from h5feed.loops.wait_stats import LoopStats

SLOW = LoopStats(passes=1, steps=100, rows=6400, seconds=10.0, steady_seconds=10.0, steady_waited=5.0)


@pytest.mark.parametrize(
    ("measured", "said", "unsaid"),
    [
        ({"transfer": 5.0}, "compress='zstd'", "--workers"),
        # Chunks and image files are not compressed again.
        ({"transfer": 5.0, "from_chunks": 6400}, "`h5feed bench`", "compress="),
        ({"transfer": 5.0, "from_images": 6400}, "use cache=", "compress="),
        # There is no link that could be the limit.
        ({"transfer": 5.0, "via": "Unix socket /run/h5feed/port-8000.sock"}, "--workers", "link"),
        ({"waiting": 5.0}, "readahead=", "link"),
        ({"waiting": 5.0, "via": "Unix socket /run/h5feed/port-8000.sock"}, "H5FEED_WORKERS", "readahead="),
        ({"decode": 5.0, "from_images": 6400}, "decode='server'", "transform="),
        # The server would read the same files with the same cores.
        ({"decode": 5.0, "from_files": 6400}, "CPU cores", "decode='server'"),
        ({"decode": 5.0, "preparing": 4.0}, "transform=", "decode='server'"),
        ({"waiting": 5.0, "retries": 50}, "retried", "--workers"),
    ],
)
def test_it_fits_the_way_of_the_rows(measured: dict[str, Any], said: str, unsaid: str) -> None:
    stats = replace(SLOW, **measured)
    assert said in stats.advice() and unsaid not in stats.advice()
    assert stats.advice() in repr(stats)


def test_a_last_pass_that_did_not_wait_needs_no_advice() -> None:
    """Whatever the first pass, which starts the server, opens files and fills caches, has waited for."""
    last = replace(SLOW, steady_waited=0.1, waiting=0.1)
    assert replace(SLOW, waiting=5.0).advice() and not replace(SLOW, waiting=5.0, last=last).advice()
    short = replace(SLOW, steps=1, steady_seconds=0.0, steady_waited=0.0)
    assert replace(SLOW, waiting=5.0, last=short).advice()


def test_why_fields_came_as_arrays() -> None:
    """Of rows that were not read here, and of fields of rows whose other fields were."""
    why = "noise: compression makes 70,000 bytes less than 1.2 times smaller"
    assert f"6,400 rows came as arrays from the server ({why})" in repr(replace(SLOW, why=why))
    assert f"\n{why}" in repr(replace(SLOW, why=why, from_chunks=6400))
