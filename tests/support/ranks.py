"""Several real processes that train together, and what each of them is to be given."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SECONDS = 300
"""Deadline of all ranks together: on a busy machine importing a framework alone takes a while."""

Batches = list[list[int]]
"""The rows of each batch; those that only pad it are left out."""


RANKS = 2


def run_ranks(script: str, *arguments: str, **environment: str) -> list[Any]:
    """Run `script` in two processes; returns the JSON that each prints last.

    The rank is the last argument of each, and stands for ``{rank}`` in the variables of its environment.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {name: value.replace("{rank}", str(rank)) for name, value in environment.items()},
        )
        for rank in range(RANKS)
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


def check_passes(ranks: list[Any], rows: int, batch_size: int) -> None:
    """What each rank told: of each loop, named as "loader drop", its passes, which have an order each."""
    for name in ranks[0]["told"]:
        passes = [list(one) for one in zip(*(rank["told"][name] for rank in ranks), strict=True)]
        for of_ranks in passes:
            check_shares(of_ranks, rows, batch_size, name.split()[1])
        assert passes[0] != passes[1]


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def write_ids(path: Path, rows: int) -> None:
    """Inputs of two numbers; the target of a row is its id."""
    with h5py.File(path, "w") as file:
        file["x"] = np.random.default_rng(0).random((rows, 2), np.float32)
        file["y"] = np.arange(rows)


def two_passes(batches: Any, told: Any) -> None:
    """Tells the rows of two passes over batches for torch, the first without workers and the second with two."""
    from torch.utils.data import DataLoader

    told.put([[int(row) for _, y in loop for row in y] for loop in (batches, DataLoader(batches, None, num_workers=2))])
