"""``python -m benchmarks.first_batch``: how long the first batch of new, large files takes, from the server's start.

Prints one line a figure, and fails if one is over its bound. The files are in the page cache, as they are after they
were written; each server starts with an empty cache folder, except where everything is cached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import h5feed
import h5py
import numpy as np

from . import report
from .servers import h5feed_server

FIRST_SECONDS = 1.5
"""Bound on the first batch of one large file that was never seen before."""

TIMES_CACHED = 3.0
"""Bound on the same, in times of what it takes when everything is cached."""

LAST_SECONDS = 2.0
"""Bound on the first batch of the last of many files."""

_IMAGE = (64, 64, 3)
_BLOCK = 4096
"""Images that are written at once."""

_SETTLED_SECONDS = 2.5
"""Files that have just been written are not served before they are two seconds old."""

_AS_IT_IS = {"H5FEED_PROVISIONAL_BYTES": ""}
_HASHED_FIRST = {"H5FEED_PROVISIONAL_BYTES": str(1 << 62)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 if a figure is over its bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_batch", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, metavar="N", help="size of the large file")
    parser.add_argument("--files", type=int, default=200, metavar="N", help="number of the other files")
    parser.add_argument("--megabytes", type=float, default=20.0, metavar="N", help="size of each of these")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds; medians are printed")
    parser.add_argument("--folder", type=Path, default=None, help="folder for the files, which are deleted in the end")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="h5feed-first-", dir=options.folder) as base:
        large, many = Path(base) / "large", Path(base) / "many"
        _write(large / "big.h5", options.gigabytes * 1e9)
        for number in range(options.files):
            # Numbered, they would be parts of one dataset.
            name = f"{number:03d}".translate(str.maketrans("0123456789", "abcdefghij"))
            _write(many / f"{name}.h5", options.megabytes * 1e6)
        last = sorted(path.stem for path in many.iterdir())[-1]
        time.sleep(_SETTLED_SECONDS)
        cache = Path(base) / "cache"
        # Until the content is known, not everything is cached.
        _seconds(large, "big", cache, until=_is_hashed)
        seconds: dict[str, list[float]] = {"cached": [], "first": [], "hashed_first": [], "last": []}
        for _ in range(options.rounds):
            seconds["cached"].append(_seconds(large, "big", cache))
            seconds["first"].append(_anew(large, "big", base))
            seconds["last"].append(_anew(many, last, base))
        seconds["hashed_first"].append(_anew(large, "big", base, _HASHED_FIRST))
    return _print(options, seconds)


def _print(options: argparse.Namespace, seconds: dict[str, list[float]]) -> int:
    first, cached, last = (median(seconds[name]) for name in ("first", "cached", "last"))
    report.print_machine()
    print(f"load {', '.join(f'{load:.1f}' for load in os.getloadavg())}; medians of {options.rounds} rounds\n")
    figures = (
        (f"of_{options.gigabytes:g}_GB_never_seen", first, FIRST_SECONDS, "s"),
        ("to_everything_cached", first / cached, TIMES_CACHED, "times"),
        (f"of_the_last_of_{options.files}_files", last, LAST_SECONDS, "s"),
    )
    for name, value, bound, unit in figures:
        print(f"FIRST {name} {value:.2f} {unit} (at most {bound:g})")
    print(f"FIRST of_{options.gigabytes:g}_GB_cached {cached:.2f} s")
    print(f"FIRST of_{options.gigabytes:g}_GB_hashed_first {median(seconds['hashed_first']):.2f} s")
    return int(any(value > bound for _, value, bound, _ in figures))


def _write(path: Path, nbytes: float) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = int(nbytes / np.prod(_IMAGE))
    block = np.random.default_rng(0).integers(0, 256, (_BLOCK, *_IMAGE), np.uint8)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (rows, *_IMAGE), np.uint8)
        for begin in range(0, rows, _BLOCK):
            images[begin : begin + _BLOCK] = block[: rows - begin]
        file["labels"] = np.arange(rows, dtype=np.int32) % 10


def _anew(folder: Path, name: str, base: str, environment: Mapping[str, str] = _AS_IT_IS) -> float:
    """Seconds until the first batch, from a server that has never seen the files."""
    cache = Path(base) / "new-cache"
    shutil.rmtree(cache, ignore_errors=True)
    return _seconds(folder, name, cache, environment)


def _seconds(
    folder: Path,
    name: str,
    cache: Path,
    environment: Mapping[str, str] = _AS_IT_IS,
    until: Callable[[h5feed.Dataset], bool] = lambda dataset: True,
) -> float:
    """Seconds from the start of a server to the first shuffled batch of a split. The server goes on `until` then."""
    began = time.perf_counter()
    with h5feed_server(folder, 1, cache, **environment) as server, h5feed.connect(server.url) as feed:
        dataset = feed[name]
        batch = dataset.batch(0, split="train", batch_size=64, shuffle=True, test=0.1)
        seconds = time.perf_counter() - began
        assert (batch["labels"] == batch.rows % 10).all()
        while not until(dataset):
            time.sleep(0.1)
        return seconds


def _is_hashed(dataset: h5feed.Dataset) -> bool:
    dataset.take([0])
    return not dataset.revision.startswith("prov-")


if __name__ == "__main__":
    sys.exit(main())
