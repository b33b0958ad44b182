"""What a server lists and sends of files, against what h5py reads from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np

from .server_process import ServerProcess
from .waiting import wait_until


def described(server: ServerProcess, name: str) -> dict[str, Any]:
    """The description of a dataset, when its first inspection is over."""
    answers: list[httpx.Response] = []

    def is_known() -> bool:
        answers[:] = [httpx.get(f"{server.url}/v1/datasets/{name}", timeout=60)]
        return answers[0].status_code == 200

    wait_until(is_known)
    about: dict[str, Any] = answers[0].json()
    return about


def lines_of(server: ServerProcess) -> dict[str, dict[str, Any]]:
    """What is listed of each dataset, when all are inspected."""
    found: dict[str, dict[str, Any]] = {}

    def is_known() -> bool:
        lines = httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"]
        found.clear()
        found.update({line["name"]: line for line in lines})
        return bool(lines) and all(line["status"] != "preparing" for line in lines)

    wait_until(is_known)
    return found


def epoch_of(
    server: ServerProcess, name: str, path: Path, fields: Sequence[str] = ("plain", "labels", "packed"), epoch: int = 0
) -> None:
    """Read a shuffled epoch with the client and hold each row against h5py's."""
    with h5feed.connect(server.url, deadline=60) as feed, h5py.File(path) as file:
        seen = []
        for batch in feed[name].batches(batch_size=32, shuffle=True, seed=1, epoch=epoch, fields=list(fields)):
            seen += batch.rows.tolist()
            for field in fields:
                expected = np.stack([file[field][row] for row in batch.rows.tolist()])
                np.testing.assert_array_equal(batch[field], expected)
        assert sorted(seen) == list(range(len(file[fields[0]])))
