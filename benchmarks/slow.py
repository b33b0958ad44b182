"""Raw rows over links of 100 Mbit/s and 1 Gbit/s: compressed by the server for the way, against rows as they are."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5feed
import h5py
import numpy as np

from . import link
from .data import Files
from .far import NAMESPACE, links_are_possible
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS
from .servers import h5feed_server

LINKS = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6}
"""Bytes per second."""

BATCHES = {"scans": 4, "tokens": 256, "sensors": 128}
"""Datasets, and the rows of a batch: of one to two megabytes."""

_ROUNDS = 3
"""What a slow link carries hardly varies."""

_TURN_SECONDS = 1.0
"""About as long takes one turn of rows as they are."""

_MOST_BYTES = 48 << 20
"""Of a dataset."""

_FORMS: Mapping[str, Literal["zstd"] | None] = {"zstd": "zstd", "raw": None}

FIGURES = (
    *(
        Figure(
            f"compress_{name}",
            {at: f"zstd {name} {at}" for at in LINKS},
            {at: f"raw {name} {at}" for at in LINKS},
            1.2,
        )
        for name in BATCHES
    ),
    *(
        Figure(
            f"compress_wire_{name}",
            {at: f"wire zstd {name} {at}" for at in LINKS},
            {at: f"wire raw {name} {at}" for at in LINKS},
            0.8,
            smaller=True,
        )
        for name in BATCHES
    ),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second over the links, and bytes a row on the wire."""
    if not links_are_possible():
        print("cannot simulate a link here: it needs unshare, ip and /dev/net/tun", file=sys.stderr)
        return {}
    rates: dict[str, Sequence[float]] = {}
    # Not in the folder of the others, whose servers would look at it.
    with tempfile.TemporaryDirectory(prefix="h5feed-bench-") as folder:
        write(Path(folder))
        for at, rate in LINKS.items():
            command = [
                *NAMESPACE,
                sys.executable,
                "-m",
                "benchmarks.slow",
                folder,
                str(rate),
                str(min(rounds, _ROUNDS)),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
            found = json.loads(done.stdout.splitlines()[-1])
            rates |= {f"{name} {at}": each for name, each in found.items()}
    return rates


def write(folder: Path) -> None:
    """Numbers such as instruments and tokenizers give: nothing is constant, and the low bits are noise.

    ``scans``: (rows, 512, 512) int16, like slices of CT: soft tissue within air, each with its noise.
    ``tokens``: (rows, 1024) int32, token ids from a vocabulary of 32,000, as frequent as words are.
    ``sensors``: (rows, 512, 6) float32, accelerations and rates of turn from converters of 16 bits.
    """
    random = np.random.default_rng(7)
    scans = np.empty((_MOST_BYTES // (512 * 512 * 2), 512, 512), "<i2")
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    for scan in scans:
        wide, high = random.uniform(0.6, 0.9, 2)
        body = (x / wide) ** 2 + (y / high) ** 2 < 1
        organs = sum(
            random.uniform(-60, 120) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.02)
            for a, b in random.uniform(-0.5, 0.5, (12, 2))
        )
        scan[...] = np.where(body, 40 + organs + random.normal(0, 12, x.shape), random.normal(-1000, 5, x.shape))
    ranks = random.zipf(1.1, (_MOST_BYTES // (1024 * 4), 1024)) % 32_000
    tokens = random.permutation(32_000)[ranks].astype("<i4")
    shape = _MOST_BYTES // (512 * 6 * 4), 512, 6
    moves = np.cumsum(random.normal(0, 0.02, shape), axis=1) + random.normal(0, 0.005, shape)
    sensors = (np.round(moves * 2**13) / 2**13).astype("<f4")
    for name, values in (("scans", scans), ("tokens", tokens), ("sensors", sensors)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = values


def main(argv: Sequence[str] | None = None) -> int:
    """Measure within the network namespace of this process; prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rate", type=float)
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    through = [sys.executable, "-m", "benchmarks.link", "--round-trip", "0.0005", "--rate", str(options.rate), "--"]
    environment = {"H5FEED_HOST": link.THERE, "H5FEED_PUBLIC": "true"}
    found: dict[str, list[float]] = {}
    with (
        h5feed_server(options.folder, 2, None, through, (), **environment) as server,
        h5feed.connect(server.url) as feed,
    ):
        turns: dict[str, Turn] = {}
        for name, batch_size in BATCHES.items():
            dataset = feed[name]
            field = dataset.fields["x"]
            row_bytes = math.prod(field.shape) * np.dtype(field.dtype).itemsize
            limit = min(dataset.rows, int(_TURN_SECONDS * options.rate / row_bytes))
            for form, compress in _FORMS.items():
                turns[f"{form} {name}"] = turn = _epochs(dataset, batch_size, compress, limit)
                # What is done once, such as inspecting the file, does not count.
                turn()
                loader = dataset.loader(x="x", y=None, batch_size=batch_size, limit=limit, compress=compress)
                for _ in loader:
                    pass
                stats = loader.stats()
                found[f"wire {form} {name}"] = [stats.bytes / stats.rows] * options.rounds
        rates = {name: list(each) for name, each in take_turns(turns, options.rounds).items()}
    print(json.dumps(rates | found))
    return 0


def _epochs(dataset: h5feed.Dataset, batch_size: int, compress: Literal["zstd"] | None, limit: int) -> Turn:
    """Turns that take a shuffled epoch, another one each time."""
    epochs = itertools.count()
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "compress": compress, "shuffle": True}

    def turn() -> int:
        batches = dataset.batches(epoch=next(epochs), connections=CONNECTIONS, **options)
        return sum(len(batch.rows) for batch in batches)

    return turn


if __name__ == "__main__":
    sys.exit(main())
