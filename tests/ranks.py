"""Several real processes that train together, and what each of them is to be given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

SECONDS = 120
"""Deadline of all ranks together: on a busy machine importing a framework alone takes a while."""

Batches = list[list[int]]
"""The rows of each batch; those that only pad it are left out."""


def run_ranks(script: str, *arguments: str, ranks: int = 2, **environment: str) -> list[Any]:
    """Run `script` in as many processes, with its rank as the last argument; returns the JSON that each prints last."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for rank in range(ranks)
    ]
    try:
        told = []
        for process in processes:
            out, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
            told.append(json.loads(out.splitlines()[-1]))
        return told
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check_shares(of_ranks: list[Batches], rows: int, batch_size: int, last: str) -> None:
    """Each rank has as many batches as the others; together they have each row once, or with "drop" all but a tail
    that makes no whole step."""
    step = batch_size * len(of_ranks)
    steps = rows // step if last == "drop" else -(-rows // step)
    assert [len(batches) for batches in of_ranks] == [steps] * len(of_ranks)
    seen = Counter(row for batches in of_ranks for batch in batches for row in batch)
    assert set(seen.values()) == {1}
    if last == "drop":
        assert len(seen) == steps * step and set(seen) <= set(range(rows))
    else:
        assert set(seen) == set(range(rows))
