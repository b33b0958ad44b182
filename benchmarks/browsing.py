"""Pages of the explorer against the time that each is allowed: a thousand datasets, and one of a million rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import h5feed
import h5py
import httpx
import numpy as np

from .data import Files
from .measure import Figure, Rates
from .servers import h5feed_server

DATASETS = 1000
ROWS = 1_000_000
_AGAIN = 5
_DEADLINE_SECONDS = 300.0

ALLOWED = {"catalogue": 0.2, "dataset": 0.3, "rows": 0.15, "sorted rows": 0.15, "picture": 0.15}
"""Seconds for a page; a picture is one of a page of rows."""

FIGURES = tuple(
    Figure(f"browse_{name.replace(' ', '_')}_in_time", {"1 worker": name}, {"1 worker": f"{name} allowed"}, 1.0)
    for name in ALLOWED
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Pages per second, and how many would be just in time."""
    rates: dict[str, list[float]] = {name: [] for name in ALLOWED}
    with TemporaryDirectory(prefix="h5feed-bench-", dir=files.folder.parent) as name:
        _write(Path(name))
        with h5feed_server(Path(name), 1) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            _settle(http)
            random = np.random.default_rng(0)

            def page(path: str) -> Callable[[], str]:
                return lambda: path.format(row=int(random.integers(0, ROWS - 100)))

            for what, path in (
                ("catalogue", page("/")),
                ("dataset", page("/datasets/million")),
                ("rows", page("/datasets/million/rows?offset={row}")),
                ("sorted rows", page("/datasets/million/rows?offset={row}&sort=weight&order=desc")),
                ("picture", page("/datasets/million/rows/{row}/view?field=images&side=64")),
            ):
                for _ in range(_AGAIN * rounds):
                    began = time.perf_counter()
                    http.get(path()).raise_for_status()
                    rates[what].append(1 / (time.perf_counter() - began))
    return rates | {f"{name} allowed": [1 / seconds] * len(rates[name]) for name, seconds in ALLOWED.items()}


def _write(folder: Path) -> None:
    random = np.random.default_rng(3)
    for number in range(DATASETS - 1):
        with h5py.File(folder / f"part_{number:04}_of.h5", "w") as file:
            file[f"images_{number}"] = np.zeros((10, 8, 8, 3), np.uint8)
            file["labels"] = np.arange(10)
    with h5py.File(folder / "million.h5", "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 8, 8), dtype=np.uint8)
        labels = file.create_dataset("labels", data=random.integers(0, 10, ROWS))
        labels.attrs["class_names"] = [f"class {number}" for number in range(10)]
        file["weight"] = random.normal(size=ROWS)
        file["name"] = np.array([f"row {row}".encode() for row in range(ROWS)])


def _settle(http: httpx.Client) -> None:
    """Until all is inspected, and what the pages show is computed."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    for path in ("/", "/datasets/million", "/datasets/million/rows?sort=weight&order=desc"):
        while True:
            answer = http.get(f"{path}{'&' if '?' in path else '?'}format=json")
            said = answer.raise_for_status().json()
            if answer.status_code == 200 and not said.get("running") and not said.get("preparing"):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} was not computed in {_DEADLINE_SECONDS:g} s")
            time.sleep(0.1)
